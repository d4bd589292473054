"""Decoder rows of any length: which latents fire, what moves, what comes out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.free_rows import ROW_START, FreeRows
from unbraid.sae.registry import build
from unbraid.sae.scaling import Scaling
from unbraid.training.adam import Adam
from unbraid.training.step import PlainStep
from unbraid.training.steppers import stepper

KINDS = ["topk", "topk_transcoder", "topk_skip_transcoder", "jumprelu", "matryoshka_jumprelu"]


def _sae(kind: str, seed: int = 0, *, d: int = 6, width: int = 32, k: int = 4) -> SAE:
    """An autoencoder with free rows of quite different lengths."""
    sae, generator = build(SAEConfig(kind, d, width, k=k, options={"free_rows": True})), torch.Generator()
    generator.manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        sae.W_dec *= torch.rand(width, 1, generator=generator) * 3
        if sae.threshold is not None:
            sae.threshold.abs_()
    return sae


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 999), k=st.integers(1, 9))
def test_topk_fires_the_largest_contributions_and_moves_only_these(seed: int, k: int) -> None:
    sae = _sae("topk", seed, k=k)
    x = torch.randn(17, 6, generator=torch.Generator().manual_seed(seed))
    codes = sae.encode(x)
    given = torch.randn(17, 32, generator=torch.Generator().manual_seed(seed + 1))
    (codes.dense(32) * given).sum().backward()
    found = {name: p.grad for name, p in sae.named_parameters()}
    sae.zero_grad()

    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    best = (pre * sae.W_dec.norm(dim=1)).topk(k, dim=1).indices
    wanted = torch.zeros_like(pre).scatter(1, best, pre.gather(1, best).relu())
    torch.testing.assert_close(codes.dense(32), wanted, rtol=1e-4, atol=1e-5)
    (wanted * given).sum().backward()
    assert found["W_dec"] is None  # the ranking itself has no gradient
    for name in ("W_enc", "b_enc", "b_dec"):
        grad = found[name]
        assert grad is not None
        torch.testing.assert_close(grad, sae.get_parameter(name).grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_folded_it_is_the_same_autoencoder_with_rows_of_unit_length(kind: str) -> None:
    sae, x = _sae(kind), torch.randn(50, 6, generator=torch.Generator().manual_seed(3))
    before = sae(x)
    assert int(before.codes.l0().sum()) > 50
    one = Scaling(torch.zeros(6), torch.ones(6), 1.0)
    sae.fold(one, one)
    ready = sae.calibrated([x])
    assert ready.unit_rows and not ready.options.free_rows
    torch.testing.assert_close(ready.W_dec.norm(dim=1), torch.ones(32))
    torch.testing.assert_close(ready(x).x_hat, before.x_hat, rtol=1e-4, atol=1e-4)


def test_rows_begin_short_and_a_revived_one_has_a_usual_length() -> None:
    sae, x = build(SAEConfig("topk", 6, 32, k=4, options={"free_rows": True})), torch.randn(64, 6)
    sae.initialise(x, x, torch.Generator().manual_seed(0))
    assert isinstance(sae, FreeRows)
    torch.testing.assert_close(sae.row_norms(), torch.full((32,), ROW_START))
    torch.testing.assert_close(sae.W_enc, sae.W_dec.T)
    with torch.no_grad():
        sae.W_dec *= 7
        sae.W_dec[[2, 5]] *= 0.01
    sae.revive(torch.tensor([2, 5]), x[:2], x[:2])
    torch.testing.assert_close(sae.row_norms()[[2, 5]], torch.full((2,), 7 * ROW_START))


def test_compiled_loops_which_rank_by_pre_activations_leave_it_to_plain_steps() -> None:
    for free, plain in ((True, True), (False, False)):
        sae = build(SAEConfig("topk", 6, 32, k=4, options={"free_rows": free}))
        assert isinstance(stepper(sae, Adam(sae)), PlainStep) == plain
