"""Compiled loops of the pass: what every latent does, from its list of firings (Numba).

Each function is sequential, releases the interpreter's lock and writes only what belongs to its own latents,
so any number of threads may run it side by side and the result does not depend on how many.  Each is linear
in the firings.  Sums are of whole numbers or carry what rounding left out, so that neither batches nor parts
of the corpus leave a trace.

Firings of a stretch of text are listed by latent: those of latent j are `rows`, `values`[first[j]:first[j +
1]], in reading order.
"""

# pyright: reportUnusedFunction=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

from unbraid.features.groups import HISTOGRAM_BINS, INTERVALS, LEVELS, OCTAVES

P = ParamSpec("P")
R = TypeVar("R")
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]

BINS, OF_INTERVAL = HISTOGRAM_BINS, HISTOGRAM_BINS // INTERVALS
BELOW = LEVELS * OCTAVES
LOWEST = -60
"""Least exponent of a histogram's top."""


ROW = np.dtype(
    [
        ("key", np.uint64),  # a random number that depends on the seed, the document and the place in it alone
        ("context", np.uint64),  # a hash of the tokens around it
        ("passage", np.int64),  # the window that it belongs to
        ("document", np.int64),  # number of its document; it never falls from one stretch to the next
        ("position", np.int32),  # its place in the window
        ("token", np.int32),
        ("stratum", np.int32),  # number of its document's stratum
        ("first", np.int32),  # 1 if it is the first counted token of its window, else 0
    ]
)
"""A counted token of a stretch of text; all of it in one line of the cache."""
Rows = NDArray[Any]
"""Tokens (n,) of type ROW."""


class Slots(NamedTuple):
    """Places where latents fire, S for each latent in no order; a free slot's passage is −1."""

    key: U64
    """(F, S): of the best the context, of a sample the random priority."""
    value: F32
    """(F, S)."""
    passage: I64
    """(F, S)."""
    position: I32
    """(F, S)."""
    around: F32
    """(F, S, 2 · reach + 1): the latent's activations there."""


class Counts(NamedTuple):
    """What is counted of every latent, all (F, …)."""

    count: I64
    documents: I64
    last_document: I64
    total: F64
    """(F, 2): the sum, and what rounding left out of it."""
    highest: F32
    exponent: I64
    """The histograms' top is 2 to the power of it."""
    histogram: I64
    levels: I64
    positions: I64
    """(F, 3): sums of positions and of their squares, firings on first tokens."""
    octaves: I64
    strata: I64


def _compiled(function: Callable[P, R]) -> Callable[P, R]:
    # No reordering of sums: what rounding leaves out is kept.
    return cast("Callable[P, R]", numba.njit(nogil=True, cache=True, error_model="numpy")(function))


@_compiled
def mix(x: np.uint64) -> np.uint64:
    """SplitMix64's finaliser (Steele, Lea and Flood, 2014): every input bit reaches every output bit."""
    x = np.uint64(x + np.uint64(0x9E3779B97F4A7C15))
    x = np.uint64((x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9))
    x = np.uint64((x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB))
    return np.uint64(x ^ (x >> np.uint64(31)))


@_compiled
def keys_of(seed: np.uint64, document: I64, place: I64, out: U64) -> None:
    """A random number for each place in each document."""
    for i in range(len(out)):
        out[i] = mix(mix(seed ^ np.uint64(document[i])) ^ np.uint64(place[i]))


@_compiled
def mixed(key: U64, latent: U64) -> U64:
    """The priorities of firings (n,) at places with these keys, as `take_in` draws them."""
    out = np.empty(len(key), np.uint64)
    for i in range(len(key)):
        out[i] = mix(key[i] ^ latent[i])
    return out


@_compiled
def contexts_of(classes: U64, begins: I64, ends: I64, width: int, out: U64) -> None:
    """Hash of the classes of the `width` tokens to either side of each token, and its own.

    classes, out: (n,), of windows one after another that are begins[w]:ends[w].
    """
    for w in range(len(begins)):
        for i in range(begins[w], ends[w]):
            found = np.uint64(0)
            for j in range(i - width, i + width + 1):
                inside = begins[w] <= j < ends[w]
                found = mix(found ^ (classes[j] if inside else np.uint64(1)))
            out[i] = found


