"""A sparse autoencoder in plain NumPy: the whole idea, with every gradient written out by hand.

A layer of width d seems to hold far more than d features. That can work when few of them are present at once:

    x = c D        c: (n, F) coefficients, nonnegative and mostly zero;  D: (F, d) unit directions, F > d

A sparse autoencoder sees x alone and looks for D. It codes each sample with few of its m latents and adds
their decoder rows up again:

    h = (x − b_dec) W_enc + b_enc,   f = sparse(h),   x̂ = f W_dec + b_dec        W_dec: (m, d), unit rows

Three ways to make f sparse, one gradient for all of them (`loss_and_gradients`):

* ReLU-L1: f = ReLU(h), and the loss pays λ for every unit of code (Bricken et al. 2023, "Towards
  Monosemanticity"). How many latents fire is the outcome; the price also shrinks the codes that remain.
* TopK: f = ReLU of the k largest h of the row (Gao et al. 2024, arXiv 2406.04093). How many fire is given.
* Matryoshka: TopK whose first m₁ < m₂ < … latents must each reconstruct x on their own (Bussmann et al.
  2025, arXiv 2503.17547). It is meant for features that form a hierarchy. Here they do not, and the short
  prefixes have too few latents for the features, so that the nesting can only cost something.

What can be recovered: directions, not every coefficient. Even to somebody who knows D, the sparsest
nonnegative c behind an x is certain only while at most d/2 features fire (Donoho and Tanner 2005,
"Sparse nonnegative solution of underdetermined linear equations by linear programming"): four of them in
eight dimensions. One linear map and a threshold do worse than that bound, and fail gradually: `unbraid
practice superposition` shows where.

The practised version, with sparse codes, dead latents and resume, is in `sae` and `training`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

Array = NDArray[np.float64]
Params = dict[str, Array]


def directions(rng: np.random.Generator, features: int, d: int) -> Array:
    """Unit vectors in random directions, (features, d); nothing makes them avoid each other."""
    D = rng.normal(size=(features, d))
    return D / np.linalg.norm(D, axis=1, keepdims=True)


def sample(rng: np.random.Generator, D: Array, n: int, active: float) -> tuple[Array, Array]:
    """x: (n, d) and its true coefficients c: (n, F), of which `active` are above 0 on average.

    Each feature is present by its own coin of probability active / F, with a strength uniform in (0, 1).
    """
    present = rng.random((n, len(D))) < active / len(D)
    c = present * rng.random((n, len(D)))
    return c @ D, c


def initial(rng: np.random.Generator, d: int, width: int) -> Params:
    """Random unit decoder rows, the encoder their transpose, biases 0."""
    W_dec = directions(rng, width, d)
    return {"W_enc": W_dec.T.copy(), "b_enc": np.zeros(width), "W_dec": W_dec, "b_dec": np.zeros(d)}


def encode(p: Params, x: Array, k: int | None = None) -> Array:
    """Codes f: (n, m) of x: (n, d); with k, all but the k largest of each row are 0."""
    f = np.maximum((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"], 0.0)  # (n, m)
    if k is None or k >= f.shape[1]:
        return f
    kth = np.partition(f, -k, axis=1)[:, -k, None]  # (n, 1), the k-th largest of each row
    return f * (f >= kth)


def decode(p: Params, f: Array) -> Array:
    """x̂: (n, d) of codes f: (n, m)."""
    return f @ p["W_dec"] + p["b_dec"]


def loss_and_gradients(
    p: Params, x: Array, k: int | None = None, l1: float = 0.0, prefixes: Sequence[int] = ()
) -> tuple[float, Params]:
    """The loss on x: (n, d) and its gradient by every parameter, in the parameters' shapes.

    L = 1/n Σ_samples [ 1/G Σ_g |x̂_g − x|² + λ Σ_j f_j ],   x̂_g = f[:, :m_g] W_dec[:m_g] + b_dec

    `prefixes` are the m_g; left out, there is one that holds all latents.
    """
    prefixes = prefixes or (len(p["W_dec"]),)
    n, G = len(x), len(prefixes)
    f = encode(p, x, k)  # (n, m)
    loss = l1 * f.sum() / n
    df = np.full_like(f, l1 / n)  # (n, m): ∂L/∂f, from the price first
    dW_dec, db_dec = np.zeros_like(p["W_dec"]), np.zeros_like(p["b_dec"])
    for m in prefixes:
        W = p["W_dec"][:m]  # (m_g, d)
        r = f[:, :m] @ W + p["b_dec"] - x  # (n, d), the error of this prefix
        loss += (r**2).sum() / (n * G)
        dx_hat = 2 * r / (n * G)  # (n, d): ∂L/∂x̂_g
        dW_dec[:m] += f[:, :m].T @ dx_hat  # (m_g, n)(n, d), because x̂ = f W + b
        df[:, :m] += dx_hat @ W.T  # (n, d)(d, m_g)
        db_dec += dx_hat.sum(0)
    # ReLU and the choice of the k largest pass the gradient where a code is above 0, unchanged. Which ones
    # are chosen jumps where two are equal, and is constant everywhere else.
    dh = df * (f > 0)  # (n, m): ∂L/∂h
    db_enc = dh.sum(0)  # (m,)
    dW_enc = (x - p["b_dec"]).T @ dh  # (d, n)(n, m), because h = (x − b_dec) W_enc + b_enc
    db_dec -= p["W_enc"] @ db_enc  # (d, m)(m,): b_dec is also taken off the input, minus Σ_n dh W_encᵀ
    return float(loss), {"W_enc": dW_enc, "b_enc": db_enc, "W_dec": dW_dec, "b_dec": db_dec}


class Adam:
    """Kingma and Ba 2015, arXiv 1412.6980: each entry moves by its mean gradient over its typical size."""

    def __init__(self, p: Params, beta1: float = 0.9, beta2: float = 0.999) -> None:
        self.beta1, self.beta2, self.t = beta1, beta2, 0
        self.mean = {name: np.zeros_like(a) for name, a in p.items()}
        self.square = {name: np.zeros_like(a) for name, a in p.items()}

    def step(self, p: Params, gradients: Params, rate: float) -> None:
        """Move the parameters in place."""
        self.t += 1
        for name, g in gradients.items():
            self.mean[name] += (1 - self.beta1) * (g - self.mean[name])
            self.square[name] += (1 - self.beta2) * (g**2 - self.square[name])
            mean = self.mean[name] / (1 - self.beta1**self.t)  # both start at 0 and are corrected for it
            square = self.square[name] / (1 - self.beta2**self.t)
            p[name] -= rate * mean / (np.sqrt(square) + 1e-8)


def train(
    p: Params,
    draw: Callable[[], Array],
    steps: int,
    *,
    k: int | None = None,
    l1: float = 0.0,
    prefixes: Sequence[int] = (),
    rate: float = 1e-2,
) -> None:
    """Train p in place, each step on a fresh batch draw(): (n, d); the rate falls to 0 over the last third.

    Decoder rows keep length 1: otherwise the L1 price is dodged by small codes and long rows.
    """
    adam = Adam(p)
    for step in range(steps):
        _, gradients = loss_and_gradients(p, draw(), k, l1, prefixes)
        slope, rows = gradients["W_dec"], p["W_dec"]  # (m, d) each
        slope -= (slope * rows).sum(
            1, keepdims=True
        ) * rows  # the part along a row would only change its length
        adam.step(p, gradients, rate * min(1.0, 3 * (steps - step) / steps))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)


def match(D: Array, W_dec: Array) -> tuple[NDArray[np.intp], Array]:
    """For each true direction its own decoder row, (F,), and their cosine, (F,): the best one-to-one pairing.

    Needs at least as many rows as directions, all of length 1. No row serves two directions, so a latent that
    blends two features counts for one of them at most.
    """
    cosines = D @ W_dec.T  # (F, m)
    _, rows = linear_sum_assignment(cosines, maximize=True)
    return rows, cosines[np.arange(len(D)), rows]
