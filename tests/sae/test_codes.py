"""Sparse codes against dense arithmetic: selection, decoding, and every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unbraid.sae.codes import CHUNK_ROWS, SparseCodes, decode, top_k, top_k_pre_activations


def _randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.sampled_from([1, 7, 64, 96, 1024]), st.integers(1, 40), st.integers(0, 1000))
def test_top_k_finds_what_torch_topk_finds(n: int, width: int, k: int, seed: int) -> None:
    k = min(k, width)
    x = _randn(n, width, seed=seed)
    values, indices = top_k(x, k)
    assert torch.equal(values.sort(dim=1).values, x.topk(k, dim=1).values.sort(dim=1).values)
    assert torch.equal(x.gather(1, indices), values)
    assert all(len(set(row)) == k for row in indices.tolist())


def test_top_k_keeps_to_the_right_values_among_ties() -> None:
    x = torch.zeros(3, 256)
    x[:, ::2] = 1.0
    values, indices = top_k(x, 5)
    assert (values == 1).all() and (x.gather(1, indices) == 1).all()


def test_dense_and_sparse_forms_agree() -> None:
    dense = _randn(20, 30).relu() * (_randn(20, 30, seed=1) > 1)
    codes = SparseCodes.from_dense(dense)
    assert torch.equal(codes.dense(30), dense)
    assert torch.equal(codes.l0(), (dense > 0).sum(dim=1))
    wider = SparseCodes.concatenate([codes, SparseCodes.from_dense(dense.abs() + 1)])
    assert torch.equal(wider.dense(30)[:20], dense) and wider.values.shape == (40, 30)


def test_codes_without_an_entry_decode_to_zero() -> None:
    codes = SparseCodes.from_dense(torch.zeros(3, 8))
    assert codes.values.shape == (3, 0)
    assert torch.equal(decode(codes, _randn(8, 5)), torch.zeros(3, 5))


@pytest.mark.parametrize("among", [None, torch.tensor([3, 8, 9, 20, 31, 40])])
def test_gradients_are_those_of_dense_arithmetic(among: torch.Tensor | None) -> None:
    n, d_in, d_sae, k = 2 * CHUNK_ROWS + 3, 6, 48, 4
    ours = [_randn(*s, seed=i).requires_grad_() for i, s in enumerate([(n, d_in), (d_in, d_sae), (d_sae,)])]
    theirs = [value.detach().clone().requires_grad_() for value in ours]
    W_dec, aim = _randn(d_sae, d_in, seed=7).requires_grad_(), _randn(n, d_in, seed=8)
    W_dec_dense = W_dec.detach().clone().requires_grad_()

    values, indices = top_k_pre_activations(ours[0], ours[1], ours[2], k, among)
    x_hat = decode(SparseCodes(indices, values.relu()), W_dec)
    (x_hat - aim).square().sum().backward()

    pre = theirs[0] @ theirs[1] + theirs[2]
    allowed = torch.zeros(d_sae, dtype=torch.bool)
    allowed[slice(None) if among is None else among] = True
    chosen = pre.detach().masked_fill(~allowed, -torch.inf).topk(k, dim=1).indices
    dense = torch.zeros_like(pre).scatter(1, chosen, pre.gather(1, chosen).relu())
    x_hat_dense = dense @ W_dec_dense
    (x_hat_dense - aim).square().sum().backward()

    torch.testing.assert_close(x_hat, x_hat_dense, rtol=1e-4, atol=1e-4)
    for mine, expected in zip([*ours, W_dec], [*theirs, W_dec_dense], strict=True):
        torch.testing.assert_close(mine.grad, expected.grad, rtol=1e-3, atol=1e-3)
