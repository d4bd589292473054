"""Intervals: Wilson's for rates, Student's for runs, the studentised bootstrap by document for the rest.

Tokens of one document are not independent, so what is drawn again is documents, never tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm
from scipy.stats import t as student

# Indices drawn at once: bounds the memory of a bootstrap over many documents (16 MB a column).
DRAWN_AT_ONCE = 2_000_000

FEWEST = 10
"""Documents below which resamples repeat each other too much to tell how an estimate is distributed."""
RARE = 0.001
"""Share of resamples that may have no spread: those would decide the ends of the interval."""
ROUNDING = 1e-12
"""What rounding leaves of nothing, relative to what was added up."""


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

    def within(self, least: float = -np.inf, most: float = np.inf) -> Interval:
        """Return the same for a quantity that cannot lie outside: a studentised interval does not know."""
        value, low, high = (min(max(number, least), most) for number in (self.value, self.low, self.high))
        return Interval(value, low, high, self.n)


def rate(successes: ArrayLike, level: float = 0.95) -> Interval:
    """Return the share of true values in `successes` (n,) with Wilson's score interval (Wilson, 1927).

    Raises ValueError when there are no trials.
    """
    trials = np.asarray(successes, dtype=bool)
    _check(trials.size > 0 and trials.ndim == 1, "a rate needs at least one trial, in one dimension")
    low, high = wilson(int(trials.sum()), trials.size, level)
    return Interval(value=float(trials.mean()), low=low, high=high, n=trials.size)


def wilson(successes: float, trials: float, level: float = 0.95) -> tuple[float, float]:
    """Return both ends of Wilson's score interval for `successes` out of `trials` > 0; need not be whole."""
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
        half = float(_t(level, n - 1) * values.std(ddof=1) / np.sqrt(n))
    return Interval(value=mean, low=mean - half, high=mean + half, n=n)


def rate_by_document(
    successes: ArrayLike, documents: Sequence[object] | NDArray[np.generic], level: float = 0.95
) -> Interval:
    """Return the share of true values in `successes` (n,), of which those of one document hang together.

    Wilson's interval for as many trials as would vary as much if they were independent (Korn and Graubard,
    1998); with the same outcome everywhere, for one trial a document. Raises ValueError for empty or unequal
    input.
    """
    trials = np.asarray(successes, dtype=bool)
    inverse, count = _by_document(documents, trials.size)
    hits, sizes = np.bincount(inverse, weights=trials), np.bincount(inverse).astype(np.float64)
    share = float(hits.sum() / sizes.sum())
    error = _standard_error(hits - share * sizes, sizes)
    return share_interval(share, error, count, trials.size, level, as_equal(sizes))


def jackknife_error(without: ArrayLike, value: float) -> float:
    """Return the standard error of `value` from the same number without each of n units (n,) (Efron and
    Tibshirani, 1993, chapter 11); a unit without which nothing is left (not finite) says nothing."""
    left = np.asarray(without, dtype=np.float64)
    apart = np.where(np.isfinite(left), left - value, 0.0)
    return float(np.sqrt((len(left) - 1) / len(left) * np.square(apart - apart.mean()).sum()))


def as_equal(sizes: ArrayLike) -> float:
    """Return how many units of equal size tell as much of a spread as units of these sizes (n,), at most n
    and at least 2 (Kish, 1965): where few documents hold most tokens, those few alone tell it."""
    given = np.asarray(sizes, dtype=np.float64)
    return max(2.0, float(given.sum() ** 2 / np.square(given).sum()))


def share_interval(
    share: float,
    error: float,
    documents: int,
    trials: float = np.inf,
    level: float = 0.95,
    equal: float | None = None,
) -> Interval:
    """Return a number from 0 to 1 of so many documents and this standard error, with Wilson's interval for as
    many trials as would vary as much, at most `trials`; where nothing varies, for one trial a document.
    `equal` documents of one size would tell the error as well (`as_equal`); all of them unless given."""
    effective = float(documents)
    if error > ROUNDING:
        # No more than there are, however evenly they fall; fewer where few documents tell the deviation.
        effective = min(share * (1 - share) / error**2, float(trials))
        effective *= (_z(level) / _t(level, (equal or documents) - 1)) ** 2
    if effective <= ROUNDING:
        return Interval(share, 0.0, 1.0, documents)
    low, high = wilson(share * effective, effective, level)
    return Interval(value=share, low=min(low, share), high=max(high, share), n=documents)