@_compiled
def _exponent(bits: int) -> int:
    """Least e of LOWEST or more with value < 2^e, for a value above 0 with these bits."""
    return max((bits >> 23) - 126, LOWEST)


@_compiled
def _offer_best(
    best: Slots, j: int, context: np.uint64, value: np.float32, passage: int, position: int
) -> int:
    """Take a firing among the best of different contexts, of equal ones the earlier; returns its slot, or −1."""
    contexts, values, passages, positions = best.key[j], best.value[j], best.passage[j], best.position[j]
    worst, into = 0, -1
    for s in range(len(values)):
        if passages[s] < 0 or contexts[s] == context:
            into = s
            break
        if values[s] < values[worst] or (
            values[s] == values[worst]
            and (
                passages[s] > passages[worst]
                or (passages[s] == passages[worst] and positions[s] > positions[worst])
            )
        ):
            worst = s
    if into < 0:
        into = worst
    if passages[into] >= 0 and (
        value < values[into]
        or (
            value == values[into]
            and (
                passage > passages[into] or (passage == passages[into] and position >= positions[into])
            )
        )
    ):
        return -1
    contexts[into], values[into], passages[into], positions[into] = context, value, passage, position
    return into


@_compiled
def _offer_sample(
    sample: Slots, j: int, low: int, high: int, key: np.uint64, value: np.float32, passage: int, position: int
) -> int:
    """Take a firing into the slots low … high − 1 if it was drawn soon enough; returns its slot, or −1."""
    keys, passages, positions = sample.key[j], sample.passage[j], sample.position[j]
    last = low
    for s in range(low, high):
        if passages[s] < 0:
            last = s
            break
        if keys[s] < keys[last] or (
            keys[s] == keys[last]
            and (
                passages[s] > passages[last]
                or (passages[s] == passages[last] and positions[s] > positions[last])
            )
        ):
            last = s
    if passages[last] >= 0 and (
        key < keys[last]
        or (
            key == keys[last]
            and (
                passage > passages[last] or (passage == passages[last] and position >= positions[last])
            )
        )
    ):
        return -1
    keys[last], passages[last], positions[last] = key, passage, position
    sample.value[j, last] = value
    return last


@_compiled
def _latest(sample: Slots, j: int, low: int, high: int) -> np.uint64:
    """The least key in these slots, 0 while one is free: firings below it need not be offered."""
    keys, passages = sample.key[j], sample.passage[j]
    least = keys[low]
    for s in range(low, high):
        if passages[s] < 0:
            return np.uint64(0)
        least = min(least, keys[s])
    return least


@_compiled
def _weakest(best: Slots, j: int) -> np.float32:
    """The least value of the best, 0 while a slot is free."""
    values, passages = best.value[j], best.passage[j]
    least = values[0]
    for s in range(len(values)):
        if passages[s] < 0:
            return np.float32(0)
        least = min(least, values[s])
    return least


@_compiled
def _surround(rows: Rows, row: I32, value: F32, at: int, begin: int, end: int, out: F32) -> None:
    """The latent's activations around firing `at` of its list begin … end − 1, in `out` (2 · reach + 1,)."""
    reach, here = len(out) // 2, rows[row[at]]
    out[:] = 0
    for step in (-1, 1):
        i = at
        while begin <= i < end and rows[row[i]].passage == here.passage:
            away = rows[row[i]].position - here.position
            if abs(away) > reach:
                break
            out[reach + away] = value[i]
            i += step


@_compiled
def _copy(source: Slots, j: int, s: int, target: Slots, t: int) -> None:
    if t >= 0:
        for c in range(source.around.shape[2]):
            target.around[j, t, c] = source.around[j, s, c]


