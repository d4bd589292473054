"""Toy models of superposition: a network that stores more features than it has dimensions.

    h = x Wᵀ,   x̂ = ReLU(h W + b)        x: (n, F) features,  W: (d, F),  b: (F,),  F > d

Column i of W is the direction in which the network keeps feature i. The loss weighs each feature by its
importance. With dense features the network keeps the d most important ones at right angles and drops the
rest; the rarer features are, the more of them it keeps, at angles whose interference the ReLU cuts away:
five features in two dimensions end as a pentagon. Elhage et al. 2022, "Toy Models of Superposition", arXiv
2209.10652. `numpy_sae` is the way back, from such directions to the features.
"""

from __future__ import annotations

import numpy as np

from unbraid.practice.numpy_sae import Adam, Array, Params


def sparse_features(rng: np.random.Generator, n: int, features: int, density: float) -> Array:
    """x: (n, features), each entry uniform in (0, 1) with probability `density` and 0 otherwise."""
    return (rng.random((n, features)) < density) * rng.random((n, features))


def reconstruct(p: Params, x: Array) -> Array:
    """x̂: (n, F) of x: (n, F)."""
    return np.maximum(x @ p["W"].T @ p["W"] + p["b"], 0.0)


def loss_and_gradients(p: Params, x: Array, importance: Array) -> tuple[float, Params]:
    """L = 1/n Σ_samples Σ_i importance_i (x̂_i − x_i)² on x: (n, F), and its gradient by W and b."""
    W, n = p["W"], len(x)
    h = x @ W.T  # (n, d)
    x_hat = np.maximum(h @ W + p["b"], 0.0)  # (n, F)
    r = x_hat - x
    dy = 2 / n * importance * r * (x_hat > 0)  # (n, F): ∂L/∂(h W + b)
    dh = dy @ W.T  # (n, F)(F, d)
    # W is used twice, to write x into h and to read it back, so its gradient has two parts.
    dW = dh.T @ x + h.T @ dy  # (d, n)(n, F)
    return float((importance * r**2).sum() / n), {"W": dW, "b": dy.sum(0)}


def train(
    rng: np.random.Generator,
    features: int,
    d: int,
    density: float,
    importance: Array,
    *,
    steps: int = 2000,
    batch: int = 512,
    rate: float = 1e-2,
) -> Params:
    """Train one toy model from a small random W; the rate falls to 0 over the last third."""
    p = {"W": rng.normal(size=(d, features)) / np.sqrt(features), "b": np.zeros(features)}
    adam = Adam(p)
    for step in range(steps):
        _, gradients = loss_and_gradients(p, sparse_features(rng, batch, features, density), importance)
        adam.step(p, gradients, rate * min(1.0, 3 * (steps - step) / steps))
    return p


def train_best(
    rng: np.random.Generator, features: int, d: int, density: float, importance: Array, *, tries: int = 4
) -> tuple[Params, float]:
    """The best of several trainings and its loss on fresh samples: one alone may end in a local minimum."""
    models = [train(rng, features, d, density, importance) for _ in range(tries)]
    x = sparse_features(rng, 20_000, features, density)
    losses = [loss_and_gradients(p, x, importance)[0] for p in models]
    best = int(np.argmin(losses))
    return models[best], losses[best]
