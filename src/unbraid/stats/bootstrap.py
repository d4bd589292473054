"""Intervals: Wilson's for rates, Student's for a few runs, the bootstrap by document for everything else.

Tokens of one document are not independent, so what is drawn again is documents, never tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm
from scipy.stats import t as student

# Indices drawn at once: bounds the memory of a bootstrap over many documents (32 MB).
DRAWN_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Interval:
    """A measured value with its confidence interval."""

    value: float
    """The estimate from all data."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
    n: int
    """How many independent units it rests on: trials for a rate, documents for a bootstrap."""

    def as_dict(self) -> dict[str, float | int]:
        """Return the four numbers by name."""
        return asdict(self)


def rate(successes: ArrayLike, level: float = 0.95) -> Interval:
    """Return the share of true values in `successes` (n,) with Wilson's score interval (Wilson, 1927).

    Raises ValueError when there are no trials.
    """
    trials = np.asarray(successes, dtype=bool)
    _check(trials.size > 0 and trials.ndim == 1, "a rate needs at least one trial, in one dimension")
    low, high = wilson(int(trials.sum()), trials.size, level)
    return Interval(value=float(trials.mean()), low=low, high=high, n=trials.size)


def wilson(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Return both ends of Wilson's score interval for `successes` out of `trials` > 0."""
    z = _z(level)
    share = successes / trials
    centre = share + z * z / (2 * trials)
    half = z * np.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    # At 0 and n the ends are exactly 0 and 1; rounding would leave them a hair off.
    low = 0.0 if successes == 0 else float((centre - half) / scale)
    high = 1.0 if successes == trials else float((centre + half) / scale)
    return low, high


def mean_of_runs(values: ArrayLike, level: float = 0.95) -> Interval:
    """Return the mean of a few independent runs (n,), such as seeds, with Student's t interval.

    With one run the interval is a point: `n` = 1 says so. Raises ValueError for empty or non-finite input.
    """
    values = _finite(values)
    _check(values.size > 0, "a mean needs at least one run")
    mean, n = float(values.mean()), values.size
    half = 0.0
    if n > 1:
        half = float(student.ppf((1 + level) / 2, n - 1) * values.std(ddof=1) / np.sqrt(n))
    return Interval(value=mean, low=mean - half, high=mean + half, n=n)


def bootstrap_mean(
    values: ArrayLike,
    documents: Sequence[object] | NDArray[np.generic],
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Return the mean of `values` (n,) with a percentile interval from drawing documents again.

    `documents` (n,) says which document each value comes from. With one document the interval is a point:
    `n` = 1 says so. Raises ValueError for empty, unequal or non-finite input.
    """
    values = np.asarray(values, dtype=np.float64)
    return bootstrap_ratio(values, np.ones_like(values), documents, seed, resamples, level)


def bootstrap_ratio(
    numerator: ArrayLike,
    denominator: ArrayLike,
    documents: Sequence[object] | NDArray[np.generic],
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Return Σ numerator / Σ denominator, both (n,), drawn again together by document (n,).

    Percentile interval (Efron, 1979). Resamples whose denominator is zero say nothing and are left out.
    Raises ValueError for empty, unequal or non-finite input, and when the whole denominator is zero.
    """
    above, below = _finite(numerator), _finite(denominator)
    inverse, count = _by_document(documents, above.size)
    _check(above.shape == below.shape, "numerator and denominator must have the same length")
    sums_above = np.bincount(inverse, weights=above, minlength=count)
    sums_below = np.bincount(inverse, weights=below, minlength=count)
    _check(sums_below.sum() != 0, "the denominator of a ratio sums to zero")

    generator = np.random.default_rng(seed)
    ratios: list[NDArray[np.float64]] = []
    rows = max(1, DRAWN_AT_ONCE // count)
    for start in range(0, resamples, rows):
        drawn = generator.integers(0, count, size=(min(rows, resamples - start), count))
        total_above, total_below = sums_above[drawn].sum(axis=1), sums_below[drawn].sum(axis=1)
        usable = total_below != 0
        ratios.append(total_above[usable] / total_below[usable])
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(ratios), [tail, 1 - tail])
    value = sums_above.sum() / sums_below.sum()
    return Interval(value=float(value), low=float(low), high=float(high), n=count)


def paired_difference(
    a: ArrayLike,
    b: ArrayLike,
    documents: Sequence[object] | NDArray[np.generic],
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Return mean(a) − mean(b), both (n,) and measured on the same units, drawn again by document (n,).

    The same documents are drawn for both, so what varies between documents and not between a and b cancels.
    Raises ValueError as `bootstrap_mean` does.
    """
    first, second = _finite(a), _finite(b)
    _check(first.shape == second.shape, "a paired difference needs both values for each unit")
    return bootstrap_mean(first - second, documents, seed, resamples, level)


def _by_document(documents: Sequence[object] | NDArray[np.generic], n: int) -> tuple[NDArray[np.intp], int]:
    """Number the documents by first appearance; returns each value's number (n,) and how many there are."""
    _check(len(documents) == n and n > 0, "there must be at least one value, and a document for each value")
    numbers: dict[object, int] = {}
    inverse = np.fromiter((numbers.setdefault(document, len(numbers)) for document in documents), np.intp, n)
    return inverse, len(numbers)


def _finite(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    _check(array.ndim == 1, "values must have one dimension")
    _check(bool(np.isfinite(array).all()), "values must be finite")
    return array


def _z(level: float) -> float:
    _check(0 < level < 1, "a confidence level lies between 0 and 1")
    return float(norm.ppf((1 + level) / 2))


def _check(holds: object, message: str) -> None:
    if not holds:
        raise ValueError(message)
