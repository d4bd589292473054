"""Limits that an evaluation has to keep, such as `fvu<=0.05 dead<0.02`, judged on intervals.

A limit from above holds when the interval's upper end keeps it, one from below when its lower end does. So
what is too uncertain to tell does not pass, and neither does a metric without a value or without an interval.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from unbraid.evaluation.evaluate import DEFINITIONS, Evaluation
from unbraid.evaluation.labelled import SuiteResult
from unbraid.evaluation.suites import DEFINITIONS as SUITES
from unbraid.manifest.errors import UserError
from unbraid.stats.bootstrap import Interval

_LIMIT = re.compile(r"\s*(\w+)\s*(<=|>=|<|>)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)(?=[\s,]|$),?\s*")


@dataclass(frozen=True)
class Limit:
    """What one metric has to keep."""

    metric: str
    """Its name."""
    sign: str
    """<=, <, >= or >."""
    bound: float
    """The number that it is compared with."""

    def __str__(self) -> str:
        return f"{self.metric}{self.sign}{self.bound:g}"

    def holds(self, found: Interval) -> bool:
        """Whether the whole interval keeps the limit."""
        if self.sign.startswith("<"):
            return found.high <= self.bound if self.sign == "<=" else found.high < self.bound
        return found.low >= self.bound if self.sign == ">=" else found.low > self.bound


@dataclass(frozen=True)
class Verdict:
    """Whether a limit was kept, and by what."""

    limit: Limit
    """The limit."""
    kept: bool
    """Whether it was."""
    found: Interval | None
    """The metric; None where it has no value."""
    why: str = ""
    """Why it has none, or no interval."""

    def __str__(self) -> str:
        if self.found is None:
            return f"{self.limit} is broken: {self.limit.metric} has no value ({self.why})"
        if self.why:
            return f"{self.limit} is broken: {self.why} (value {self.found.value:.4g})"
        upper = self.limit.sign.startswith("<")
        end, number = ("upper", self.found.high) if upper else ("lower", self.found.low)
        said = "kept" if self.kept else "broken"
        value = f"{self.found.value:.4g}"
        return f"{self.limit} is {said}: the {end} end of its 95 % interval is {number:.4g} (value {value})"

    def as_dict(self) -> dict[str, Any]:
        """The verdict as JSON values."""
        return {
            "limit": str(self.limit),
            "kept": self.kept,
            **({"found": self.found.as_dict()} if self.found else {}),
            **({} if self.found and not self.why else {"why": self.why}),
        }


def read_limits(text: str, suites: Sequence[str] = ()) -> list[Limit]:
    """Limits that are separated by spaces or commas, on metrics of `evaluate` and of these suites.

    Raises UserError for one that cannot be read, for a metric that nobody measures, and for one of a suite
    that is not among `suites`.
    """
    found: list[Limit] = []
    at = 0
    while at < len(text):
        one = _LIMIT.match(text, at)
        if one is None:
            raise UserError(
                f"--require cannot be read from {text[at:].strip()!r} on; write it like 'fvu<=0.05 dead<0.02'"
            )
        name, sign, bound = one[1], one[2], float(one[3])
        _check_name(name, suites)
        if not math.isfinite(bound):
            raise UserError(f"--require compares {name} with {one[3]}, which is too large a number")
        found.append(Limit(name, sign, bound))
        at = one.end()
    if not found:
        raise UserError("--require is empty; write it like 'fvu<=0.05 dead<0.02' or leave it out")
    return found


def _check_name(name: str, suites: Sequence[str]) -> None:
    if name in DEFINITIONS:
        return
    home = next((suite for suite, metrics in SUITES.items() if name in metrics), None)
    if home in suites:
        return
    if home:
        raise UserError(f"--require names {name}, which the suite {home} measures; add --suite {home}")
    near = difflib.get_close_matches(name, [*DEFINITIONS, *(m for its in SUITES.values() for m in its)], n=1)
    if near:
        advice = f"did you mean {near[0]}?"
    else:
        of_suites = [f"with --suite {suite} {', '.join(metrics)}" for suite, metrics in SUITES.items()]
        advice = f"there are {'; '.join([', '.join(DEFINITIONS), *of_suites])}"
    raise UserError(f"--require names {name!r}, which is no metric; {advice}")


def judge(
    limits: Sequence[Limit], evaluation: Evaluation, name: str = "", suites: Sequence[SuiteResult] = ()
) -> list[Verdict]:
    """A verdict for each limit, on an evaluation and on the suites' rows of the autoencoder `name`."""
    measured, why = dict(evaluation.metrics), dict(evaluation.undefined)
    for result in suites:
        if own := result.rows.get(result.details.get("row_of", {}).get(name, name)):
            measured |= own
            notes = "; ".join(result.notes)
            why |= {metric: notes for metric in SUITES[result.suite] if notes and metric not in own}
    verdicts: list[Verdict] = []
    for limit in limits:
        found = measured.get(limit.metric)
        if found is None:
            verdicts.append(Verdict(limit, False, None, why.get(limit.metric, "it was not measured")))
        elif found.n < 2:
            alone = f"{limit.metric} rests on one measurement alone and has no interval"
            verdicts.append(Verdict(limit, False, found, alone))
        else:
            verdicts.append(Verdict(limit, limit.holds(found), found))
    return verdicts
