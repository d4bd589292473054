"""Thresholds that fire as often as the top k did."""

from __future__ import annotations

import torch

from unbraid.sae.base import SAEConfig
from unbraid.sae.batchtopk import BatchTopKSAE
from unbraid.sae.jumprelu import JumpReLUSAE
from unbraid.sae.topk import TopKSAE
from unbraid.training.calibrate import calibrate


def _batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(400, 16, generator=generator) for _ in range(5)]


def _fill(sae: TopKSAE | BatchTopKSAE) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in sae.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) / 3)
        sae.b_enc[3] = -100.0  # a latent that never comes near


def test_a_topk_latent_fires_by_threshold_as_often_as_by_rank() -> None:
    sae = TopKSAE(SAEConfig("topk", 16, 80, 5))
    _fill(sae)
    found = calibrate(sae, _batches())
    x = torch.cat(_batches())
    by_rank = (sae.encode_dense(x) > 0).sum(dim=0)
    assert sae.threshold is not None
    by_threshold = (sae.pre_activations(x) > sae.threshold).sum(dim=0)
    near = by_rank > 0
    # A latent is above its threshold without being among the first 4k at a few tokens only.
    assert (by_threshold - by_rank)[near].abs().max() <= 2
    assert torch.equal(found.frequency, by_rank.double() / len(x))
    assert found.tokens == len(x) and found.l0 == float(by_rank.sum()) / len(x)
    assert by_threshold[3] == 0 and torch.isfinite(sae.threshold).all() and (sae.threshold >= 0).all()


def test_batchtopk_becomes_a_jumprelu_that_fires_k_on_average() -> None:
    sae = BatchTopKSAE(SAEConfig("batchtopk", 16, 80, 5))
    _fill(sae)
    found = calibrate(sae, _batches())
    assert isinstance(found.sae, JumpReLUSAE)
    assert abs(found.l0 - 5) < 0.1
    fresh = torch.randn(4000, 16, generator=torch.Generator().manual_seed(9))
    assert abs(float(found.sae.encode(fresh).l0().double().mean()) - 5) < 0.2
