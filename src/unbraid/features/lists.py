"""Compiled loops beside the pass: sums of lists, co-activation, near copies, histograms (Numba).

As in `loops`: sequential, without the interpreter's lock, each call writing what is its latents' own.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from unbraid.features.hashes import F32, F64, I32, I64, U64, compiled


@compiled
def count_pairs(
    begin: int,
    end: int,
    first: I64,
    item: I32,
    more_first: I64,
    more_item: I32,
    more_times: I32,
    scratch: I32,
    out_first: I64,
    out_item: I32,
    out_times: I32,
    found: I64,
    times: I32,
) -> None:
    """Add up two lists of (item, times) of each latent begin … end − 1, each item once in the result.

    The first list is item[first[j]:first[j + 1]], with `times` of its own or, if that is empty, once each.
    The result is written from out_first[j] on, found[j] long; scratch (items,) is 0 before and after.
    """
    for j in range(begin, end):
        at = out_first[j]
        n = 0
        for i in range(first[j], first[j + 1]):
            if scratch[item[i]] == 0:
                out_item[at + n] = item[i]
                n += 1
            scratch[item[i]] += times[i] if len(times) else 1
        for i in range(more_first[j], more_first[j + 1]):
            if scratch[more_item[i]] == 0:
                out_item[at + n] = more_item[i]
                n += 1
            scratch[more_item[i]] += more_times[i]
        for i in range(at, at + n):
            out_times[i] = scratch[out_item[i]]
            scratch[out_item[i]] = 0
        found[j] = n


@compiled
def close_up(first: I64, found: I64, item: I32, times: I32, new_first: I64) -> None:
    """Move each latent's results together, in place: they begin at new_first[j] afterwards."""
    at = 0
    for j in range(len(found)):
        new_first[j] = at
        for i in range(first[j], first[j] + found[j]):
            item[at], times[at] = item[i], times[i]
            at += 1
    new_first[len(found)] = at


@compiled
def _rank(keys: F64, items: I32, n: int, key: Any, item: Any) -> int:
    """Put an item among the n best so far, at most len(keys), best first; equal keys by number."""
    size = len(keys)
    if n == size and (key < keys[n - 1] or (key == keys[n - 1] and item > items[n - 1])):
        return n
    at = min(n, size - 1)
    while at > 0 and (key > keys[at - 1] or (key == keys[at - 1] and item < items[at - 1])):
        keys[at], items[at] = keys[at - 1], items[at - 1]
        at -= 1
    keys[at], items[at] = key, item
    return min(n + 1, size)


@compiled
def by_latent(starts: I64, latents: I32, first: I64, rows: I32) -> None:
    """On which rows each latent fires: rows[first[j]:first[j + 1]]; starts (n + 1,), as below."""
    first[:] = 0
    for e in range(len(latents)):
        first[latents[e] + 1] += 1
    for j in range(1, len(first)):
        first[j] += first[j - 1]
    for row in range(len(starts) - 1):
        for e in range(starts[row], starts[row + 1]):
            rows[first[latents[e]]] = row
            first[latents[e]] += 1
    for j in range(len(first) - 1, 0, -1):  # each has moved to where the next one began
        first[j] = first[j - 1]
    first[0] = 0


@compiled
def coactive(
    begin: int,
    end: int,
    starts: I64,
    latents: I32,
    first: I64,
    rows: I32,
    fewest: int,
    neighbour: I32,
    together: I32,
    found: I64,
) -> None:
    """For latents begin … end − 1 those that fire on the same of n sampled tokens.

    starts (n + 1,), latents: the tokens' codes; first (F + 1,), rows: on which tokens each latent fires.
    neighbour, together: (end − begin, 2 · k): the k with the highest Jaccard index, then those of the k with
    the highest PMI, together on `fewest` tokens or more, that are not among them.  found: (end − begin,).
    """
    n, F, k = len(starts) - 1, len(first) - 1, neighbour.shape[1] // 2
    count, touched = np.zeros(F, np.int32), np.empty(F, np.int32)
    by_jaccard, by_pmi = np.empty(k, np.float64), np.empty(k, np.float64)
    near, close = np.empty(k, np.int32), np.empty(k, np.int32)
    for j in range(begin, end):
        seen = 0
        for i in range(first[j], first[j + 1]):
            for e in range(starts[rows[i]], starts[rows[i] + 1]):
                other = latents[e]
                if count[other] == 0:
                    touched[seen] = other
                    seen += 1
                count[other] += 1
        own = first[j + 1] - first[j]
        a = b = 0
        for t in range(seen):
            other = touched[t]
            if other == j:
                continue
            both, its = count[other], first[other + 1] - first[other]
            a = _rank(by_jaccard, near, a, both / (own + its - both), other)
            if both >= fewest:
                b = _rank(by_pmi, close, b, np.float64(both) * n / (np.float64(own) * its), other)
        at = 0
        for t in range(a):
            neighbour[j - begin, at], together[j - begin, at] = near[t], count[near[t]]
            at += 1
        for t in range(b):
            known = False
            for u in range(a):
                known = known or near[u] == close[t]
            if not known:
                neighbour[j - begin, at], together[j - begin, at] = close[t], count[close[t]]
                at += 1
        found[j - begin] = at
        for t in range(seen):
            count[touched[t]] = 0


@compiled
def shown(classes: U64, held: I64, least: int, rank: I32) -> None:
    """Number the examples that are like none before them: rank 0, 1, …, and −1 for those that are.

    classes: (m, width), of the tokens around each example, of several latents one after another, strongest
    first; held: how many each latent has.  Two are alike when `least` of the tokens agree.
    """
    at = 0
    for n in held:
        number = 0
        for i in range(at, at + n):
            rank[i] = number
            for other in range(at, i):
                if rank[other] < 0:
                    continue
                same = 0
                for c in range(classes.shape[1]):
                    same += classes[i, c] == classes[other, c]
                if same >= least:
                    rank[i] = -1
                    break
            number += rank[i] >= 0
        at += n


@compiled
def effect_histogram(effects: F32, counts: I64, low: F32, high: F32) -> None:
    """Histogram of each row of effects (m, vocab) in counts (m, bins), from its least to its greatest."""
    bins = counts.shape[1]
    for i in range(len(effects)):
        least = most = effects[i, 0]
        for v in effects[i]:
            least, most = min(least, v), max(most, v)
        low[i], high[i] = least, most
        scale = bins / (np.float64(most) - least) if most > least else 0.0
        for v in effects[i]:
            counts[i, min(int((np.float64(v) - least) * scale), bins - 1)] += 1