def bootstrap_mean(
    values: ArrayLike,
    documents: Sequence[object] | NDArray[np.generic],
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Return the mean of `values` (n,) with the interval of `bootstrap_ratio` from drawing documents again.

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

    Studentised interval (Efron and Tibshirani, 1993, chapter 12): what is looked at in each resample is its
    distance from the estimate in its own, linearised, standard errors; the estimate's own one is the
    jackknife's. Plain percentiles are too narrow for twenty or thirty documents and for skewed values;
    `benchmarks/calibration.py` measures both. Student's t where there are fewer than `FEWEST` documents, and
    where resamples without any spread are no rarity, as when one document alone differs from the others.
    Raises ValueError for empty, unequal or non-finite input, and when the whole denominator is zero.
    """
    above, below = _finite(numerator), _finite(denominator)
    inverse, count = _by_document(documents, above.size)
    _check(above.shape == below.shape, "numerator and denominator must have the same length")
    sizes = np.bincount(inverse, weights=below, minlength=count).astype(np.float64)
    _check(sizes.sum() != 0, "the denominator of a ratio sums to zero")
    value = float(above.sum() / sizes.sum())
    # What each document adds to numerator − value · denominator; zero in sum.
    rest = np.bincount(inverse, weights=above, minlength=count) - value * sizes
    error = _standard_error(rest, sizes)
    if count == 1 or error <= ROUNDING * abs(value):
        return Interval(value, value, value, count)

    tail = (1 - level) / 2
    left, right = -_t(level, count - 1), _t(level, count - 1)
    if count >= FEWEST:
        drawn = _studentised(rest, sizes, np.random.default_rng(seed), resamples)
        drawn = drawn[~np.isnan(drawn)]
        if drawn.size and np.isinf(drawn).mean() <= RARE:
            left, right = np.quantile(drawn, [tail, 1 - tail], method="inverted_cdf")
    # Turned round: a resample far above the estimate says that the truth may be as far below it.
    low, high = value - max(float(right), 0.0) * error, value - min(float(left), 0.0) * error
    return Interval(value=value, low=low, high=high, n=count)


def bootstrap_unexplained(
    error: ArrayLike,
    square: ArrayLike,
    total: ArrayLike,
    count: ArrayLike,
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Return Σ‖x − x̂‖² / Σ‖x − E x‖², the fraction of variance unexplained, from sums over each document.

    error (n,): Σ‖x − x̂‖². square (n,): Σ‖x‖². total (n, d): Σ x. count (n,): tokens. The distances from the
    mean over all documents are drawn again like the errors: a mean of each resample's own would make every
    resample's variance too small once more. Raises ValueError as `bootstrap_ratio` does.
    """
    sums, tokens = np.asarray(total, dtype=np.float64), _finite(count)
    mean = sums.sum(axis=0) / tokens.sum()
    spread = _finite(square) - 2 * sums @ mean + tokens * float(mean @ mean)
    return bootstrap_ratio(error, spread, range(len(tokens)), seed, resamples, level)


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
    Where all values are 0 or 1 most differences are 0, and a handful of others make a poor bootstrap; there
    the interval is Student's about the mean with two pairs more, one for each sign (Bonett and Price, 2012).
    Raises ValueError as `bootstrap_mean` does.
    """
    first, second = _finite(a), _finite(b)
    _check(first.shape == second.shape, "a paired difference needs both values for each unit")
    if not bool(np.isin([first, second], (0.0, 1.0)).all()):
        return bootstrap_mean(first - second, documents, seed, resamples, level)
    inverse, count = _by_document(documents, first.size)
    sizes = np.bincount(inverse).astype(np.float64)
    changes = np.bincount(inverse, weights=first - second)
    value = float(changes.sum() / sizes.sum())
    if count == 1:
        return Interval(value, value, value, 1)
    changes, sizes = np.append(changes, [1.0, -1.0]), np.append(sizes, [1.0, 1.0])
    centre = changes.sum() / sizes.sum()
    half = _t(level, count + 1) * _standard_error(changes - centre * sizes, sizes)
    low, high = max(-1.0, float(centre - half)), min(1.0, float(centre + half))
    return Interval(value=value, low=min(low, value), high=max(high, value), n=count)


def _studentised(
    rest: NDArray[np.float64], sizes: NDArray[np.float64], generator: np.random.Generator, resamples: int
) -> NDArray[np.float64]:
    """(ratio − estimate) / standard error in each resample of documents: (resamples,).

    NaN says nothing: an empty denominator, or no spread and no distance either. Infinite: a distance, and no
    spread to measure it by.
    """
    n = len(rest)
    rest, sizes = rest / np.abs(rest).max(), sizes / np.abs(sizes).max()  # squares must not overflow
    columns = (rest, sizes, rest * rest, rest * sizes, sizes * sizes)
    parts: list[NDArray[np.float64]] = []
    rows = max(1, DRAWN_AT_ONCE // n)
    for start in range(0, resamples, rows):
        drawn = generator.integers(0, n, size=(min(rows, resamples - start), n))
        r, b, rr, rb, bb = (column[drawn].sum(axis=1) for column in columns)
        with np.errstate(divide="ignore", invalid="ignore"):
            distance = r / b
            # Σ (rest − distance · size)², a resample's own residuals.
            squares = rr - 2 * distance * rb + distance**2 * bb
            squares[squares <= ROUNDING * (rr + distance**2 * bb)] = 0.0
            parts.append(np.where(b == 0, np.nan, r * np.sign(b) / np.sqrt(n / (n - 1) * squares)))
    return np.concatenate(parts)


def _standard_error(rest: NDArray[np.float64], sizes: NDArray[np.float64]) -> float:
    """The jackknife's standard error of a ratio (Efron and Tibshirani, 1993, chapter 11) from each document's
    rest (n,) and denominator (n,); 0 for one document.

    A long document pulls the estimate to itself and leaves a small rest; without it the estimate differs from
    the whole by rest / (total − its own).
    """
    n, total = len(rest), float(sizes.sum())
    if n == 1:
        return 0.0
    without = 1 - np.clip(sizes / total, 0.0, 1 - 1 / n)  # at least 1/n, where sizes of both signs cancel
    most = float(np.abs(rest).max()) or 1.0
    return float(most * np.sqrt((n - 1) / n * np.square(rest / most / without).sum()) / abs(total))


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


def _t(level: float, freedom: float) -> float:
    _check(0 < level < 1, "a confidence level lies between 0 and 1")
    return float(student.ppf((1 + level) / 2, freedom))


def _z(level: float) -> float:
    _check(0 < level < 1, "a confidence level lies between 0 and 1")
    return float(norm.ppf((1 + level) / 2))


def _check(holds: object, message: str) -> None:
    if not holds:
        raise ValueError(message)
