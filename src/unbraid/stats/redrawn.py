"""Intervals of statistics that are no ratio of sums: AUROC and correlation, documents drawn again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from unbraid.stats.bootstrap import Interval
from unbraid.stats.effects import auroc, auroc_interval

Matrix = NDArray[np.float64]


def auroc_by_document(
    scores: ArrayLike, labels: ArrayLike, documents: Sequence[object], seed: int, resamples: int = 2000
) -> Interval:
    """AUROC of scores (n,) for labels (n,), of which those of one document hang together.

    At each end the wider of two: percentiles from documents drawn again, and Newcombe's score interval, which
    does not end at a point where both groups are wholly apart.  Raises ValueError as `auroc` does.
    """
    values, positive = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=bool)
    whole = auroc_interval(values, positive)
    # With ties half, AUROC is Σ over pairs; weights of both members multiply.
    above, below = values[positive], values[~positive]
    wins = (above[:, None] > below[None]) + 0.5 * (above[:, None] == below[None])

    def statistic(weights: Matrix) -> Matrix:
        a, b = weights[:, positive], weights[:, ~positive]
        with np.errstate(divide="ignore", invalid="ignore"):
            return ((a @ wins) * b).sum(axis=1) / (a.sum(axis=1) * b.sum(axis=1))

    n, low, high = _percentiles(statistic, documents, seed, resamples)
    value = float(auroc(values, positive))
    return Interval(value, min(low, whole.low, value), max(high, whole.high, value), n)


def correlation_by_document(
    x: ArrayLike, y: ArrayLike, documents: Sequence[object], seed: int, resamples: int = 2000
) -> Interval | None:
    """Pearson's correlation of x and y (n,), with percentiles from documents drawn again.

    None where x or y does not vary.
    """
    first, second = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if first.size < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    first, second = (first - first.mean()) / first.std(), (second - second.mean()) / second.std()
    columns = np.stack([np.ones_like(first), first, second, first**2, second**2, first * second], axis=1)

    def statistic(weights: Matrix) -> Matrix:
        n, a, b, aa, bb, ab = (weights @ columns).T
        with np.errstate(divide="ignore", invalid="ignore"):
            spread = np.sqrt((aa / n - (a / n) ** 2) * (bb / n - (b / n) ** 2))
            return np.clip((ab / n - a * b / n**2) / spread, -1, 1)

    n, low, high = _percentiles(statistic, documents, seed, resamples)
    value = float(np.clip((first * second).mean(), -1, 1))
    return Interval(value, min(low, value), max(high, value), n)


def _percentiles(
    statistic: Callable[[Matrix], Matrix], documents: Sequence[object], seed: int, resamples: int
) -> tuple[int, float, float]:
    """How many documents there are, and both ends of a statistic of weights (resamples, n)."""
    numbers: dict[object, int] = {}
    inverse = np.array([numbers.setdefault(document, len(numbers)) for document in documents])
    n = len(numbers)
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    drawn = np.concatenate(
        [statistic(some[:, inverse].astype(np.float64)) for some in np.array_split(weights, 20)]
    )
    drawn = drawn[np.isfinite(drawn)]
    if not drawn.size:
        return n, np.inf, -np.inf
    low, high = np.quantile(drawn, [0.025, 0.975])
    return n, float(low), float(high)
