"""Reading corpus files: what becomes a document, and what is refused in one sentence."""

from __future__ import annotations

import hashlib
import json
import sys
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unbraid.activations.documents import Document, read_documents
from unbraid.manifest.errors import UserError


def write(folder: Path, name: str, data: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def texts(path: Path) -> list[str | None]:
    return [document.text for document in read_documents(path)]


def test_blank_lines_separate_documents_of_a_plain_text(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "one\ntwo\n\n \n\nthree\r\n\r\nfour")
    assert texts(path) == ["one\ntwo", "three", "four"]


def test_a_separator_line_anywhere_makes_blank_lines_part_of_the_text(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "one\n\ntwo\n<|endoftext|>\n\n<|endoftext|>\nthree\n")
    assert texts(path) == ["one\n\ntwo", "three"]


def test_a_separator_inside_a_line_is_text(tmp_path: Path) -> None:
    assert texts(write(tmp_path, "a.txt", "one<|endoftext|>\n\ntwo")) == ["one<|endoftext|>", "two"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert texts(write(tmp_path, "a.txt", b"\xef\xbb\xbfone")) == ["one"]


def test_json_lines_give_texts_conversations_ids_and_focus(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello there"}]
    lines = [{"text": "one", "label": 3}, {"messages": messages, "focus": [0, 5], "id": "m"}]
    path = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, lines)) + "\n\n")
    first, second = read_documents(path)
    assert first == Document(hashlib.sha256(b"one").hexdigest()[:16], "one", labels={"label": "3"})
    assert second == Document("m", None, tuple(messages), (0, 5))


def test_masks_and_strata_come_from_the_record(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello there"}]
    lines = [
        {"text": "one", "mask": [[0, 1], [2, 3]], "stratum": "short"},
        {"messages": messages, "mask": [[1, 6, 11]]},
    ]
    first, second = read_documents(write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, lines))))
    assert (first.mask, first.stratum) == (((0, 0, 1), (0, 2, 3)), "short")
    assert (second.mask, second.stratum) == (((1, 6, 11),), None)


def test_ids_follow_content_and_roles() -> None:
    one = Document.of_messages([{"role": "user", "content": "a"}])
    assert one.id == Document.of_messages([{"content": "a", "role": "user"}]).id
    assert one.id != Document.of_messages([{"role": "assistant", "content": "a"}]).id


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON"),
        ("[1]", "expected an object"),
        ('{"txt": "a"}', "fields found: txt"),
        ('{"text": "a", "messages": []}', "either"),
        ('{"text": 3}', "field text must be a string"),
        ('{"text": "\\ud800"}', "surrogate"),
        ('{"messages": []}', "at least one message"),
        ('{"messages": ["a"]}', "every message must be an object"),
        ('{"messages": [{"role": "user"}]}', "role and content"),
        ('{"text": "abc", "focus": [1, 4]}', "focus"),
        ('{"text": "abc", "focus": [2, 2]}', "focus"),
        ('{"text": "abc", "focus": "1-2"}', "focus"),
        ('{"text": "abc", "id": 7}', "id"),
        ('{"text": "abc", "stratum": 7}', "stratum must be a string"),
        ('{"text": "abc", "stratum": ""}', "stratum must not be empty"),
        ('{"text": "abc", "mask": [[1, 4]]}', r"mask must be a list of \[start, end\]"),
        ('{"text": "abc", "mask": [[0, 0, 2]]}', "mask"),
        ('{"text": "abc", "mask": [1, 2]}', "mask"),
        ('{"messages": [{"role": "a", "content": "b"}], "mask": [[0, 1]]}', r"\[message, start, end\]"),
        ('{"messages": [{"role": "a", "content": "b"}], "mask": [[1, 0, 1]]}', "mask"),
    ],
)
def test_a_wrong_line_is_named_with_its_number(tmp_path: Path, line: str, says: str) -> None:
    path = write(tmp_path, "a.jsonl", '{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=says) as caught:
        list(read_documents(path))
    assert "a.jsonl line 2" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_bytes_that_are_not_utf8_are_named(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name, b'{"text": "ok"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(UserError, match=r"line 2 is not UTF-8 \(byte 0xe9 at column 14\)"):
        list(read_documents(path))


@pytest.mark.parametrize("content", ["", "\n \n\n", "<|endoftext|>\n"])
def test_a_file_without_documents_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(UserError, match="no documents"):
        list(read_documents(write(tmp_path, "a.txt", content)))


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(UserError, match="is not a file"):
            list(read_documents(path))


def test_reading_is_lazy(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '{"text": "fine"}\nbroken\n')
    assert next(iter(read_documents(path))).text == "fine"


# --- compressed files, tables, datasets ---

RECORDS = [
    {"text": "one", "id": "a"},
    {
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}],
        "focus": [0, 5],
    },
    {"text": "three\n\nlines"},
]


