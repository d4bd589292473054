"""How far people who judge the same things agree, beyond what their habits alone would give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unbraid.stats.bootstrap import Interval, jackknife_error, share_interval

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


def agreement(judgements: Sequence[tuple[str, str, str]]) -> Agreement | None:
    """Agreement of (thing, person, value), at most one for each thing and person.

    None where no two people judged the same thing.
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
    judges = np.array([len(unit) for unit in units])
    among = int((judges * (judges - 1) // 2).sum())
    percent = _interval(tables, _none, among)
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
                cohen[first, second] = _interval(pairs, _cohens, len(both))
    alpha = _interval(tables, _krippendorffs, among)
    return Agreement(len(units), tuple(raters), percent, alpha, cohen)


def _interval(tables: Tables, chance: Callable[[Tables], Tables], pairs: int) -> Interval | None:
    """1 − c·D of tables (n, k, k): D the share of pairs of judgements that differ, c = 1 / (1 − chance).

    Wilson's interval of D, for as many pairs as would make 1 − c·D vary as much if they were independent, at
    most those that there are; its variance is the jackknife's over the n things. Where nothing varies it is
    one pair a thing: so full agreement has an interval with a width, which resampled things do not give.
    None where chance alone agrees fully.
    """
    n = len(tables)
    total = tables.sum(axis=0)
    value, scale, differ = (float(number[0]) for number in _beyond(total[None], chance))
    if np.isnan(value):
        return None
    error = 0.0
    if n > 1:
        without = _beyond(total - tables, chance)[0]
        error = jackknife_error(without, value)
    of = share_interval(differ, error / scale, n, pairs)
    return Interval(value, min(1 - scale * of.high, value), max(1 - scale * of.low, value), n)


def _beyond(tables: Tables, chance: Callable[[Tables], Tables]) -> tuple[Tables, Tables, Tables]:
    """1 − c·D, c and D of tables (m, k, k), each (m,); the first two NaN where chance alone agrees fully."""
    differ = 1 - np.trace(tables, axis1=1, axis2=2) / tables.sum(axis=(1, 2))
    expected = chance(tables)
    scale = 1 / np.where(expected < 1 - 1e-12, 1 - expected, np.nan)
    return 1 - scale * differ, scale, differ


def _none(tables: Tables) -> Tables:
    return np.zeros(len(tables))


def _cohens(tables: Tables) -> Tables:
    """How often two people agree by chance, of confusion tables (m, k, k) -> (m,) (Cohen, 1960)."""
    shares = tables / tables.sum(axis=(1, 2), keepdims=True)
    return (shares.sum(axis=1) * shares.sum(axis=2)).sum(axis=1)


def _krippendorffs(tables: Tables) -> Tables:
    """The same of coincidence tables (m, k, k) -> (m,), nominal values (Krippendorff, 2011)."""
    totals, n = tables.sum(axis=2), tables.sum(axis=(1, 2))
    return (totals * (totals - 1)).sum(axis=1) / (n * (n - 1))
