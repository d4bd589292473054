"""The losses against their formulas, and that dead latents come back."""

from __future__ import annotations

import pytest
import torch

from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.objective import StepContext
from unbraid.sae.registry import build

D_IN, D_SAE, K = 8, 40, 3


NONE_DEAD = torch.zeros(D_SAE, dtype=torch.bool)


def _sae(architecture: str, **options: object) -> SAE:
    sae = build(SAEConfig(architecture, D_IN, D_SAE, 0 if architecture == "relu" else K, options=options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in sae.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) / 3)
        sae.b_dec.zero_()
    return sae


def _x(n: int = 600) -> torch.Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(2))


def _gradients(sae: SAE) -> list[torch.Tensor]:
    return [value.grad.clone() for value in sae.parameters() if value.grad is not None]


def test_relu_adds_up_chunks_to_the_loss_of_the_batch() -> None:
    sae, x = _sae("relu", l1=1.4), _x(1100)
    report = sae.backward(x, x, StepContext(NONE_DEAD, ramp=0.5))
    ours = _gradients(sae)
    sae.zero_grad()
    codes = sae.pre_activations(x).relu()
    error = (x - (codes @ sae.W_dec + sae.b_dec)).square().sum()
    ((error + 0.7 * (codes * sae.W_dec.norm(dim=1)).sum()) / x.numel()).backward()
    for mine, theirs in zip(ours, _gradients(sae), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(report.squared_error, error.detach())
    assert torch.equal(report.fired, (codes > 0).any(dim=0))
    assert int(report.active) == int((codes > 0).sum())


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_the_auxiliary_loss_lets_the_dead_describe_the_error(architecture: str) -> None:
    sae, x = _sae(architecture), _x()
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[10:30] = True
    with torch.no_grad():
        sae.W_enc[:, dead] *= 0.03  # too weak for the top k, yet above 0 at half of the tokens
        sae.b_enc[dead] = 0.0
    report = sae.backward(x, x, StepContext(dead))
    assert not report.fired[dead].any()
    assert sae.W_dec.grad is not None and not sae.W_dec.grad[dead].any()
    plain = _gradients(sae)
    sae.zero_grad()
    sae.backward(x, x, StepContext(dead, auxk_alpha=1 / 32))
    ours = _gradients(sae)

    sae.zero_grad()
    output = sae(x)
    error = x - output.x_hat
    pre = sae.pre_activations(x).masked_fill(~dead, -torch.inf)
    chosen = pre.topk(D_IN // 2, dim=1)
    codes = torch.zeros_like(pre).scatter(1, chosen.indices, chosen.values.relu())
    rest = error.detach()
    auxiliary = (rest - codes @ sae.W_dec).square().sum() / rest.square().sum()
    (error.square().mean() + auxiliary / 32).backward()
    for mine, theirs in zip(ours, _gradients(sae), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    assert any(not torch.equal(a, b) for a, b in zip(plain, ours, strict=True))
