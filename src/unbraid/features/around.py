"""What a latent does around the places in its slots: its own activations there, kept without zeros.

While firings compete for slots each slot only remembers where its activations are to come from; once a
stretch of text has been taken in they are counted and then copied, in two passes over the slots.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from unbraid.features.hashes import F32, I16, I32, I64, compiled
from unbraid.features.loops import Rows, Slots
from unbraid.sae.kernels.cpu import side_by_side


def even(F: int) -> I64:
    """Where to cut F latents into ranges of equal numbers."""
    return np.linspace(0, F, 17).astype(np.int64)


def nowhere() -> I32:
    """The source of slots that are not open."""
    return np.zeros((0, 0), np.int32)


def opened(slots: Slots) -> Slots:
    """The same slots, of which each knows where its activations are."""
    F, S = slots.key.shape
    return slots._replace(source=np.tile(np.arange(S, dtype=np.int32), (F, 1)))


def closed(slots: Slots, more: Slots, first: I64, row: I32, value: F32, rows: Rows, reach: int) -> Slots:
    """The same slots with the activations that their sources name; `more` has those of another state."""
    size, cuts = np.zeros_like(slots.size), even(len(slots.size))
    ranges = [(int(a), int(b)) for a, b in pairwise(cuts)]

    def count(at: tuple[int, int]) -> None:
        _count(*at, slots, more, first, row, rows, reach, size)

    side_by_side(count, ranges)
    to = np.concatenate([[0], np.cumsum(size.sum(axis=1, dtype=np.int64))])
    away, active = np.empty(to[-1], np.int16), np.empty(to[-1], np.float32)

    def fill(at: tuple[int, int]) -> None:
        _fill(*at, slots, more, first, row, value, rows, reach, size, to, away, active)

    side_by_side(fill, ranges)
    return slots._replace(size=size, first=to, away=away, active=active, source=nowhere())


def around(slots: Slots, begin: int, end: int, reach: int) -> F32:
    """Activations around the slots of latents begin … end − 1, (end − begin, S, 2 · reach + 1)."""
    size = slots.size[begin:end]
    out = np.zeros((size.size, 2 * reach + 1), np.float32)
    mine = slice(int(slots.first[begin]), int(slots.first[end]))
    slot = np.repeat(np.arange(size.size), size.ravel())
    out[slot, slots.away[mine] + reach] = slots.active[mine]
    return out.reshape(*size.shape, 2 * reach + 1)


@compiled
def _surround(rows: Rows, row: I32, at: int, begin: int, end: int, reach: int) -> tuple[int, int]:
    """Of a latent's firings begin … end − 1 the first one around firing `at`, and the one after the last."""
    here = rows[row[at]]
    low, high = at, at + 1
    while low > begin and rows[row[low - 1]].passage == here.passage:
        if here.position - rows[row[low - 1]].position > reach:
            break
        low -= 1
    while high < end and rows[row[high]].passage == here.passage:
        if rows[row[high]].position - here.position > reach:
            break
        high += 1
    return low, high


@compiled
def _count(
    begin: int, end: int, slots: Slots, more: Slots, first: I64, row: I32, rows: Rows, reach: int, size: I32
) -> None:
    """The `size` (F, S) that slots of latents begin … end − 1 will have, from their `source`."""
    S = size.shape[1]
    for j in range(begin, end):
        for s in range(S):
            source = slots.source[j, s]
            if slots.passage[j, s] < 0:
                size[j, s] = 0
            elif source < 0:
                low, high = _surround(rows, row, first[j] - 1 - source, first[j], first[j + 1], reach)
                size[j, s] = high - low
            elif source < S:
                size[j, s] = slots.size[j, source]
            else:
                size[j, s] = more.size[j, source - S]


@compiled
def _fill(
    begin: int, end: int, slots: Slots, more: Slots, first: I64, row: I32, value: F32, rows: Rows, reach: int,
    size: I32, to: I64, away: I16, active: F32,
) -> None:  # fmt: skip
    """The activations of slots of latents begin … end − 1, into away and active from to[begin] on."""
    S = size.shape[1]
    begins = np.zeros(2 * S, np.int64)  # of what the old slots have, and those of the other state
    for j in range(begin, end):
        there = slots.first[j]
        for s in range(S):
            begins[s] = there
            there += slots.size[j, s]
        if len(more.first):
            there = more.first[j]
            for s in range(S):
                begins[S + s] = there
                there += more.size[j, s]
        at = to[j]
        for s in range(S):
            source, n = slots.source[j, s], size[j, s]
            if n and source < 0:
                firing = first[j] - 1 - source
                low, _ = _surround(rows, row, firing, first[j], first[j + 1], reach)
                here = rows[row[firing]].position
                for i in range(low, low + n):
                    away[at + i - low], active[at + i - low] = rows[row[i]].position - here, value[i]
            elif n:
                held, strength = (slots.away, slots.active) if source < S else (more.away, more.active)
                for c in range(n):
                    away[at + c], active[at + c] = held[begins[source] + c], strength[begins[source] + c]
            at += n
