"""Cut a latent's firings into groups whose shares are exact: at quantiles, and in intervals of equal width.

Counts come from histograms of all firings, so "contains 9.8 %" is a count and no estimate.  The examples of a
group are a uniform sample of the firings in it.

`levels` counts firings by size with an even relative width: LEVELS bins an octave over the OCTAVES octaves
below `histogram_top`, a power of two, after one bin for everything smaller.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

HISTOGRAM_BINS = 64
"""Bins of equal width."""
LEVELS, OCTAVES = 32, 10
INTERVALS = 16
"""Intervals of equal width between 0 and the histogram's top; a latent's maximum is in the upper half."""
Edges = tuple[float, float, int]
"""Least activation of a group, where the next one begins, and how many firings are between."""


def level_edges(top: float) -> NDArray[np.float64]:
    """Lower edges of the levels below `top`, and `top` itself: (1 + LEVELS · OCTAVES + 1,)."""
    octave = np.exp2(np.arange(-OCTAVES, 0.0))[:, None] * (1 + np.arange(LEVELS) / LEVELS)
    return np.concatenate([[0.0], octave.ravel() * top, [top]])


def quantiles_of(facts: Mapping[str, Any], groups: int) -> list[Edges]:
    """At most `groups` groups of as equal counts as the levels' edges allow, weakest first; none is empty.

    `facts` is a row of the table latents.
    """
    counts, edges = np.asarray(facts["levels"]), level_edges(facts["histogram_top"])
    below, total = np.cumsum(counts), int(facts["count"])
    if not total:
        return []
    cuts = [0]
    for number in range(1, groups):
        # The edge whose count below is nearest to the quantile.
        cut = int(np.abs(below - total * number / groups).argmin()) + 1
        if below[cut - 1] > (below[cuts[-1] - 1] if cuts[-1] else 0) and below[cut - 1] < total:
            cuts.append(cut)
    found: list[Edges] = []
    for cut, end in zip(cuts, [*cuts[1:], len(counts)], strict=True):
        high = float(edges[end]) if end < len(counts) else float(facts["max"])
        found.append((float(edges[cut]), high, int(counts[cut:end].sum())))
    return found


def intervals_of(facts: Mapping[str, Any]) -> list[Edges]:
    """The intervals of equal width that hold a firing, weakest first; `facts` is a row of latents."""
    counts = np.asarray(facts["histogram"]).reshape(INTERVALS, -1).sum(axis=1)
    width, full = facts["histogram_top"] / INTERVALS, np.flatnonzero(counts)
    return [
        (
            int(number) * width,
            float(facts["max"]) if number == full[-1] else (int(number) + 1) * width,
            int(counts[number]),
        )
        for number in full
    ]
