"""`unbraid verify`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unbraid.cli import main
from unbraid.manifest.record import write_manifest


@pytest.fixture
def artifacts(tmp_path: Path) -> Path:
    for name in ("acts", "sae"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.bin").write_bytes(name.encode() * 100)
        write_manifest(tmp_path / name, kind=name, command="", seed=0, inputs={"model": "ef" * 32}, facts={})
    return tmp_path


def test_what_fits_is_listed(artifacts: Path, capsys) -> None:
    assert main(["verify", str(artifacts)]) == 0
    out = capsys.readouterr().out
    assert out.count("fits") == 2 and "acts" in out and "efefefefefef" in out


def test_a_flipped_byte_exits_with_one_and_names_the_file(artifacts: Path, capsys) -> None:
    path = artifacts / "sae" / "data.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert main(["verify", str(artifacts)]) == 1
    printed = capsys.readouterr()
    assert "does not fit" in printed.out
    last = printed.err.splitlines()[-1]
    assert last.startswith(f"unbraid: {path} was changed")


def test_json_for_machines(artifacts: Path, capsys) -> None:
    assert main(["verify", str(artifacts), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [a["path"] for a in report["artifacts"]] == ["acts", "sae"]
    assert report["problems"] == []
    (artifacts / "acts" / "data.bin").unlink()
    assert main(["verify", str(artifacts), "--json"]) == 1
    assert "is missing" in json.loads(capsys.readouterr().out)["problems"][0]


def test_an_empty_folder_is_the_users_mistake(tmp_path: Path, capsys) -> None:
    assert main(["verify", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
