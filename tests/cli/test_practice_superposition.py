"""`unbraid practice superposition`: the table, the page and the numbers behind it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unbraid.cli import main
from unbraid.manifest.record import check_files
from unbraid.recipes import superposition


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        superposition, "toy_models", lambda seed: [superposition.Toy(1.0, ((1.0, 0.0),), 0.1)]
    )


def test_it_prints_a_table_and_writes_a_page_that_loads_nothing(quick, tmp_path: Path, capsys) -> None:
    out = tmp_path / "toy"
    assert main(["practice", "superposition", "--out", str(out), "--seeds", "1", "--steps", "5"]) == 0
    assert check_files(out).kind == "superposition"
    rows = json.loads((out / "summary.json").read_text())["recovered"]
    assert len(rows) == len(superposition.ACTIVE) * 4
    assert all(r["found"]["low"] <= r["found"]["mean"] <= r["found"]["high"] for r in rows)
    page = (out / "superposition.html").read_text()
    assert page.count("<svg") >= 11 and "default-src 'none'" in page
    assert not any(bad in page for bad in ("<script", "http:", "https:", "<link", "<img", "@import"))
    printed = capsys.readouterr().out
    assert "Matryoshka" in printed and f"{rows[0]['cosine']['mean']:.2f}" in printed
    assert main(["practice", "superposition", "--out", str(out)]) == 2


@pytest.mark.parametrize("wrong", [("--seeds", "0"), ("--steps", "0"), ("--seed", "-1")])
def test_wrong_numbers_are_named(wrong: tuple[str, str], tmp_path: Path, capsys) -> None:
    assert main(["practice", "superposition", "--out", str(tmp_path / "x"), *wrong]) == 2
    assert wrong[0] in capsys.readouterr().err and not (tmp_path / "x").exists()
