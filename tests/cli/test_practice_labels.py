"""`unbraid practice labels`: what it prints of a report, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from unbraid.cli import main, planted_labels
from unbraid.recipes.labels import LabelReport, Ranking
from unbraid.recipes.planted_search import Way
from unbraid.stats.bootstrap import rate

NAMES = ("detection", "fuzzing", "simulation", "together", "surprisal", "intervention")
REPORT = LabelReport(
    judge="lexical",
    concepts=60,
    standing_out=40,
    pure=3,
    ways={
        "find": Way({"drug": True, "town": False}, rate([True, False]), 0.25),
        "label": Way({"drug": True, "town": True}, rate([True, True]), None),
    },
    rankings=tuple(
        Ranking(
            name,
            latent,
            0.9,
            "x",
            dict.fromkeys(NAMES, above),
            dict.fromkeys(NAMES, 20),
            {},
            dict.fromkeys(NAMES, 1.0),
        )
        for name, latent, above in (("drug", 7, 20), ("town", 8, 19))
    ),
    first=dict.fromkeys(NAMES, rate([True, False])),
    labellers={
        "lexical": {"detection": rate([True, True]).as_dict(), "values": [1, 1], "labelled": 2, "latents": 2}
    },
    notes=("1 concepts with a pure latent have no description: mode",),
)


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    def given(*_: Any, **options: Any) -> LabelReport:
        assert options["count"] == 30 and options["seed"] == 4
        return REPORT

    monkeypatch.setattr(planted_labels, "practice_labels", given)
    monkeypatch.setattr(planted_labels, "open_sae", lambda *_: (None, "an id"))
    words = ["practice", "labels", "--sae", str(tmp_path / "sae"), "--out", str(tmp_path / "out")]
    return [*words, "--conversations", "30", "--seed", "4"]


def test_each_number_is_printed_with_its_interval(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(words) == 0
    said = capsys.readouterr().out
    assert (
        "of 60 planted concepts 40 have a latent that stands out, 3 of these a pure one (0.8 or more" in said
    )
    drug, town = ([line.split() for line in said.splitlines() if f" {n} " in line] for n in ("drug", "town"))
    assert (
        drug[0] == ["│", "drug", "│", "7", "│", "0.90", "│", "yes", "│", "yes", "│"]
        and "–" in town[0]
        and "…" not in said
    )
    assert drug[1].count("20/20") == 4 and town[1].count("19/20") == 4 and len(drug) == len(town) == 3
    assert "detection: above all of them for 1 of 2 concepts, 50% (9% to 91%), judged by the lexical" in said
    assert "surprisal: above all of them for 1 of 2 concepts, 50% (9% to 91%)\n" in said
    assert (
        "found by find, in the first 10: 1 of 2 concepts, 50% (9% to 91%); of unrelated concepts' latents 25%"
        in said
    )
    assert "found by label, in the first 10: 2 of 2 concepts, 100% (34% to 100%)\n" in said
    assert "labels by lexical: detection 1.00 (0.34 to 1.00) over 2 latents" in said and "mode" in said


def test_the_record_holds_all_of_it(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["concepts"], record["standing_out"], record["pure"]) == (60, 40, 3)
    assert record["ways"]["find"]["found"] == {"drug": True, "town": False}
    assert record["ways"]["find"]["share"]["n"] == 2 and record["sae_id"] == "an id"
    assert record["rankings"][1]["above"]["detection"] == 19 and record["first"]["fuzzing"]["value"] == 0.5


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--conversations", "0"], "--conversations must be 1 or more"),
        (["--embedding-model", "nowhere"], "holds no embedding model"),
        (["--model-name", "small"], "--base-url"),
    ],
)
def test_mistakes_are_named(
    words: list[str], more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, *more]) == 2
    assert said in capsys.readouterr().err
