"""The commands of the README on a real model and real text: capture, train, evaluate, index."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import unbraid
from unbraid.features.page import Index
from unbraid.manifest.record import check_files, read_manifest
from unbraid.sae.base import SAE

SITE = "layers.2.resid_post"


def _unbraid(*words: str | Path, code: int = 0) -> str:
    """Run the command line in a process of its own; returns what it printed (stderr when it should fail)."""
    environment = os.environ | {"PYTHONPATH": str(Path(unbraid.__file__).parents[1]), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-m", "unbraid", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1500)
    assert done.returncode == code, done.stderr
    return done.stderr if code else done.stdout


@pytest.fixture(scope="module")
def spine(
    shared_models: Path, shared_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A folder with acts and sae, and what evaluate said."""
    folder = tmp_path_factory.mktemp("spine")
    model, text = shared_models / "stories260k", shared_data / "tinystories"
    source = ("--model", model, "--text", text / "train.txt")
    _unbraid("capture", *source, "--site", SITE, "--tokens", "16000", "--out", folder / "acts")
    _unbraid(
        *("train", "--activations", folder / "acts", "--arch", "topk", "--k", "16", "--width", "512"),
        *("--steps", "150", "--batch-size", "1024", "--calibration-tokens", "16384", "--out", folder / "sae"),
    )
    told = _unbraid(
        *("evaluate", "--sae", folder / "sae", "--model", model, "--text", text / "valid.txt"),
        *("--tokens", "4000", "--json"),
    )
    return folder, json.loads(told)


def test_the_autoencoder_describes_text_it_has_not_seen(spine: tuple[Path, dict[str, Any]]) -> None:
    _, told = spine
    value = {name: found["value"] for name, found in told["metrics"].items()}
    assert told["tokens"] == 4000 and told["site"] == SITE
    assert value["fvu"] < 0.15 and 15 < value["l0"] <= 16
    assert value["recovered_zero"] > 0.9 and value["recovered_mean"] > 0.9
    assert 0 < value["delta_ce"] < 0.5 and 0.8 < value["ce_clean"] < 2.0
    assert value["ce_clean"] < value["ce_sae"] < min(value["ce_zero"], value["ce_mean"])
    for found in told["metrics"].values():
        assert found["low"] <= found["value"] <= found["high"]


def test_the_artifacts_name_what_they_came_from(spine: tuple[Path, dict[str, Any]]) -> None:
    folder, told = spine
    activations, sae = read_manifest(folder / "acts"), check_files(folder / "sae")
    assert sae.inputs == {"activations": activations.id} and told["sae_id"] == sae.id
    assert sae.facts["model_id"] == activations.inputs["model"] == told["model_id"]
    assert SAE.from_pretrained(folder / "sae").config.model_id == told["model_id"]
    assert sae.made_by.command.startswith("unbraid train --activations ")
    assert "--steps 150 --batch-size 1024" in sae.made_by.command
    assert _unbraid("verify", folder)


def test_the_index_shows_where_latents_fire(
    spine: tuple[Path, dict[str, Any]], shared_models: Path, shared_data: Path, tmp_path: Path
) -> None:
    folder, _ = spine
    text = shared_data / "tinystories" / "valid.txt"
    _unbraid(
        *("index", "--sae", folder / "sae", "--model", shared_models / "stories260k", "--text", text),
        *("--tokens", "4000", "--out", tmp_path / "index"),
    )
    index = Index(tmp_path / "index")
    page = index.latent(int(index.densities.argmax()))
    assert page.count > 0 and page.top and page.promoted


def test_mistakes_are_one_sentence_and_exit_code_2(
    spine: tuple[Path, dict[str, Any]], shared_models: Path, shared_data: Path, tmp_path: Path
) -> None:
    folder, _ = spine
    words = ("train", "--activations", folder / "acts", "--out")
    assert "k is 20" in _unbraid(*words, tmp_path / "a", "--width", "10", "--k", "20", code=2)
    assert "exists already" in _unbraid(*words, folder / "sae", code=2)
    told = _unbraid("train", "--activations", folder / "sae", "--out", tmp_path / "a", code=2)
    assert "kind sae, not activations" in told and told.count("\n") == 1
    model, text = shared_models / "tinystories-656k", shared_data / "tinystories" / "valid.txt"
    told = _unbraid("evaluate", "--sae", folder / "sae", "--model", model, "--text", text, code=2)
    assert "trained on" in told


def test_a_sweep_compares_on_text_it_has_not_seen(
    spine: tuple[Path, dict[str, Any]], shared_models: Path, shared_data: Path
) -> None:
    folder, _ = spine
    told = _unbraid(
        *("sweep", "--activations", folder / "acts", "--model", shared_models / "stories260k"),
        *("--text", shared_data / "tinystories" / "valid.txt", "--tokens", "1500", "--out", folder / "sweep"),
        *("--arch", "topk", "batchtopk", "--k", "8", "16", "--width", "256", "--seed", "0"),
        *("--steps", "60", "--batch-size", "512", "--calibration-tokens", "4096", "--json"),
    )
    points = {point["point"]: point for point in json.loads(told)["points"]}
    assert set(points) == {f"{arch}-w256-k{k}" for arch in ("topk", "batchtopk") for k in (8, 16)}
    fvu = {name: point["metrics"]["fvu"]["value"] for name, point in points.items()}
    assert 0 < fvu["topk-w256-k16"] < fvu["topk-w256-k8"] < 0.6
    assert points["topk-w256-k8"]["metrics"]["l0"]["value"] == 8
    assert _unbraid("verify", folder / "sweep")
