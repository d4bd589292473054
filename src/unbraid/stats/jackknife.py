"""Intervals of statistics that are no ratio of sums, AUROC and correlation, by document."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as student

from unbraid.stats.bootstrap import ROUNDING, Interval, as_equal, jackknife_error, share_interval
from unbraid.stats.effects import auroc

Matrix = NDArray[np.float64]
FINITE = (-1 + 1e-12, 1 - 1e-12)
"""Correlations whose Fisher's z is finite."""


def auroc_by_document(scores: ArrayLike, labels: ArrayLike, documents: Sequence[object]) -> Interval:
    """AUROC of scores (n,) for labels (n,), of which those of one document hang together.

    `share_interval` of the jackknife's standard error over documents, for at most n trials: so it does not
    end at a point where both groups are wholly apart, nor nearly at one where all but a few are.
    `benchmarks/calibration.py` measures it. Raises ValueError as `auroc` does.
    """
    values, positive = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=bool)
    value = float(auroc(values, positive))
    inverse, n = _numbered(documents)
    up, down = inverse[positive], inverse[~positive]
    above, below = values[positive], values[~positive]
    # (positives, negatives): with ties half, AUROC is the mean.
    wins = (above[:, None] > below[None]) + 0.5 * (above[:, None] == below[None])
    own = (wins * (up[:, None] == down[None])).sum(axis=1)
    left = wins.sum() - _summed(up, wins.sum(axis=1) - own, n) - _summed(down, wins.sum(axis=0), n)
    pairs = (len(up) - _summed(up, None, n)) * (len(down) - _summed(down, None, n))
    without = np.where(pairs > 0, left / np.maximum(pairs, 1), np.nan)
    error = jackknife_error(without, value)
    return share_interval(value, error, n, values.size, equal=as_equal(_summed(inverse, None, n)))


def _summed(document: NDArray[np.intp], weights: Matrix | None, n: int) -> Matrix:
    """Sums, or counts, by document (n,)."""
    return np.bincount(document, weights, n).astype(np.float64)


def correlation_by_document(x: ArrayLike, y: ArrayLike, documents: Sequence[object]) -> Interval | None:
    """Pearson's correlation of x and y (n,), of which those of one document hang together.

    Student's interval about Fisher's z = artanh r, whose standard error is the jackknife's over documents
    (Efron and Tibshirani, 1993, chapter 11). Percentiles of documents drawn again are too narrow for twenty
    of them; `benchmarks/calibration.py` measures both. All of −1 to 1 where without one document nothing
    varies; with one document a point, and `n` = 1 says so. None where x or y does not vary.
    """
    first, second = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if first.size < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    first, second = (first - first.mean()) / first.std(), (second - second.mean()) / second.std()
    columns = np.stack([np.ones_like(first), first, second, first**2, second**2, first * second], axis=1)
    inverse, n = _numbered(documents)
    sums = np.zeros((n, columns.shape[1]))
    np.add.at(sums, inverse, columns)
    value = float(np.clip((first * second).mean(), -1, 1))
    if n == 1:
        return Interval(value, value, value, 1)
    without = _correlation(sums.sum(axis=0) - sums)
    if not np.isfinite(without).all():
        return Interval(value, -1.0, 1.0, n)
    z, apart = np.arctanh(np.clip(value, *FINITE)), np.arctanh(np.clip(without, *FINITE))
    error = np.sqrt((n - 1) / n * np.square(apart - z).sum())
    low, high = np.tanh([z - student.ppf(0.975, n - 1) * error, z + student.ppf(0.975, n - 1) * error])
    return Interval(value, min(float(low), value), max(float(high), value), n)


def _correlation(sums: Matrix) -> Matrix:
    """Correlations (m,) from sums of 1, x, y, x², y², x·y, (m, 6); not finite where x or y does not vary."""
    n, a, b, aa, bb, ab = sums.T
    with np.errstate(divide="ignore", invalid="ignore"):
        a, b = a / n, b / n
        spread = (aa / n - a**2) * (bb / n - b**2)
        return np.where(spread > ROUNDING, (ab / n - a * b) / np.sqrt(np.maximum(spread, 0)), np.nan)


def _numbered(documents: Sequence[object]) -> tuple[NDArray[np.intp], int]:
    """Each value's document by number (n,), and how many there are."""
    numbers: dict[object, int] = {}
    inverse = [numbers.setdefault(document, len(numbers)) for document in documents]
    return np.array(inverse, dtype=np.intp), len(numbers)
