"""The NumPy autoencoder: gradients against autograd and finite differences; it finds what was planted."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unbraid.practice.numpy_sae import (
    Adam,
    Array,
    Params,
    decode,
    directions,
    encode,
    initial,
    loss_and_gradients,
    match,
    sample,
    train,
)


def some_case(seed: int, n: int, d: int, m: int) -> tuple[Params, Array]:
    """Parameters and activations with nothing at zero and no ties, as training would meet them."""
    rng = np.random.default_rng(seed)
    p = {name: a + 0.3 * rng.normal(size=a.shape) for name, a in initial(rng, d, m).items()}
    return p, rng.normal(size=(n, d))


def autograd(
    p: Params, x: Array, k: int | None, l1: float, prefixes: tuple[int, ...]
) -> tuple[float, dict[str, Array]]:
    """The same loss written once more in torch, differentiated by torch."""
    t = {name: torch.tensor(a, requires_grad=True) for name, a in p.items()}
    y = torch.tensor(x)
    h = (y - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    if k is not None:
        top = h.topk(min(k, h.shape[1]))
        h = torch.zeros_like(h).scatter(1, top.indices, top.values)
    f = h.relu()
    errors = [(f[:, :m] @ t["W_dec"][:m] + t["b_dec"] - y).square().sum(1) for m in prefixes or (f.shape[1],)]
    loss = (torch.stack(errors).mean(0) + l1 * f.sum(1)).mean()
    loss.backward()
    return loss.item(), {name: a.grad.numpy() for name, a in t.items() if a.grad is not None}


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 9),
    d=st.integers(1, 7),
    m=st.integers(1, 12),
    k=st.none() | st.integers(1, 12),
    l1=st.sampled_from([0.0, 0.3]),
    cuts=st.lists(st.integers(1, 12), max_size=3),
)
def test_gradients_are_those_of_autograd(
    seed: int, n: int, d: int, m: int, k: int | None, l1: float, cuts: list[int]
) -> None:
    p, x = some_case(seed, n, d, m)
    prefixes = (*sorted(min(c, m) for c in cuts), m) if cuts else ()
    loss, gradients = loss_and_gradients(p, x, k, l1, prefixes)
    expected_loss, expected = autograd(p, x, k, l1, prefixes)
    assert loss == pytest.approx(expected_loss, rel=1e-10)
    assert gradients.keys() == expected.keys() == p.keys()
    for name, g in gradients.items():
        np.testing.assert_allclose(g, expected[name], rtol=1e-8, atol=1e-10, err_msg=name)


@pytest.mark.parametrize(
    "variant", [{"l1": 0.4}, {"k": 2}, {"k": 3, "prefixes": (2, 5, 10)}], ids=["relu", "topk", "matryoshka"]
)
def test_gradients_are_the_slopes_of_the_loss(variant: dict) -> None:
    p, x = some_case(3, 6, 4, 10)
    _, gradients = loss_and_gradients(p, x, **variant)
    step = 1e-6
    for name, g in gradients.items():
        for where in np.ndindex(g.shape):
            sides = []
            for sign in (1, -1):
                moved = {n: a.copy() for n, a in p.items()}
                moved[name][where] += sign * step
                sides.append(loss_and_gradients(moved, x, **variant)[0])
            assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(g[where], rel=1e-5, abs=1e-7)


def test_adam_is_torchs() -> None:
    p, x = some_case(0, 8, 3, 5)
    t = {name: torch.tensor(a, requires_grad=True) for name, a in p.items()}
    ours, theirs = Adam(p), torch.optim.Adam(t.values(), lr=0.01)
    for _ in range(5):
        _, gradients = loss_and_gradients(p, x, l1=0.1)
        for name, a in t.items():
            a.grad = torch.tensor(gradients[name])
        ours.step(p, gradients, 0.01)
        theirs.step()
    for name, a in t.items():
        np.testing.assert_allclose(p[name], a.detach().numpy(), rtol=1e-6, atol=1e-9)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), m=st.integers(1, 12), k=st.integers(1, 14))
def test_topk_keeps_the_largest_codes(seed: int, m: int, k: int) -> None:
    p, x = some_case(seed, 7, 4, m)
    dense, kept = encode(p, x), encode(p, x, k)
    for row, chosen in zip(dense, kept, strict=True):
        assert sorted(chosen[chosen > 0]) == sorted(v for v in sorted(row)[-k:] if v > 0)


def test_samples_are_sums_of_as_many_features_as_asked() -> None:
    rng = np.random.default_rng(0)
    D = directions(rng, 32, 8)
    np.testing.assert_allclose(np.linalg.norm(D, axis=1), 1)
    x, c = sample(rng, D, 20_000, 2.0)
    np.testing.assert_allclose(x, c @ D)
    assert (c > 0).sum(1).mean() == pytest.approx(2.0, abs=0.05) and c.min() >= 0 and c.max() < 1


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), features=st.integers(1, 4), extra=st.integers(0, 2))
def test_matching_is_the_best_of_all_pairings(seed: int, features: int, extra: int) -> None:
    rng = np.random.default_rng(seed)
    D, W = directions(rng, features, 3), directions(rng, features + extra, 3)
    rows, cosines = match(D, W)
    assert len(set(rows)) == features
    np.testing.assert_allclose(cosines, (D * W[rows]).sum(1))
    every = permutations(range(len(W)), features)
    assert cosines.sum() == pytest.approx(max((D * W[list(rows)]).sum() for rows in every))


@pytest.mark.parametrize("variant", [{"l1": 0.7}, {"k": 1}, {"k": 1, "prefixes": (16, 32, 64)}])
def test_training_finds_planted_directions_that_random_rows_do_not_have(variant: dict) -> None:
    rng = np.random.default_rng(7)
    D = directions(rng, 32, 8)
    p = initial(rng, 8, 64)
    before = match(D, p["W_dec"])[1]
    train(p, lambda: sample(rng, D, 256, 1.0)[0], 600, **variant)
    x, _ = sample(rng, D, 4000, 1.0)
    f = encode(p, x, variant.get("k"))
    np.testing.assert_allclose(np.linalg.norm(p["W_dec"], axis=1), 1)
    assert (before > 0.9).mean() < 0.3 and (match(D, p["W_dec"])[1] > 0.9).mean() > 0.6
    assert 0.5 < (f > 0).sum(1).mean() < 2
    assert np.square(x - decode(p, f)).sum() < 0.5 * np.square(x - x.mean(0)).sum()
