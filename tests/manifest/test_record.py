"""Manifests: what is written is read, and whatever changes afterwards is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unbraid.manifest.errors import IntegrityError, UserError
from unbraid.manifest.record import MANIFEST, check_files, read_manifest, write_manifest

CONTENT = {"a.bin": bytes(range(64)), "sub/b.txt": b"some text", "log.jsonl": b'{"step": 1}\n', "empty": b""}


def _artifact(folder: Path, **changes: Any) -> Path:
    for name, data in CONTENT.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    facts = {"kind": "activations", "command": "unbraid capture", "seed": 0, "inputs": {"model": "ab" * 32}}
    write_manifest(folder, **{**facts, "facts": {"tokens": 64, "sites": ("x",)}, **changes})
    return folder


def test_what_is_written_is_read(tmp_path: Path) -> None:
    folder = _artifact(tmp_path)
    written = write_manifest(
        folder,
        kind="sae",
        command="c",
        seed=None,
        inputs={},
        facts={"t": (1, 2)},
        paths={"up": tmp_path.parent},
    )
    assert read_manifest(folder, kind="sae") == written
    assert written.facts == {"t": [1, 2]}
    assert written.paths == {"up": ".."}
    assert set(written.files) == set(CONTENT)
    assert json.loads((folder / MANIFEST).read_text()) == written.as_dict()
    assert check_files(folder) == written


def test_the_id_depends_on_content_and_not_on_place_or_time(tmp_path: Path) -> None:
    one = read_manifest(_artifact(tmp_path / "one"))
    two = read_manifest(
        _artifact(
            tmp_path / "two", paths={"model": tmp_path}, facts={"tokens": 64, "sites": ["x"], "time": 5}
        )
    )
    other = read_manifest(_artifact(tmp_path / "three", seed=1))
    assert one.id == two.id != other.id


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_byte_is_always_named(tmp_path: Path, data: st.DataObject) -> None:
    folder = _artifact(tmp_path)
    name = data.draw(st.sampled_from([*(n for n, content in CONTENT.items() if content), MANIFEST]))
    raw = bytearray((folder / name).read_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    if name == MANIFEST and _same_json(bytes(raw), (folder / name).read_bytes()):
        return  # only the blank space between its words changed
    (folder / name).write_bytes(raw)
    with pytest.raises((IntegrityError, UserError), match=name.replace(".", r"\.")):
        check_files(folder)


def _same_json(one: bytes, two: bytes) -> bool:
    try:
        return json.loads(one) == json.loads(two)
    except ValueError:
        return False


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda f: (f / "a.bin").unlink(), "a.bin is missing"),
        (lambda f: (f / "zzz").write_text("x"), "zzz is not listed"),
        (lambda f: (f / "sub/b.txt").write_text("short"), "b.txt has 5 bytes where its manifest lists 9"),
        (lambda f: (f / "sub/b.txt").write_text("same size"), "b.txt was changed"),
    ],
)
def test_each_kind_of_harm_has_its_own_words(tmp_path: Path, harm: Any, words: str) -> None:
    folder = _artifact(tmp_path)
    harm(folder)
    with pytest.raises(IntegrityError, match=words):
        check_files(folder)


def _rewrite(folder: Path, **changes: Any) -> None:
    record = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**record, **changes}))


def test_a_reworded_manifest_does_not_match_its_id(tmp_path: Path) -> None:
    folder = _artifact(tmp_path)
    _rewrite(folder, facts={"tokens": 65, "sites": ["x"]})
    with pytest.raises(IntegrityError, match=r"manifest\.json was changed"):
        read_manifest(folder)


def test_a_manifest_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    from unbraid.manifest.identity import content_id

    folder = _artifact(tmp_path)
    record = json.loads((folder / MANIFEST).read_text())
    record["files"]["../secret"] = record["files"]["a.bin"]
    record["id"] = content_id(record)
    (folder / MANIFEST).write_text(json.dumps(record))
    with pytest.raises(IntegrityError, match="no path inside the folder"):
        read_manifest(folder)


@pytest.mark.parametrize(
    "content", ["{}", "[1]", "null", '{"id": "x", "facts": NaN}', '{"files": [{"a": "b"}]}']
)
def test_json_that_is_no_manifest(tmp_path: Path, content: str) -> None:
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(IntegrityError, match=r"manifest\.json"):
        read_manifest(tmp_path)


def test_the_users_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not an artifact of kind sae"):
        read_manifest(tmp_path / "nowhere", kind="sae")
    (tmp_path / MANIFEST).write_text("{not json")
    with pytest.raises(UserError, match="is not JSON"):
        read_manifest(tmp_path)
    folder = _artifact(tmp_path / "acts")
    with pytest.raises(UserError, match="is of kind activations, not sae"):
        read_manifest(folder, kind="sae")
    _rewrite(folder, schema=2)
    with pytest.raises(UserError, match="newer than this unbraid reads"):
        read_manifest(folder)


def test_what_an_id_would_leave_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "time").write_text("x")
    with pytest.raises(ValueError, match="'time'"):
        write_manifest(tmp_path, kind="k", command="", seed=0, inputs={}, facts={})
    with pytest.raises(ValueError):
        write_manifest(
            tmp_path / "none", kind="k", command="", seed=0, inputs={}, facts={"fvu": float("nan")}
        )
