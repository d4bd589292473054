"""Intervals of statistics that are no ratio of sums, AUROC and correlation, by document."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm, rankdata
from scipy.stats import t as student

from unbraid.stats.bootstrap import ROUNDING, Interval, wilson
from unbraid.stats.effects import auroc

Matrix = NDArray[np.float64]
FINITE = (-1 + 1e-12, 1 - 1e-12)
"""Correlations whose Fisher's z is finite."""


def auroc_by_document(scores: ArrayLike, labels: ArrayLike, documents: Sequence[object]) -> Interval:
    """AUROC of scores (n,) for labels (n,), of which those of one document hang together.

    Wilson's interval for as many trials as would vary as much, by the jackknife over documents, each weighed
    by its size; Student's t has as many degrees of freedom as such documents leave (Bell and McCaffrey,
    2002). Where both groups are nearly apart hardly anything varies, and the jackknife says too little. So
    there are no more trials than windows, or than as many of both kinds would be worth (Hanley and McNeil,
    1982): fewer by how far ranks hang together within documents, more by the share of tied pairs, which count
    half whatever is drawn.
    A truth so near to 1 that not even groups wholly apart would be too good for it can be missed from one
    side alone, which then gets all of the 5 % (compare Blaker, 2000); so too near to 0.
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
    without = np.where(pairs > 0, left / np.maximum(pairs, 1), value)
    held = _summed(inverse, None, n) / values.size
    variance = float(((1 - held) * (without - value) ** 2).sum())
    alone, common = _together(above, below, up, down, n)
    # Positives and negatives of a document move together; it cancels, but less where both are nearly apart.
    balanced = 4 * len(up) * len(down) / values.size
    most, apart = (balanced / max(1.0, alone - 4 * at * (1 - at) * common) for at in (value, 1.0))
    tied = float((wins == 0.5).mean())

    def ends(level: float) -> tuple[float, float]:
        trials = min(float(n), most)
        if variance > ROUNDING**2:
            shrink = float(norm.ppf((1 + level) / 2) / student.ppf((1 + level) / 2, _freedom(held)))
            trials = min(value * (1 - value) / variance * shrink**2, most * (1 + tied))
        return wilson(value * trials, trials, level)

    low, high = ends(0.95)
    lower, upper = ends(0.90)
    least = max(0.5, wilson(apart, apart)[0])  # of groups wholly apart: hardly one is higher
    if high > least:
        high = max(least, upper)
    if low < 1 - least:
        low = min(1 - least, lower)
    return Interval(value, min(low, value), max(high, value), n)


def _freedom(held: Matrix) -> float:
    """Degrees of freedom of a variance from documents that hold these shares (n,): n − 1 where all are equal.

    Satterthwaite's for Σ d² / (1 − share), d a document's deviation from the mean of equal, independent
    windows times its share (Bell and McCaffrey, 2002).
    """
    pulled = held**2 / (1 - held)
    return float(1 / (np.square(held).sum() + pulled.sum() ** 2 - np.square(pulled).sum()))


def _together(
    above: Matrix, below: Matrix, up: NDArray[np.intp], down: NDArray[np.intp], n: int
) -> tuple[float, float]:
    """How many times as much as with independent windows both groups' mean ranks vary, and how much of it
    they have in common. Ranks are those within a group: this is told even where the groups are wholly apart.
    """
    first, second = ((rankdata(of) - (of.size + 1) / 2) / of.size**2 for of in (above, below))
    independent = float(np.square(first).sum() + np.square(second).sum())
    if independent <= 0:
        return 1.0, 0.0
    a, b = _summed(up, first, n), _summed(down, second, n)
    return float((a @ a + b @ b) / independent), float(2 * (a @ b) / independent)


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
