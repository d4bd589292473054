"""Effect sizes: how well a score separates two groups, and how small a difference could have been seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import root_scalar
from scipy.stats import norm, rankdata

from unbraid.stats.bootstrap import Interval, wilson

Alternative = Literal["two-sided", "greater", "less"]


def auroc(scores: ArrayLike, labels: ArrayLike) -> NDArray[np.float64]:
    """Return the chance that a positive scores above a negative, ties counting half.

    `scores` (n,) or (n, F), `labels` (n,) bool; returns () or (F,). Raises ValueError when only one class is
    there or a score is not finite.
    """
    ranks, positive = ranked(scores, labels)
    return auroc_from_ranks(positive.astype(np.float64) @ ranks, int(positive.sum()), positive.size)


def ranked(scores: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the ranks (1…n, ties averaged) of each column of `scores` (n, …) and the labels as bool (n,).

    Ranks do not depend on the labels: rank once, permute labels many times.
    """
    values, positive = two_groups(scores, labels)
    return np.asarray(rankdata(values, axis=0), dtype=np.float64), positive


def auroc_from_ranks(rank_sums: NDArray[np.float64], positives: int, n: int) -> NDArray[np.float64]:
    """Return the AUROC that belongs to the summed ranks of the positives (Mann–Whitney's U, scaled)."""
    u = rank_sums - positives * (positives + 1) / 2
    return np.asarray(u / (positives * (n - positives)), dtype=np.float64)


def auroc_interval(scores: ArrayLike, labels: ArrayLike, level: float = 0.95) -> Interval:
    """Return the AUROC of one column of scores (n,) with a score interval (Newcombe, 2006, method 5).

    Like Wilson's for a rate it asks which true values would make what was seen no surprise, by Hanley and
    McNeil's variance; it does not end at a point where both groups are wholly apart. Raises ValueError as
    `auroc` does.
    """
    ranks, positive = ranked(np.asarray(scores).reshape(-1), labels)
    n1 = int(positive.sum())
    n0 = positive.size - n1
    value = float(auroc_from_ranks(np.asarray(positive.astype(np.float64) @ ranks), n1, positive.size))
    z2 = float(norm.ppf((1 + level) / 2)) ** 2
    pairs = (n1 + n0) / 2 - 1

    def surprise(truth: float) -> float:
        variance = truth * (1 - truth) / (n1 * n0)
        variance *= 1 + pairs * ((1 - truth) / (2 - truth) + truth / (1 + truth))
        return (value - truth) ** 2 - z2 * variance

    # At 0 and 1 the variance vanishes, so that these are roots themselves where they were observed.
    low = 0.0 if value == 0 else _root(surprise, 0.0, min(value, 1 - 1e-12))
    high = 1.0 if value == 1 else _root(surprise, max(value, 1e-12), 1.0)
    return Interval(value=value, low=low, high=high, n=positive.size)


def auroc_p_value(
    scores: ArrayLike, labels: ArrayLike, alternative: Alternative = "two-sided"
) -> NDArray[np.float64]:
    """Return the Mann–Whitney p-value of each AUROC: normal approximation, corrected for ties and continuity.

    `scores` (n,) or (n, F), `labels` (n,); returns () or (F,). "greater" asks whether positives score higher.
    A constant column has p = 1. Raises ValueError as `auroc` does.
    """
    ranks, positive = ranked(scores, labels)
    n, n1 = positive.size, int(positive.sum())
    n0 = n - n1
    u = positive.astype(np.float64) @ ranks - n1 * (n1 + 1) / 2
    # The variance of a sum of n1 ranks drawn without replacement; averaged ranks carry the tie correction.
    deviation = np.sqrt(n1 * n0 / (n * (n - 1)) * ((ranks - (n + 1) / 2) ** 2).sum(axis=0))
    distance = u - n1 * n0 / 2
    if alternative == "less":
        distance = -distance
    elif alternative == "two-sided":
        distance = np.abs(distance)
    with np.errstate(divide="ignore", invalid="ignore"):
        tail = norm.sf((distance - 0.5) / deviation)
    p = np.minimum(1.0, 2 * tail if alternative == "two-sided" else tail)
    return np.asarray(np.where(deviation > 0, p, 1.0), dtype=np.float64)