@_compiled
def widen(counts: Counts, spread: Slots, j: int, exponent: int) -> None:
    """Raise the top of a latent's histograms to 2^exponent by merging bins, which is exact, and of its
    intervals' samples by sampling from the merged ones."""
    by = exponent - counts.exponent[j]
    if by <= 0:
        return
    counts.exponent[j] = exponent
    for b in range(BINS):
        n, counts.histogram[j, b] = counts.histogram[j, b], 0
        counts.histogram[j, b >> min(by, 62)] += n
    for b in range(1, BELOW + 1):
        n, counts.levels[j, b] = counts.levels[j, b], 0
        counts.levels[j, max(b - LEVELS * by, 0)] += n
    size = spread.key.shape[1]
    per = size // INTERVALS
    key, value = spread.key[j].copy(), spread.value[j].copy()
    passage, position, around = spread.passage[j].copy(), spread.position[j].copy(), spread.around[j].copy()
    spread.passage[j] = -1
    for s in range(size):
        if passage[s] >= 0:
            low = (s // per >> min(by, 62)) * per
            t = _offer_sample(spread, j, low, low + per, key[s], value[s], passage[s], position[s])
            if t >= 0:
                spread.around[j, t] = around[s]


@_compiled
def _two_sum(total: float, value: float) -> tuple[float, float]:
    """Their sum, and what rounding leaves out of it (Knuth)."""
    new = total + value
    part = new - total
    return new, (total - (new - part)) + (value - part)


@_compiled
def take_in(
    begin: int,
    end: int,
    first: I64,
    row: I32,
    value: F32,
    rows: Rows,
    counts: Counts,
    best: Slots,
    sample: Slots,
    spread: Slots,
) -> None:
    """Count the firings of latents begin … end − 1 in a stretch of text and let them compete for slots."""
    # Plain arrays, and no call on the way of most firings: a call counts references of all that it is given.
    bits = value.view(np.int32)
    histogram, levels, octaves, by_stratum = counts.histogram, counts.levels, counts.octaves, counts.strata
    size, per, farthest = sample.key.shape[1], spread.key.shape[1] // INTERVALS, octaves.shape[1] - 1
    bars = np.zeros(INTERVALS, np.uint64)
    for j in range(begin, end):
        a, b = first[j], first[j + 1]
        if a == b:
            continue
        highest = bits[a]  # floats above 0 are in the order of their bits
        for i in range(a, b):
            highest = max(highest, bits[i])
        exponent = _exponent(highest)
        if exponent > counts.exponent[j]:
            widen(counts, spread, j, exponent)
        exponent = counts.exponent[j]
        scale, lowest = 2.0 ** (-exponent) * BINS, (exponent - OCTAVES + 127) * LEVELS - 1
        weakest, latest = _weakest(best, j), _latest(sample, j, 0, size)
        for interval in range(INTERVALS):
            bars[interval] = _latest(spread, j, interval * per, (interval + 1) * per)
        peak, last, fresh, total, rest = a, counts.last_document[j], 0, counts.total[j, 0], counts.total[j, 1]
        places = squares = openings = 0
        for i in range(a, b):
            token, v = rows[row[i]], value[i]
            fresh += token.document != last
            last = token.document
            total, lost = _two_sum(total, np.float64(v))
            rest += lost
            place = min(int(np.float64(v) * scale), BINS - 1)
            histogram[j, place] += 1
            # The bits of a float above 0 down to five of its mantissa count 32nds of octaves.
            levels[j, max(np.int64(bits[i] >> 18) - lowest, 0)] += 1
            position = np.int64(token.position)
            places += position
            squares += position * position
            openings += token.first
            octave = 0
            while position >> octave:
                octave += 1
            octaves[j, min(octave, farthest)] += 1
            by_stratum[j, token.stratum] += 1

            key = mix(token.key ^ np.uint64(j))
            if key >= latest:
                s = _offer_sample(sample, j, 0, size, key, v, token.passage, token.position)
                if s >= 0:
                    _surround(rows, row, value, i, a, b, sample.around[j, s])
                    latest = _latest(sample, j, 0, size)
            interval = place // OF_INTERVAL
            if key >= bars[interval]:
                low = interval * per
                s = _offer_sample(spread, j, low, low + per, key, v, token.passage, token.position)
                if s >= 0:
                    _surround(rows, row, value, i, a, b, spread.around[j, s])
                    bars[interval] = _latest(spread, j, low, low + per)

            if v > value[peak]:
                peak = i
            if i + 1 == b or rows[row[i + 1]].passage != token.passage:
                best_of = rows[row[peak]]
                if value[peak] >= weakest:
                    s = _offer_best(
                        best, j, best_of.context, value[peak], best_of.passage, best_of.position
                    )
                    if s >= 0:
                        _surround(rows, row, value, peak, a, b, best.around[j, s])
                        weakest = _weakest(best, j)
                peak = i + 1
        counts.count[j] += b - a
        counts.documents[j] += fresh
        counts.last_document[j] = last
        counts.highest[j] = max(counts.highest[j], value[a : b].max())
        counts.total[j, 0], counts.total[j, 1] = total, rest
        counts.positions[j, 0] += places
        counts.positions[j, 1] += squares
        counts.positions[j, 2] += openings


@_compiled
def merge(
    begin: int,
    end: int,
    counts: Counts,
    best: Slots,
    sample: Slots,
    spread: Slots,
    more: Counts,
    more_best: Slots,
    more_sample: Slots,
    more_spread: Slots,
) -> None:
    """Add what other documents gave of latents begin … end − 1; `more` is widened where it must be."""
    per = spread.key.shape[1] // INTERVALS
    for j in range(begin, end):
        exponent = max(counts.exponent[j], more.exponent[j])
        widen(counts, spread, j, exponent)
        widen(more, more_spread, j, exponent)
        counts.count[j] += more.count[j]
        counts.documents[j] += more.documents[j]
        counts.highest[j] = max(counts.highest[j], more.highest[j])
        total, lost = _two_sum(counts.total[j, 0], more.total[j, 0])
        counts.total[j, 0] = total
        counts.total[j, 1] += lost + more.total[j, 1]
        counts.histogram[j] += more.histogram[j]
        counts.levels[j] += more.levels[j]
        counts.positions[j] += more.positions[j]
        counts.octaves[j] += more.octaves[j]
        counts.strata[j] += more.strata[j]
        for s in range(best.key.shape[1]):
            if more_best.passage[j, s] >= 0:
                t = _offer_best(
                    best, j, more_best.key[j, s], more_best.value[j, s],
                    more_best.passage[j, s], more_best.position[j, s],
                )  # fmt: skip
                _copy(more_best, j, s, best, t)
        for s in range(sample.key.shape[1]):
            if more_sample.passage[j, s] >= 0:
                t = _offer_sample(
                    sample, j, 0, sample.key.shape[1], more_sample.key[j, s], more_sample.value[j, s],
                    more_sample.passage[j, s], more_sample.position[j, s],
                )  # fmt: skip
                _copy(more_sample, j, s, sample, t)
        for s in range(spread.key.shape[1]):
            if more_spread.passage[j, s] >= 0:
                low = s // per * per
                t = _offer_sample(
                    spread, j, low, low + per, more_spread.key[j, s], more_spread.value[j, s],
                    more_spread.passage[j, s], more_spread.position[j, s],
                )  # fmt: skip
                _copy(more_spread, j, s, spread, t)


@_compiled
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


@_compiled
def close_up(first: I64, found: I64, item: I32, times: I32, new_first: I64) -> None:
    """Move each latent's results together, in place: they begin at new_first[j] afterwards."""
    at = 0
    for j in range(len(found)):
        new_first[j] = at
        for i in range(first[j], first[j] + found[j]):
            item[at], times[at] = item[i], times[i]
            at += 1
    new_first[len(found)] = at


@_compiled
def _rank(keys: F64, items: I32, n: int, key: float, item: int) -> int:
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


@_compiled
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
    neighbour, together: (end − begin, 2 · k): the k with the highest Jaccard index, then those of the k with the
    highest PMI, together on `fewest` tokens or more, that are not among them.  found: (end − begin,).
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


@_compiled
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


@_compiled
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
