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

from typing import Any, NamedTuple

import numpy as np

from unbraid.features.groups import HISTOGRAM_BINS, INTERVALS, LEVELS, OCTAVES
from unbraid.features.hashes import F32, F64, I16, I32, I64, U64, compiled, mix

BINS, OF_INTERVAL = HISTOGRAM_BINS, HISTOGRAM_BINS // INTERVALS
BELOW = LEVELS * OCTAVES
LOWEST = -60
"""Least exponent of a histogram's top."""


ROW = np.dtype(
    [
        (
            "key",
            np.uint64,
        ),  # a random number that depends on the seed, the document and the place in it alone
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
Rows = Any
"""Tokens (n,) of type ROW: a record array, whose fields the type checker does not know."""


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
    size: I32
    """(F, S): how many activations other than 0 the latent has there, at and around the place."""
    first: I64
    """(F + 1,): where the activations of each latent's slots begin, slot after slot."""
    away: I16
    """(n,): how far from the slot's place, rising."""
    active: F32
    """(n,): how strong."""
    source: I32
    """(F, S) while firings are taken in, else empty: which slot's activations are to be this one's; from S on
    another state's; below 0 those around the first, second, … of the latent's firings that are taken in."""


class Counts(NamedTuple):
    """What is counted of every latent, all (F, …)."""

    firings: I64
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


@compiled
def _exponent(bits: Any) -> int:
    """Least e of LOWEST or more with value < 2^e, for a value above 0 with these bits."""
    return max((bits >> 23) - 126, LOWEST)


@compiled
def _offer_best(
    best: Slots, j: int, context: np.uint64, value: np.float32, passage: int, position: int
) -> int:
    """Take a firing among the best of different contexts, the earlier of equals; returns its slot, or −1."""
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
            and (passage > passages[into] or (passage == passages[into] and position >= positions[into]))
        )
    ):
        return -1
    contexts[into], values[into], passages[into], positions[into] = context, value, passage, position
    return into


@compiled
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
            and (passage > passages[last] or (passage == passages[last] and position >= positions[last]))
        )
    ):
        return -1
    keys[last], passages[last], positions[last] = key, passage, position
    sample.value[j, last] = value
    return last


@compiled
def _latest(sample: Slots, j: int, low: int, high: int) -> np.uint64:
    """The least key in these slots, 0 while one is free: firings below it need not be offered."""
    keys, passages = sample.key[j], sample.passage[j]
    least = keys[low]
    for s in range(low, high):
        if passages[s] < 0:
            return np.uint64(0)
        least = min(least, keys[s])
    return least


@compiled
def _weakest(best: Slots, j: int) -> np.float32:
    """The least value of the best, 0 while a slot is free."""
    values, passages = best.value[j], best.passage[j]
    least = values[0]
    for s in range(len(values)):
        if passages[s] < 0:
            return np.float32(0)
        least = min(least, values[s])
    return least


@compiled
def _copy(source: Slots, j: int, s: int, target: Slots, t: int) -> None:
    """Slot t of the target is now what slot s of another state was."""
    if t >= 0:
        target.source[j, t] = target.source.shape[1] + source.source[j, s]


@compiled
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
    passage, position, source = spread.passage[j].copy(), spread.position[j].copy(), spread.source[j].copy()
    spread.passage[j] = -1
    for s in range(size):
        if passage[s] >= 0:
            low = (s // per >> min(by, 62)) * per
            t = _offer_sample(spread, j, low, low + per, key[s], value[s], passage[s], position[s])
            if t >= 0:
                spread.source[j, t] = source[s]


@compiled
def _two_sum(total: float, value: float) -> tuple[float, float]:
    """Their sum, and what rounding leaves out of it (Knuth)."""
    new = total + value
    part = new - total
    return new, (total - (new - part)) + (value - part)


@compiled
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
    """Count the firings of latents begin … end − 1 in a stretch of text and let them compete for slots.

    The slots' activations are left as they were; `around.closed` fetches them.
    """
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
                    sample.source[j, s] = a - 1 - i
                    latest = _latest(sample, j, 0, size)
            interval = place // OF_INTERVAL
            if key >= bars[interval]:
                low = interval * per
                s = _offer_sample(spread, j, low, low + per, key, v, token.passage, token.position)
                if s >= 0:
                    spread.source[j, s] = a - 1 - i
                    bars[interval] = _latest(spread, j, low, low + per)

            if v > value[peak]:
                peak = i
            if i + 1 == b or rows[row[i + 1]].passage != token.passage:
                best_of = rows[row[peak]]
                if value[peak] >= weakest:
                    s = _offer_best(best, j, best_of.context, value[peak], best_of.passage, best_of.position)
                    if s >= 0:
                        best.source[j, s] = a - 1 - peak
                        weakest = _weakest(best, j)
                peak = i + 1
        counts.firings[j] += b - a
        counts.documents[j] += fresh
        counts.last_document[j] = last
        counts.highest[j] = max(counts.highest[j], value[a:b].max())
        counts.total[j, 0], counts.total[j, 1] = total, rest
        counts.positions[j, 0] += places
        counts.positions[j, 1] += squares
        counts.positions[j, 2] += openings


@compiled
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
        counts.firings[j] += more.firings[j]
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
