"""`unbraid practice planted` and `judge`: from a world to a table with floor and ceiling."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unbraid.cli import main
from unbraid.evaluation import truth
from unbraid.evaluation.truth import DEFINITIONS

PLANT = ["practice", "planted", "--features", "40", "--d-in", "16", "--samples", "3000"]
TRAIN = [
    "--arch",
    "topk",
    "--k",
    "2",
    "--width",
    "16",
    "--steps",
    "30",
    "--batch-size",
    "128",
    "--lr",
    "0.003",
]


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A world and an autoencoder that learned a little of it."""
    fit = truth.probe
    monkeypatch.setattr(truth, "probe", lambda world, width, n, _: fit(world, width, n, 4096))
    world, sae = tmp_path / "world", tmp_path / "sae"
    assert main([*PLANT, "--out", str(world)]) == 0
    assert main(["train", "--activations", str(world), "--out", str(sae), *TRAIN]) == 0
    return world, sae


def test_a_stranger_plants_trains_and_judges(folders: tuple[Path, Path], capsys) -> None:
    world, sae = folders
    capsys.readouterr()
    command = ["practice", "judge", "--world", str(world), "--sae", str(sae), "--samples", "2048"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    named = (
        "untrained",
        "random directions",
        "autoencoder",
        "true dictionary",
        "logistic probes",
        "DiffMean",
    )
    for line in (*named, "predict none", "neurons", "PCA", "fresh ones", *DEFINITIONS):
        assert line in printed
    assert "…" not in printed
    assert all(f"{name}: {d.meaning}" in printed for name, d in DEFINITIONS.items())
    assert main([*command, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row["metrics"] for row in record["rows"]}
    assert list(rows)[:6] == ["predict none", "neurons", "PCA", "DiffMean", "untrained", "random directions"]
    assert list(rows)[6:] == [str(sae), "true dictionary", "logistic probes"]
    assert rows["predict none"]["f1"]["value"] == 0 < rows["neurons"]["f1"]["value"]
    assert rows["untrained"]["f1"]["n"] == 3 and rows[str(sae)]["f1"]["n"] == 1
    assert "mcc" not in rows["logistic probes"]
    assert rows["true dictionary"]["mcc"]["value"] == pytest.approx(1, abs=1e-6)
    assert record["definitions"]["f1"]["id"] == DEFINITIONS["f1"].id and len(record["world_id"]) == 64


def test_an_autoencoder_of_another_world_and_no_world_are_refused(
    folders: tuple[Path, Path], tmp_path: Path, capsys
) -> None:
    world, sae = folders
    other = tmp_path / "other"
    assert main([*PLANT, "--seed", "1", "--out", str(other)]) == 0
    assert main(["practice", "judge", "--world", str(other), "--sae", str(sae)]) == 2
    assert "name the world that it was trained on" in capsys.readouterr().err
    assert main(["practice", "judge", "--world", str(sae), "--sae", str(sae)]) == 2
    assert main(["practice", "judge", "--world", str(world), "--sae", str(sae), "--samples", "0"]) == 2
    assert "--samples is 0" in capsys.readouterr().err
    assert main([*PLANT, "--out", str(world)]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", [("--features", "0"), ("--samples", "0"), ("--seed", "-1"), ("--d-in", "0")]
)
def test_wrong_numbers_are_named(wrong: tuple[str, str], tmp_path: Path, capsys) -> None:
    assert main(["practice", "planted", "--out", str(tmp_path / "x"), *wrong]) == 2
    named = wrong[0].lstrip("-").replace("-", "_")
    assert named in capsys.readouterr().err.replace("--", "") and not (tmp_path / "x").exists()
