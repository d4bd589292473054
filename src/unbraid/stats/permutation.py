"""The best of thousands: how good the best latent would look if labels meant nothing."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from unbraid.stats.effects import auroc_from_ranks, ranked, two_groups

Statistic = Literal["auroc", "auroc_two_sided", "mean_difference"]

# Statistics held at once, permutations × latents: bounds the memory (128 MB).
HELD_AT_ONCE = 16_000_000


def max_statistic_null(
    scores: ArrayLike,
    labels: ArrayLike,
    statistic: Statistic = "auroc",
    permutations: int = 200,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Return, for each permutation of the labels, the largest statistic over all latents: (permutations,).

    `scores` (n_docs, n_latents), `labels` (n_docs,) bool. "auroc" looks for latents that are higher in the
    positives; "auroc_two_sided" takes max(AUROC, 1 − AUROC); "mean_difference" positives' mean − negatives'.
    A latent whose statistic exceeds the 95th percentile of this null stands out at a familywise error of 5 %
    (Westfall & Young, 1993). Raises ValueError when a class is missing or a score is not finite.
    """
    if statistic == "mean_difference":
        values, positive = two_groups(scores, labels)
    else:
        values, positive = ranked(scores, labels)
    values = values.reshape(positive.size, -1)
    n, n1 = positive.size, int(positive.sum())
    column_sums = values.sum(axis=0)
    generator = np.random.default_rng(seed)
    best = np.empty(permutations)
    rows = max(1, HELD_AT_ONCE // values.shape[1])
    for start in range(0, permutations, rows):
        stop = min(start + rows, permutations)
        shuffled = generator.permuted(np.tile(positive, (stop - start, 1)), axis=1).astype(np.float64)
        sums = shuffled @ values  # (rows, n_latents): ranks or scores summed over the would-be positives
        if statistic == "mean_difference":
            found = sums / n1 - (column_sums - sums) / (n - n1)
        else:
            found = auroc_from_ranks(sums, n1, n)
        if statistic == "auroc_two_sided":
            found = np.maximum(found, 1 - found)
        best[start:stop] = found.max(axis=1)
    return best


def familywise_p_value(observed: ArrayLike, null: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (1 + how many of `null` reach it) / (1 + permutations) for each observed statistic, same shape.

    Never 0: the labels as they are count as one of the permutations (Phipson & Smyth, 2010).
    """
    reached = null.size - np.searchsorted(np.sort(null), np.asarray(observed, dtype=np.float64), side="left")
    return np.asarray((1 + reached) / (1 + null.size), dtype=np.float64)
