"""A guarded tiny model: autoencoder, gate and policy as artifacts in one folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unbraid.control.gate import save_gate
from unbraid.control.policy import (
    Policy,
    PolicyEdit,
    PolicyGate,
    PolicyModel,
    PolicySAE,
    Title,
    write_policy,
)
from unbraid.manifest.record import write_manifest
from unbraid.model.edits import Gate
from unbraid.model.load import LanguageModel, load_model
from unbraid.model.sites import Site
from unbraid.sae.base import SAEConfig
from unbraid.sae.registry import build

SITE = Site(1, "resid_post")
D_SAE = 24


@dataclass(frozen=True)
class World:
    """Where the artifacts of a test lie, and the policy that names them."""

    root: Path
    lm: LanguageModel
    policy: Policy

    def write(self, name: str = "policy", **changes: Any) -> Path:
        """Write the policy with these changes as an artifact; returns the path of its policy.yaml."""
        write_policy(replace(self.policy, **changes), self.root / name)
        return self.root / name / "policy.yaml"

    def gate(self, name: str, threshold: float) -> PolicyGate:
        """Write a gate with this threshold and a bias of zero; returns what a policy says about it."""
        weight = np.zeros(self.lm.d_in, dtype=np.float32)
        gate = Gate(site=SITE, weight=weight, bias=0.0, threshold=threshold, name=name)
        manifest = save_gate(gate, self.root / name, model_id=self.lm.id, facts={})
        return PolicyGate(path=f"../{name}", id=manifest.id)


@pytest.fixture(scope="session")
def lm(tiny_llama: Path) -> LanguageModel:
    return load_model(tiny_llama)


@pytest.fixture(scope="session")
def sae_folder(lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = SAEConfig("jumprelu", d_in=lm.d_in, d_sae=D_SAE, site=str(SITE), model_id=lm.id)
    sae = build(config)
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=noise))
        if sae.threshold is not None:
            sae.threshold.fill_(0.5)
    folder = tmp_path_factory.mktemp("artifacts") / "sae"
    folder.mkdir()
    sae.save_pretrained(folder)
    write_manifest(folder, kind="sae", command="", seed=3, inputs={"model": lm.id}, facts={})
    return folder


@pytest.fixture
def world(lm: LanguageModel, sae_folder: Path, tmp_path: Path) -> World:
    from unbraid.manifest.record import read_manifest

    shutil.copytree(sae_folder, tmp_path / "sae")
    policy = Policy(
        policy=Title("test-policy"),
        model=PolicyModel(name=lm.name, id=lm.id, tokenizer_id=lm.tokenizer_id),
        sae=PolicySAE(path="../sae", id=read_manifest(tmp_path / "sae").id, site=str(SITE)),
        edits=(PolicyEdit(latents=(3, 7), operation="add", value=2.0, thresholds=(-1e9, -1e9)),),
        findings=("a" * 64,),
    )
    return World(tmp_path, lm, policy)


@pytest.fixture
def flip() -> Callable[[Path, int], None]:
    """Flips the lowest bit of one byte of a file (negative places count from the end)."""

    def apply(path: Path, place: int) -> None:
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(data)

    return apply
