"""Turns: the same work by several contenders, one after the other, and what their ratios are."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np

from unbraid.stats.bootstrap import Interval

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
"""What counts as time. Processor time is steady on a busy machine, and leaves out waiting for the disk."""
clock = [CLOCKS["wall"]]


def timed(work: Callable[[], object]) -> float:
    """Seconds that something takes."""
    began = clock[0]()
    work()
    return clock[0]() - began


def turns(jobs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each job in every turn but the first, which warms up; the order rotates."""
    names = list(jobs)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        said: list[str] = []
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds = jobs[name]()
            said.append(f"{name} {seconds:.2f} s")
            if turn:
                taken[name].append(seconds)
        print(f"  turn {turn} of {rounds}: {', '.join(said)}", file=sys.stderr, flush=True)
    return taken


def ratio(above: list[float], below: list[float]) -> tuple[float, float, float]:
    """Median over turns of above / below, and a 95 % bootstrap interval over turns."""
    each = np.array(above) / np.array(below)
    drawn = np.random.default_rng(0).integers(0, len(each), (2000, len(each)))
    low, high = np.quantile(np.median(each[drawn], axis=1), [0.025, 0.975])
    return float(np.median(each)), float(low), float(high)


class Result:
    """Rows and ratios, printed as they come."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.ratios: dict[str, float] = {}

    def rates(self, prefix: str, tokens: int, taken: dict[str, list[float]]) -> None:
        """Tokens a second of each job: its median turn, and its slowest and fastest."""
        for name, seconds in taken.items():
            each = sorted(tokens / s for s in seconds)
            self.row(f"{prefix}_{name}", median(each), "tokens/s", each[0], each[-1])

    def ratio(self, name: str, above: list[float], below: list[float]) -> None:
        """How many times as long as `below` `above` took."""
        value, low, high = ratio(above, below)
        self.ratios[name] = value
        self.row(name, value, "ratio", low, high)

    def interval(self, name: str, found: Interval) -> None:
        """A mean over seeds with its 95 % interval."""
        self.row(name, found.value, f"mean of {found.n}", found.low, found.high)

    def row(
        self, name: str, value: float, unit: str, low: float | None = None, high: float | None = None
    ) -> None:
        """One number."""
        row: dict[str, Any] = {"name": name, "value": value, "unit": unit}
        between = ""
        if low is not None:
            row |= {"low": low, "high": high}
            between = f"  ({low:,.4g} to {high:,.4g})"
        self.rows.append(row)
        print(f"{name:52}{value:>14,.5g} {unit}{between}", flush=True)
