"""Every kernel for GPUs, run by Triton's interpreter, against its plain reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unbraid.sae.kernels import reference

pytest.importorskip("triton", reason="Triton is not installed")
from unbraid.sae.kernels import gpu

# Triton's interpreter multiplies the bits of bfloat16 as if they were whole numbers.
LOW = [torch.float16, torch.float32]
SIZES = st.tuples(st.integers(1, 20), st.integers(1, 70), st.integers(1, 300), st.integers(0, 999))


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=12, deadline=None)
@given(SIZES, st.integers(1, 12), st.sampled_from([1, 2, 8]), st.sampled_from(LOW))
def test_the_top_k_is_exact(size: tuple[int, int, int, int], k: int, keep: int, low: torch.dtype) -> None:
    n, d, F, seed = size
    k = min(k, F)
    x, W, b = _random(n, d, seed=seed), _random(F, d, seed=seed + 1), _random(F, seed=seed + 2)
    W = W.to(low).float()  # so that candidates and exact values rank alike, whatever the rounding
    x = x.to(low).float()
    latents, values = gpu.top_k(x, W, b, W.to(low), k, keep=keep)
    _, bar = reference.top_k(x, W, b, k)
    torch.testing.assert_close(values.sort(dim=1).values, bar.sort(dim=1).values, rtol=1e-4, atol=1e-4)
    assert all(len(set(row)) == k for row in latents.tolist())
    exact = (x @ W.T + b).gather(1, latents.long())
    torch.testing.assert_close(exact, values, rtol=1e-4, atol=1e-4)


def test_a_tile_that_hides_entries_is_noticed() -> None:
    x, W, b = torch.ones(3, 16), torch.zeros(512, 16), torch.zeros(512)
    W[128:140] = torch.linspace(1, 2, 12)[:, None]  # twelve of the largest twelve in one tile
    _, hidden = gpu.candidates(x, W, b, 12, keep=4)
    assert hidden.all()
    latents, _ = gpu.top_k(x, W, b, W, 12, keep=4)
    assert all(sorted(row) == list(range(128, 140)) for row in latents.tolist())
    W = torch.zeros(512, 16)
    W[[5, 200, 300, 400]] = 1.0
    b = -torch.arange(512.0) / 1000
    _, hidden = gpu.candidates(x, W, b, 4, keep=4)
    assert not hidden.any()


@pytest.mark.parametrize("low", LOW)
def test_rows_without_warning_have_the_right_candidates(low: torch.dtype) -> None:
    x, W, b = _random(40, 48, seed=0), _random(1500, 48, seed=1), _random(1500, seed=2)
    found, hidden = gpu.candidates(x.to(low), W.to(low), b, 16)
    wanted = (x.to(low).float() @ W.to(low).float().T + b).topk(16, dim=1).indices
    sure = ~hidden
    assert sure.float().mean() > 0.9
    same = [set(a) == set(c) for a, c in zip(found[sure].tolist(), wanted[sure].tolist(), strict=True)]
    assert all(same)


@settings(max_examples=12, deadline=None)
@given(SIZES, st.integers(1, 12))
def test_decoding_and_gradients_are_the_plain_ones(size: tuple[int, int, int, int], k: int) -> None:
    n, d, F, seed = size
    k = min(k, F)
    x, W_dec, b_dec = _random(n, d, seed=seed), _random(F, d, seed=seed + 1), _random(d, seed=seed + 2)
    latents = torch.stack(
        [torch.randperm(F, generator=torch.Generator().manual_seed(seed + i))[:k] for i in range(n)]
    )
    codes = _random(n, k, seed=seed + 3).relu()
    scale = 0.5
    error, gradient, squared = gpu.decode_and_compare(latents.int(), codes, W_dec, b_dec, x, scale)
    wanted = reference.error(latents, codes, W_dec, b_dec, x)
    torch.testing.assert_close(error, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(squared, wanted.square().sum(dim=1), rtol=1e-4, atol=1e-4)
    slope = scale * (wanted[:, None, :] * W_dec[latents]).sum(dim=2) * (codes != 0)
    torch.testing.assert_close(gradient, slope, rtol=1e-3, atol=1e-3)

    first, entries = gpu.by_latent(latents, codes, F)
    assert int(first[-1]) == int((codes != 0).sum())
    d_enc, d_bias, d_dec = reference.weight_gradients(latents, codes, gradient, x, error, F)
    torch.testing.assert_close(gpu.bias_gradient(first, entries, gradient), d_bias, rtol=1e-3, atol=1e-3)

    W_enc, kept = _random(F, d, seed=seed + 4), _random(F, d, seed=seed + 5)
    W_dec = W_dec / W_dec.norm(dim=1, keepdim=True)
    moments = [_random(F, d, seed=seed + 6), kept.square(), _random(F, d, seed=seed + 7), kept.square()]
    number, lr = 3, 0.01
    d_dec = reference.without_length(scale * d_dec, W_dec)
    want_enc = reference.adam(W_enc, d_enc, moments[0], moments[1], lr, number)
    want_dec = reference.adam(W_dec, d_dec, moments[2], moments[3], lr, number)
    none = (torch.full((F,), -1, dtype=torch.int32), torch.zeros(1, d), torch.zeros(1, d))
    shadow = torch.empty(F, d, dtype=torch.float16)
    gpu.update(
        first, entries, codes, gradient, x, error, none, (W_enc, W_dec), tuple(moments), shadow,
        scale, lr / (1 - 0.9**number), 1 / (1 - 0.999**number), (0.9, 0.999), 1e-8,
    )  # fmt: skip
    for found, wanted in zip((W_enc, *moments[:2]), want_enc, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    unit = want_dec[0] / want_dec[0].norm(dim=1, keepdim=True)
    for found, wanted in zip((W_dec, *moments[2:]), (unit, *want_dec[1:]), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    assert torch.equal(shadow, W_enc.half())