def json_lines(records: list[dict[str, object]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


@pytest.mark.parametrize("compression", ["gz", "zst"])
def test_compressed_files_hold_the_same_documents(tmp_path: Path, compression: str) -> None:
    for name, data in (("a.jsonl", json_lines(RECORDS)), ("a.txt", b"one\n\ntwo\r\n")):
        plain, packed = write(tmp_path, name, data), tmp_path / f"{name}.{compression}"
        with pa.output_stream(str(packed), compression={"gz": "gzip", "zst": "zstd"}[compression]) as file:
            file.write(data)
        assert list(read_documents(packed)) == list(read_documents(plain))
        write(tmp_path, packed.name, packed.read_bytes()[:-5])
        with pytest.raises(UserError, match="cannot be read"):
            list(read_documents(packed))


def test_parquet_rows_are_the_documents_of_the_same_json_lines(tmp_path: Path) -> None:
    columns = [{name: record.get(name) for name in ("text", "messages", "id", "focus")} for record in RECORDS]
    table = pa.Table.from_pylist(columns)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    whole = list(read_documents(write(tmp_path, "a.jsonl", json_lines(RECORDS))))
    assert list(read_documents(tmp_path / "a.parquet")) == whole
    folder = tmp_path / "parts"
    (folder / "b").mkdir(parents=True)
    pq.write_table(table.slice(0, 1), folder / "0.parquet")
    pq.write_table(table, folder / "b" / "1.parquet")
    (folder / "notes.md").write_text("no data")
    assert list(read_documents(folder)) == whole[:1] + whole


def test_a_field_of_another_name_holds_the_text_or_the_messages(tmp_path: Path) -> None:
    rows = [{"body": "one", "talk": RECORDS[1]["messages"], "text": "other", "id": 7, "label": 1.5}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (body,) = read_documents(f"{tmp_path}/a.parquet#body")
    (talk,) = read_documents(Path(f"{tmp_path}/a.parquet#talk"))
    assert (body.text, body.id, talk.text, talk.messages) == ("one", "7", None, tuple(rows[0]["talk"]))
    lines = write(tmp_path, "a.jsonl", json_lines([{"body": "one"}, {"text": "two"}]))
    with pytest.raises(UserError, match=r"a.jsonl line 2: there is no field body \(fields found: text\)"):
        list(read_documents(f"{lines}#body"))
    with pytest.raises(UserError, match="has no field body"):
        list(read_documents(str(write(tmp_path, "a.txt", "one")) + "#body"))
    odd = write(tmp_path, "b#body.jsonl", json_lines(RECORDS))  # a file may have such a name
    assert len(list(read_documents(odd))) == 3


def test_a_table_without_the_column_is_refused_with_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"title": ["a"], "body": ["b"]}), path)
    with pytest.raises(UserError, match=r"no column text or messages; .*\(title, body\).*PATH#COLUMN"):
        list(read_documents(path))
    with pytest.raises(UserError, match=r"no column txt; .*\(title, body\)"):
        list(read_documents(f"{path}#txt"))
    pq.write_table(pa.table({"text": ["fine", None]}), path)
    with pytest.raises(UserError, match=r"a.parquet row 2: a document has either"):
        list(read_documents(path))
    pq.write_table(pa.table({"text": [1]}), path)
    with pytest.raises(UserError, match=r"row 1: the field text must be a string"):
        list(read_documents(path))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"no readable Parquet file"):
        list(read_documents(path))


