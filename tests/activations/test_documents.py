"""Reading corpus files: what becomes a document, and what is refused in one sentence."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

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
    assert first == Document(hashlib.sha256(b"one").hexdigest()[:16], "one", None, None)
    assert second == Document("m", None, tuple(messages), (0, 5))


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
