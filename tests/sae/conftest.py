"""Autoencoders with random weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.registry import ARCHITECTURES, build


def _random_sae(architecture: str, d_in: int = 12, d_sae: int = 64, k: int = 4, seed: int = 0) -> SAE:
    sae = build(
        SAEConfig(
            architecture,
            d_in,
            d_sae,
            k if ARCHITECTURES[architecture].uses_k else 0,
            site="layers.1.resid_post",
            model_name="tiny",
            model_id="0" * 64,
        )
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in sae.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) / 2)
        if sae.threshold is not None:
            sae.threshold.copy_(torch.rand(d_sae, generator=generator))
    return sae


@pytest.fixture(scope="session")
def random_sae() -> Callable[..., SAE]:
    """Builds an autoencoder of an architecture with random weights, the same for the same seed."""
    return _random_sae
