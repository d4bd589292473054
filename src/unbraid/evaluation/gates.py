"""Limits that an evaluation has to keep, such as `fvu<=0.05 dead<0.02`, judged on intervals.

A limit from above holds when the interval's upper end keeps it, one from below when its lower end does. So
what is too uncertain to tell does not pass, and neither does a metric without a value.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unbraid.evaluation.evaluate import DEFINITIONS, Evaluation
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
    """Why it has none."""

    def __str__(self) -> str:
        if self.found is None:
            return f"{self.limit} is broken: {self.limit.metric} has no value ({self.why})"
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
            **({"found": self.found.as_dict()} if self.found else {"why": self.why}),
        }


def read_limits(text: str, metrics: Mapping[str, object] = DEFINITIONS) -> list[Limit]:
    """Limits that are separated by spaces or commas. Raises UserError for one that cannot be read, and for a
    metric that nobody measures."""
    found: list[Limit] = []
    at = 0
    while at < len(text):
        one = _LIMIT.match(text, at)
        if one is None:
            raise UserError(
                f"--require cannot be read from {text[at:].strip()!r} on; write it like 'fvu<=0.05 dead<0.02'"
            )
        name, sign, bound = one[1], one[2], float(one[3])
        if name not in metrics:
            near = difflib.get_close_matches(name, metrics, n=1)
            advice = f"did you mean {near[0]}?" if near else f"there are {', '.join(metrics)}"
            raise UserError(f"--require names {name!r}, which is no metric; {advice}")
        if not math.isfinite(bound):
            raise UserError(f"--require compares {name} with {one[3]}, which is too large a number")
        found.append(Limit(name, sign, bound))
        at = one.end()
    if not found:
        raise UserError("--require is empty; write it like 'fvu<=0.05 dead<0.02' or leave it out")
    return found


def judge(limits: Sequence[Limit], evaluation: Evaluation) -> list[Verdict]:
    """A verdict for each limit."""
    verdicts: list[Verdict] = []
    for limit in limits:
        found = evaluation.metrics.get(limit.metric)
        if found is None:
            why = evaluation.undefined.get(limit.metric, "it was not measured")
            verdicts.append(Verdict(limit, False, None, why))
        else:
            verdicts.append(Verdict(limit, limit.holds(found), found))
    return verdicts
