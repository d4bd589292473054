"""Toy models of superposition: gradients, and the two geometries that the paper is known for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unbraid.practice.superposition import loss_and_gradients, reconstruct, sparse_features, train_best


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 9), features=st.integers(1, 7), d=st.integers(1, 5))
def test_gradients_are_those_of_autograd(seed: int, n: int, features: int, d: int) -> None:
    rng = np.random.default_rng(seed)
    p = {"W": rng.normal(size=(d, features)), "b": rng.normal(size=features)}
    x, importance = sparse_features(rng, n, features, 0.5), rng.random(features)
    loss, gradients = loss_and_gradients(p, x, importance)
    W, b = (torch.tensor(p[name], requires_grad=True) for name in ("W", "b"))
    y = torch.tensor(x)
    x_hat = (y @ W.T @ W + b).relu()
    expected = (torch.tensor(importance) * (x_hat - y) ** 2).sum(1).mean()
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-10)
    np.testing.assert_allclose(reconstruct(p, x), x_hat.detach().numpy(), atol=1e-12)
    for name, a in (("W", W), ("b", b)):
        assert a.grad is not None
        np.testing.assert_allclose(gradients[name], a.grad.numpy(), rtol=1e-8, atol=1e-10, err_msg=name)


def test_gradients_are_the_slopes_of_the_loss() -> None:
    rng = np.random.default_rng(1)
    p = {"W": rng.normal(size=(2, 5)), "b": rng.normal(size=5)}
    x, importance, step = sparse_features(rng, 20, 5, 0.6), 0.9 ** np.arange(5), 1e-6
    for name, g in loss_and_gradients(p, x, importance)[1].items():
        for where in np.ndindex(g.shape):
            sides = []
            for sign in (1, -1):
                moved = {n: a.copy() for n, a in p.items()}
                moved[name][where] += sign * step
                sides.append(loss_and_gradients(moved, x, importance)[0])
            assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(g[where], rel=1e-5, abs=1e-7)


def test_dense_features_get_a_dimension_each_and_sparse_ones_a_pentagon() -> None:
    importance = 0.9 ** np.arange(5)
    dense, _ = train_best(np.random.default_rng(0), 5, 2, 1.0, importance, tries=2)
    lengths = np.linalg.norm(dense["W"], axis=0)
    assert (lengths[:2] > 0.9).all() and (lengths[2:] < 0.1).all()  # the two most important ones, alone
    assert abs(dense["W"][:, 0] @ dense["W"][:, 1]) < 0.05
    sparse, _ = train_best(np.random.default_rng(0), 5, 2, 0.05, importance, tries=2)
    angles = np.sort(np.degrees(np.arctan2(*sparse["W"][::-1])) % 360)
    gaps = np.diff([*angles, angles[0] + 360])
    assert (np.linalg.norm(sparse["W"], axis=0) > 0.9).all() and (abs(gaps - 72) < 5).all()