def test_a_large_row_group_is_not_held_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rng = np.random.default_rng(0)
    long = [rng.bytes(10_000).hex() for _ in range(1000)]  # 20 MB in one row group
    pq.write_table(pa.table({"text": long, "other": long}), path, write_batch_size=16, use_dictionary=False)
    before = pa.total_allocated_bytes()
    most = max(pa.total_allocated_bytes() - before for _ in read_documents(path))
    assert most < 6_000_000


def test_a_dataset_folder_streams_the_same_documents(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="the extra unbraid[datasets] is not installed")
    (tmp_path / "data").mkdir()
    texts = [{"text": "one", "id": 1}, {"text": "two", "id": 2}]
    (tmp_path / "data" / "train.jsonl").write_bytes(json_lines(texts))
    (tmp_path / "data" / "test.jsonl").write_bytes(json_lines([{"text": "three", "id": 3}]))
    assert [(d.text, d.id) for d in read_documents(f"hf:{tmp_path}/data")] == [("one", "1"), ("two", "2")]
    assert [d.text for d in read_documents(f"hf:{tmp_path}/data:test#text")] == ["three"]
    with pytest.raises(UserError, match=r"no column body; .*\(text, id\)|no column body; .*\(id, text\)"):
        list(read_documents(f"hf:{tmp_path}/data#body"))
    with pytest.raises(UserError, match=r"cannot be read after row 0 \(ValueError") as caught:
        list(read_documents(f"hf:{tmp_path}/data:dev"))
    assert "\n" not in str(caught.value)


def test_a_datasets_own_code_is_never_run(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="the extra unbraid[datasets] is not installed")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "data.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match="cannot be read"):
        list(read_documents(f"hf:{folder}"))
    assert not (tmp_path / "ran").exists()


def test_datasets_missing_or_too_old_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'unbraid\[datasets\]'"):
        list(read_documents("hf:owner/name"))
    old = types.ModuleType("datasets")
    old.__version__ = "3.6.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", old)
    with pytest.raises(UserError, match=r"datasets 3.6.0 would run code"):
        list(read_documents("hf:owner/name"))


@pytest.mark.parametrize("name", ["hf:", "hf:name", "hf:a/b/c/d", "hf:/nowhere/at/all", "hf:a//b"])
def test_what_names_no_dataset_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="names no dataset"):
        list(read_documents(name))


def test_labels_and_concepts_come_from_the_record(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello there"}]
    lines: list[dict[str, object]] = [
        {"text": "one", "labels": {"topic": "refund", "angry": True, "n": 2, "score": 0.5}, "label": "x"},
        {"messages": messages, "concepts": [[1, "greeting", 0, 5], [0, "hi", 0, 2]]},
        {"text": "two", "concepts": [["number", 0, 3]], "labels": ["not", "ours"]},
        {"text": "three", "label": 1.5, "concepts": ["not", "ours"]},
    ]
    found = list(read_documents(write(tmp_path, "a.jsonl", json_lines(lines))))
    assert found[0].labels == {"label": "x", "topic": "refund", "angry": "true", "n": "2"}
    assert found[1].concepts == ((1, "greeting", 0, 5), (0, "hi", 0, 2)) and not found[1].labels
    assert found[2].concepts == ((0, "number", 0, 3),) and not found[2].labels
    assert not found[3].concepts and not found[3].labels


@pytest.mark.parametrize("concept", [["", 0, 1], ["a", 0, 4], ["a", 2, 2], ["a", 0], [0, "a", 0, 1]])
def test_a_concept_outside_its_text_is_refused(tmp_path: Path, concept: list[object]) -> None:
    path = write(tmp_path, "a.jsonl", json_lines([{"text": "one", "concepts": [concept]}]))
    with pytest.raises(UserError, match=r"line 1: the field concepts must be a list of \[name, start, end\]"):
        list(read_documents(path))
