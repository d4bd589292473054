from __future__ import annotations

import json
from pathlib import Path

import pytest

from unbraid.manifest.errors import IntegrityError, UserError
from unbraid.recipes.prompts import SHARES, from_files, prompt_hash, read_prompts, write_prompts


def write(path: Path, texts: list[str]) -> Path:
    records = [{"messages": [{"role": "user", "content": t}], "incident": "bad"} for t in texts]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return (
        write(tmp_path / "probes.jsonl", [f"probe {i}" for i in range(300)]),
        write(tmp_path / "benign.jsonl", [f"harmless {i}" for i in range(300)]),
    )


def test_every_prompt_falls_into_exactly_one_split(files: tuple[Path, Path]) -> None:
    source = from_files(*files)
    hashes = {s: {prompt_hash(r) for part in source(s) for r in part} for s in SHARES}  # type: ignore[arg-type]
    assert sum(map(len, hashes.values())) == 600
    assert len(set.union(*hashes.values())) == 600
    assert all(len(h) > 60 for h in hashes.values())


def test_the_split_depends_on_the_text_alone(tmp_path: Path, files: tuple[Path, Path]) -> None:
    lines = files[0].read_text().splitlines()
    turned = tmp_path / "turned.jsonl"
    turned.write_text("\n".join(reversed(lines)) + "\n")
    a, b = from_files(*files)("test")[0], from_files(turned, files[1])("test")[0]
    assert {prompt_hash(r) for r in a} == {prompt_hash(r) for r in b}


def test_prompts_are_an_artifact_that_notices_a_changed_byte(
    tmp_path: Path, files: tuple[Path, Path]
) -> None:
    folder = tmp_path / "select"
    written = write_prompts(from_files(*files), "select", folder, command="x", seed=0)
    assert written.manifest.facts["split"] == "select"
    assert read_prompts(folder).probes == written.probes
    path = folder / "probes.jsonl"
    path.write_bytes(path.read_bytes().replace(b"probe 1", b"probe 2", 1))
    with pytest.raises(IntegrityError, match=r"probes\.jsonl"):
        read_prompts(folder)


def test_too_few_prompts_are_refused_with_what_to_do(tmp_path: Path, files: tuple[Path, Path]) -> None:
    few = write(tmp_path / "few.jsonl", ["a", "b"])
    with pytest.raises(UserError, match=r"few\.jsonl .* give at least 200"):
        from_files(files[0], few)


def test_a_wrong_line_is_named(tmp_path: Path, files: tuple[Path, Path]) -> None:
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"messages": [{"role": "user", "content": "x"}], "incident": "("}\n')
    with pytest.raises(UserError, match=r"line 1.*incident"):
        from_files(wrong, files[1])
