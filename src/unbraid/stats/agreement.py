"""How far people who judge the same things agree, beyond what their habits alone would give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unbraid.stats.bootstrap import Interval

Tables = NDArray[np.float64]


@dataclass(frozen=True)
class Agreement:
    """Agreement of all pairs of judgements of one thing by different people; intervals over things."""

    units: int
    """Things that at least two people judged."""
    raters: tuple[str, ...]
    """The people."""
    percent: Interval
    """Share of the pairs of judgements that are the same, from 0 to 1."""
    krippendorff: Interval | None
    """Krippendorff's alpha for nominal values; None where all judgements are the same, which leaves nothing
    to agree on by chance."""
    cohen: dict[tuple[str, str], Interval | None]
    """Cohen's kappa of each two people who judged a thing both; None as above."""

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON values; pairs of people are joined with " & "."""
        return {
            **asdict(self),
            "cohen": {" & ".join(pair): k and k.as_dict() for pair, k in self.cohen.items()},
        }


def agreement(
    judgements: Sequence[tuple[str, str, str]], *, seed: int = 0, resamples: int = 2000
) -> Agreement | None:
    """Agreement of (thing, person, value), at most one for each thing and person.

    Intervals are percentiles of resamples of the things.  None where no two people judged the same thing.
    """
    values = sorted({value for _, _, value in judgements})
    by_unit: dict[str, dict[str, int]] = {}
    for unit, rater, value in judgements:
        by_unit.setdefault(unit, {})[rater] = values.index(value)
    units = [by_unit[unit] for unit in sorted(by_unit) if len(by_unit[unit]) > 1]
    if not units:
        return None
    # Krippendorff's coincidences: each ordered pair of judgements of a thing, weighed 1 / (judges − 1).
    tables = np.zeros((len(units), len(values), len(values)))
    for table, unit in zip(tables, units, strict=True):
        counts = np.bincount(list(unit.values()), minlength=len(values))
        table += (np.outer(counts, counts) - np.diag(counts)) / (len(unit) - 1)
    percent = _resampled(tables, _percent, seed, resamples)
    assert percent is not None
    raters = sorted({rater for unit in units for rater in unit})
    cohen: dict[tuple[str, str], Interval | None] = {}
    for i, first in enumerate(raters):
        for second in raters[i + 1 :]:
            both = [unit for unit in units if first in unit and second in unit]
            if both:
                pairs = np.zeros((len(both), len(values), len(values)))
                for table, unit in zip(pairs, both, strict=True):
                    table[unit[first], unit[second]] = 1
                cohen[first, second] = _resampled(pairs, _kappa, seed, resamples)
    alpha = _resampled(tables, _alpha, seed, resamples)
    return Agreement(len(units), tuple(raters), percent, alpha, cohen)


def _resampled(
    tables: Tables, statistic: Callable[[Tables], Tables], seed: int, resamples: int
) -> Interval | None:
    """A statistic of summed tables (n, k, k), with the percentiles of resamples of their rows."""
    n = len(tables)
    value = float(statistic(tables.sum(axis=0)[None])[0])
    if np.isnan(value):
        return None
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    drawn = statistic(np.tensordot(weights, tables, axes=1))
    low, high = np.quantile(drawn[~np.isnan(drawn)], [0.025, 0.975])
    return Interval(value, min(float(low), value), max(float(high), value), n)


def _percent(tables: Tables) -> Tables:
    return np.trace(tables, axis1=1, axis2=2) / tables.sum(axis=(1, 2))


def _kappa(tables: Tables) -> Tables:
    """Cohen's kappa (1960) of confusion tables (m, k, k) -> (m,); NaN where chance alone agrees fully."""
    shares = tables / tables.sum(axis=(1, 2), keepdims=True)
    chance = (shares.sum(axis=1) * shares.sum(axis=2)).sum(axis=1)
    return _beyond(np.trace(shares, axis1=1, axis2=2), chance)


def _alpha(tables: Tables) -> Tables:
    """Krippendorff's alpha (2011) of coincidence tables (m, k, k) -> (m,), nominal values."""
    totals, n = tables.sum(axis=2), tables.sum(axis=(1, 2))
    chance = (totals * (totals - 1)).sum(axis=1) / (n * (n - 1))
    return _beyond(np.trace(tables, axis1=1, axis2=2) / n, chance)


def _beyond(observed: Tables, chance: Tables) -> Tables:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(chance < 1 - 1e-12, (observed - chance) / (1 - chance), np.nan)
