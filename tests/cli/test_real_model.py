"""capture, train, evaluate, index: the commands of the README on a real model and real text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from unbraid.features.page import Index
from unbraid.manifest.lineage import verify


def unbraid(*words: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "unbraid.cli", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_spine_of_commands(tmp_path: Path, shared_models: Path, shared_data: Path) -> None:
    model, site = str(shared_models / "stories260k"), "layers.2.resid_post"
    train, held_out = (str(shared_data / "tinystories" / f"{n}.txt") for n in ("train", "valid"))
    acts, sae, index = (str(tmp_path / n) for n in ("acts", "sae", "index"))
    unbraid("capture", "--model", model, "--site", site, "--text", train, "--tokens", "60000", "--out", acts)
    unbraid("train", "--activations", acts, "--arch", "topk", "--k", "16", "--width", "512", "--steps", "300",
            "--batch-size", "1024", "--out", sae)  # fmt: skip
    found = json.loads(
        unbraid("evaluate", "--sae", sae, "--model", model, "--text", held_out, "--tokens", "8000", "--json")
    )
    metrics = found["metrics"]
    assert metrics["fvu"]["value"] < 0.2 and metrics["l0"]["value"] == pytest.approx(16, abs=0.1)
    assert 0 < metrics["delta_ce"]["value"] < 0.5 and metrics["recovered_mean"]["value"] > 0.8
    unbraid("index", "--sae", sae, "--model", model, "--text", held_out, "--tokens", "8000", "--out", index)
    densities = Index(Path(index)).densities
    page = Index(Path(index)).latent(int(densities.argmax()))
    assert page.count > 0 and page.top and page.promoted
    assert not verify(tmp_path).problems
