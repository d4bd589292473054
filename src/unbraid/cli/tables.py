"""Tables that fit a terminal: what is compared in rows, metrics in columns, in as many tables as it takes."""

from __future__ import annotations

from collections.abc import Sequence

WIDEST_NAME = 30
"""Characters of a row's name beyond which it is folded."""


def side_by_side(metrics: Sequence[str], width: int, names: Sequence[str], cell: int) -> list[list[str]]:
    """Metrics by the table that shows them: as many next to each other as a terminal of `width` has room for,
    with cells of `cell` characters beside the rows' names."""
    found, left = list[list[str]](), 0
    first = min(max(map(len, names), default=0), WIDEST_NAME)
    for metric in metrics:
        needed = max(len(metric), cell) + 3
        if needed > left:
            found.append([])
            left = width - first - 4
        found[-1].append(metric)
        left -= needed
    return found
