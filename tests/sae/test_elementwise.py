"""ReLU, JumpReLU and Gated: codes and gradients against their formulas, written out densely."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unbraid.sae import elementwise
from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.objective import StepContext
from unbraid.sae.registry import build

SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(1, 50), st.integers(0, 10_000))
JUMPRELU = [
    {},
    {"through_encoder": True, "bandwidth": 1.0},
    {"penalty": "tanh", "through_encoder": True, "bandwidth": 2.0, "pre_act": 0.1},
]


def _sae(
    architecture: str, d_in: int, d_sae: int, seed: int, **options: object
) -> tuple[SAE, torch.Generator]:
    sae = build(SAEConfig(architecture, d_in, d_sae, options=options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in sae.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) / 2)
        if architecture.endswith("jumprelu"):
            assert sae.threshold is not None
            sae.threshold.abs_()
    return sae, generator


def _gradients(sae: SAE) -> dict[str, Tensor]:
    found = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in sae.named_parameters()
    }
    sae.zero_grad()
    return found


def _compare(sae: SAE, x: Tensor, context: StepContext, loss: Tensor, codes: Tensor) -> None:
    """`loss` is the whole objective by plain autograd; ours must have its gradients on both paths."""
    loss.backward()
    expected = _gradients(sae)
    for share in (0.0, 2.0):  # products of whole matrices; sparse products
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(elementwise, "DENSE_SHARE", share)
            patch.setattr(elementwise, "CHUNK_ROWS", 7)
            report = sae.backward(x, x, context)
        for name, grad in _gradients(sae).items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-5)
        assert torch.equal(report.fired, (codes > 0).any(dim=0))
        assert int(report.active) == int((codes > 0).sum())
        error = (x - (codes @ sae.W_dec + sae.b_dec)).square().sum()
        torch.testing.assert_close(report.squared_error, error.detach(), rtol=1e-4, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(SHAPES)
def test_relu_is_its_formula(shape: tuple[int, int, int, int]) -> None:
    n, d_in, d_sae, seed = shape
    sae, generator = _sae("relu", d_in, d_sae, seed, l1=0.7)
    x = torch.randn(n, d_in, generator=generator)
    codes = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
    torch.testing.assert_close(sae.encode_dense(x), codes)
    error = (x - codes @ sae.W_dec - sae.b_dec).square().sum()
    loss = (error + 0.5 * 0.7 * (codes * sae.W_dec.norm(dim=1)).sum()) / x.numel()
    dead = torch.zeros(d_sae, dtype=torch.bool)
    _compare(sae, x, StepContext(dead, ramp=0.5), loss, codes.detach())


@settings(max_examples=25, deadline=None)
@given(SHAPES, st.sampled_from(JUMPRELU), st.booleans())
def test_jumprelu_is_its_formula(
    shape: tuple[int, int, int, int], options: dict[str, object], nested: bool
) -> None:
    """The straight-through gradients are written here as those of a surrogate with the same slopes."""
    n, d_in, d_sae, seed = shape
    sae, generator = _sae("matryoshka_" * nested + "jumprelu", d_in, d_sae, seed, l0=0.3, **options)
    x = torch.randn(n, d_in, generator=generator)
    theta, width = sae.threshold, sae.options.bandwidth
    assert theta is not None
    p = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    on = ((p > theta) & (p > 0)).float()
    torch.testing.assert_close(sae.encode_dense(x), p * on)

    window = (((p - theta).abs() < width / 2) & (p > 0)).float().detach() / width
    above = (p if sae.options.through_encoder else p.detach()) - theta
    surrogate = window * (above - above.detach())  # 0, with the slope of the window
    step = on + surrogate
    codes = p * on + theta.detach() * surrogate
    parts = [w for part in (16, 8, 4, 2) if (w := d_sae // part)] * nested
    errors = [(x - codes[:, :w] @ sae.W_dec[:w] - sae.b_dec).square().sum() for w in (*parts, d_sae)]
    error = torch.stack(errors).mean()
    norms = sae.W_dec.norm(dim=1)
    cost = step if sae.options.penalty == "step" else (4 * codes * norms).tanh()
    dead = torch.rand(d_sae, generator=generator) < 0.4
    short = ((theta - p).relu() * norms)[:, dead].sum()
    loss = (error + 0.5 * (0.3 * cost.sum() + sae.options.pre_act * short)) / x.numel()
    _compare(sae, x, StepContext(dead, ramp=0.5), loss, (p * on).detach())


@settings(max_examples=25, deadline=None)
@given(SHAPES)
def test_gated_is_its_formula(shape: tuple[int, int, int, int]) -> None:
    n, d_in, d_sae, seed = shape
    sae, generator = _sae("gated", d_in, d_sae, seed, l1=0.7)
    x = torch.randn(n, d_in, generator=generator)
    r_mag, b_mag = sae.get_parameter("r_mag"), sae.get_parameter("b_mag")
    inner = (x - sae.b_dec) @ sae.W_enc
    gate = inner + sae.b_enc
    codes = (inner * r_mag.exp() + b_mag).relu() * (gate > 0)
    torch.testing.assert_close(sae.encode_dense(x), codes)
    error = (x - codes @ sae.W_dec - sae.b_dec).square().sum()
    alone = (x - gate.relu() @ sae.W_dec.detach() - sae.b_dec.detach()).square().sum()
    loss = (error + 0.5 * 0.7 * gate.relu().sum() + alone) / x.numel()
    dead = torch.zeros(d_sae, dtype=torch.bool)
    _compare(sae, x, StepContext(dead, ramp=0.5), loss, codes.detach())


def test_codes_have_gradients_in_the_input() -> None:
    sae, generator = _sae("gated", 6, 20, 0)
    x = torch.randn(5, 6, generator=generator, requires_grad=True)
    (ours,) = torch.autograd.grad(sae(x).x_hat.square().sum(), x)
    inner = (x - sae.b_dec) @ sae.W_enc
    codes = (inner * sae.get_parameter("r_mag").exp() + sae.get_parameter("b_mag")).relu()
    x_hat = (codes * (inner + sae.b_enc > 0)) @ sae.W_dec + sae.b_dec
    torch.testing.assert_close(ours, torch.autograd.grad(x_hat.square().sum(), x)[0], rtol=1e-4, atol=1e-4)
