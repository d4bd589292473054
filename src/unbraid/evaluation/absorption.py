"""Absorption: a latent that stays silent on part of its feature because a more special latent carries it
there."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from unbraid.sae.base import SAE

LEAST_COSINE = 0.025
"""Cosine with the probe that an absorbing latent needs."""
LEAST_SHARE = 0.4
"""Share of the activation's projection on the probe that it has to carry."""
Floats = NDArray[np.float64]
Rows = NDArray[np.int64]


def cosines(sae: SAE, directions: Floats) -> Floats:
    """Cosine of every decoder row with unit directions (C, d_in): (d_sae, C)."""
    rows = sae.W_dec.detach().double().cpu().numpy()
    return (rows @ directions.T) / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300)


def absorbed(projection: Floats, values: Floats, indices: Rows, aligned: Floats) -> NDArray[np.bool_]:
    """Whether one latent alone carries the probe's direction at each token (n,), were its own silent.

    `projection` (n,): the activation's on the probe; codes `values`, `indices` (n, k); `aligned` (d_sae,):
    cosine of each latent's decoder row with the probe. It is the firing latent with the largest value times
    cosine.
    """
    if values.shape[1] == 0:
        return np.zeros(len(values), dtype=np.bool_)
    carried = values * aligned[indices]
    best = carried.argmax(axis=1)[:, None]
    most = np.take_along_axis(carried, best, axis=1)[:, 0]
    cosine = aligned[np.take_along_axis(indices, best, axis=1)[:, 0]]
    return (most > 0) & (cosine >= LEAST_COSINE) & (projection > 0) & (most >= LEAST_SHARE * projection)