def cohens_d(scores: ArrayLike, labels: ArrayLike) -> NDArray[np.float64]:
    """Return (mean of positives − mean of negatives) / pooled standard deviation (Cohen, 1988).

    `scores` (n,) or (n, F), `labels` (n,); returns () or (F,). Where nothing varies within the groups d is 0
    if the means agree and infinite if they do not. Raises ValueError as `auroc` does, and for fewer than 3
    scores.
    """
    values, positive = two_groups(scores, labels)
    if values.shape[0] < 3:
        raise ValueError("a pooled standard deviation needs at least three scores")
    ones, zeros = values[positive], values[~positive]
    difference = ones.mean(axis=0) - zeros.mean(axis=0)
    squares = ((ones - ones.mean(axis=0)) ** 2).sum(axis=0) + ((zeros - zeros.mean(axis=0)) ** 2).sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        d = difference / np.sqrt(squares / (values.shape[0] - 2))
    return np.asarray(np.where(difference == 0, 0.0, d), dtype=np.float64)


def risk_difference(a: ArrayLike, b: ArrayLike, level: float = 0.95) -> Interval:
    """Return rate(a) − rate(b) of two independent groups of trials, bool (n,) and (m,).

    Newcombe's hybrid score interval (1998, method 10). For the same prompts under two conditions use
    `paired_difference`. Raises ValueError when a group is empty.
    """
    first, second = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    if first.size == 0 or second.size == 0:
        raise ValueError("a risk difference needs at least one trial in each group")
    p, q = float(first.mean()), float(second.mean())
    p_low, p_high = wilson(int(first.sum()), first.size, level)
    q_low, q_high = wilson(int(second.sum()), second.size, level)
    low = p - q - float(np.hypot(p - p_low, q_high - q))
    high = p - q + float(np.hypot(p_high - p, q - q_low))
    return Interval(value=p - q, low=low, high=high, n=first.size + second.size)


def minimum_detectable_difference(
    n1: int, n2: int, base_rate: float, *, alpha: float = 0.05, power: float = 0.8
) -> float | None:
    """Return the smallest change from `base_rate` that a two-sided test of two rates would notice.

    Groups of `n1` and `n2` trials; z-test with pooled variance under the null (Fleiss, 1981), found by root
    search towards the farther of 0 and 1, where there is more room. None when even that far would go
    unnoticed. Raises ValueError when a group is empty or the rate is no probability.
    """
    if n1 < 1 or n2 < 1 or not 0 <= base_rate <= 1:
        raise ValueError("both groups need a trial, and the base rate lies between 0 and 1")
    sign = 1.0 if base_rate <= 0.5 else -1.0
    z_alpha, z_power = float(norm.ppf(1 - alpha / 2)), float(norm.ppf(power))

    def shortfall(delta: float) -> float:
        other = base_rate + sign * delta
        pooled = (n1 * base_rate + n2 * other) / (n1 + n2)
        null = np.sqrt(pooled * (1 - pooled) * (1 / n1 + 1 / n2))
        real = np.sqrt(base_rate * (1 - base_rate) / n1 + other * (1 - other) / n2)
        return float(z_alpha * null + z_power * real - delta)

    room = max(base_rate, 1 - base_rate)
    if shortfall(room) > 0:
        return None
    # At delta = 0 and a base rate of 0 the shortfall touches 0, which is no difference: start just above.
    return _root(shortfall, 1e-12, room)


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    return float(root_scalar(function, bracket=(low, high)).root)


def two_groups(scores: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return scores (n, …) as float64 and labels (n,) as bool; ValueError unless both classes are there."""
    values, positive = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=bool)
    if values.ndim not in (1, 2) or positive.shape != values.shape[:1]:
        raise ValueError("scores are (n,) or (n, F) and labels (n,)")
    if positive.all() or not positive.any():
        raise ValueError("both positives and negatives are needed")
    if not np.isfinite(values).all():
        raise ValueError("scores must be finite")
    return values, positive
