"""What one pass over sparse codes leaves of every latent: best examples, fair samples and histograms.

Everything here is plain NumPy and its memory depends on the number of latents alone, never on the number
of tokens.  Each accumulator is exact and independent of how the stream was cut into batches, so a batched
pass and one look at the whole corpus give the same result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]
HashArray = NDArray[np.uint64]

HISTOGRAM_BINS = 64
_LOWEST_EXPONENT = -60
_ABSENT = -1


@dataclass(frozen=True, eq=False)
class Firings:
    """Nonzero codes of a batch, one row a firing; all arrays have shape (n,)."""

    latent: IntArray
    """Number of the latent that fired."""
    value: FloatArray
    """Its activation, greater than zero."""
    row: IntArray
    """Row of the batch's codes that the firing came from."""
    window: IntArray
    """Number of the window of text, counted over the whole stream."""
    position: IntArray
    """Token position inside the window."""

    def __len__(self) -> int:
        return len(self.latent)

    def take(self, chosen: IntArray | NDArray[np.bool_]) -> Firings:
        """The firings at `chosen` (a mask or row numbers)."""
        return Firings(
            self.latent[chosen],
            self.value[chosen],
            self.row[chosen],
            self.window[chosen],
            self.position[chosen],
        )


def peaks(firings: Firings) -> Firings:
    """Keep the strongest firing of each latent in each window (the earliest when several tie)."""
    order = np.lexsort((firings.position, -firings.value, firings.window, firings.latent))
    ordered = firings.take(order)
    first = np.ones(len(ordered), dtype=bool)
    first[1:] = (ordered.latent[1:] != ordered.latent[:-1]) | (ordered.window[1:] != ordered.window[:-1])
    return ordered.take(first)


def uniform_priorities(firings: Firings, seed: int) -> NDArray[np.float64]:
    """A number in [0, 1) for each firing (n,), a hash of seed, window, position and latent.

    Keeping the rows with the largest priorities is reservoir sampling whose outcome does not depend on
    how the stream is cut into batches.
    """
    with np.errstate(over="ignore"):
        mixed = _mix(
            firings.window.astype(np.uint64) ^ _mix(np.array([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64))
        )
        mixed = _mix(mixed ^ firings.position.astype(np.uint64))
        mixed = _mix(mixed ^ firings.latent.astype(np.uint64))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def context_hashes(tokens: IntArray, width: int) -> HashArray:
    """Hash of the `width` tokens on either side of each position of one window: (length,) -> (length,)."""
    padded = np.concatenate([np.full(width, _ABSENT), tokens, np.full(width, _ABSENT)]).astype(np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * width + 1)
    hashed = np.zeros(len(tokens), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for column in range(windows.shape[1]):
            hashed = _mix(hashed ^ windows[:, column].astype(np.uint64))
    return hashed


def _mix(x: HashArray) -> HashArray:
    # SplitMix64's finaliser (Steele, Lea and Flood, 2014): every input bit reaches every output bit.
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Best:
    """For each latent the `size` firings with the largest key, strongest first; memory O(d_sae · size ·
    reach).

    All arrays have shape (d_sae, size); `at` is the number of a firing's window of text, −1 where nothing
    is held, and `around` (d_sae, size, 2·reach + 1) the latent's activations up to `reach` tokens to
    either side.
    """

    def __init__(self, d_sae: int, size: int, reach: int) -> None:
        self.size = size
        self.reach = reach
        self.key = np.full((d_sae, size), -np.inf)
        self.value = np.zeros((d_sae, size), dtype=np.float32)
        self.at = np.full((d_sae, size), _ABSENT, dtype=np.int64)
        self.position = np.full((d_sae, size), _ABSENT, dtype=np.int64)
        self.context = np.zeros((d_sae, size), dtype=np.uint64)
        self.around = np.zeros((d_sae, size, 2 * reach + 1), dtype=np.float32)

    def offer(
        self,
        firings: Firings,
        key: NDArray[np.float64],
        around: Callable[[Firings], FloatArray],
        context: HashArray | None = None,
    ) -> None:
        """Let a batch of firings compete with what is held.

        `key` (n,) decides who stays.  `around(firings)` gives the activations (m, 2·reach + 1) around the few
        firings that may stay.  With `context` (n,), of firings in equal contexts only the best stays.
        """
        hopeful = key > self.key[firings.latent, -1]
        firings, key = firings.take(hopeful), key[hopeful]
        hashes = None if context is None else context[hopeful]
        keep = self._winners(firings.latent, key, firings.window, firings.position, hashes)
        firings, key = firings.take(keep), key[keep]
        if not len(firings):
            return
        hashes = np.zeros(len(firings), dtype=np.uint64) if hashes is None else hashes[keep]

        touched = np.unique(firings.latent)
        held = self.at[touched] != _ABSENT
        latent = np.concatenate([np.repeat(touched, held.sum(axis=1)), firings.latent])
        key = np.concatenate([self.key[touched][held], key])
        value = np.concatenate([self.value[touched][held], firings.value])
        at = np.concatenate([self.at[touched][held], firings.window])
        position = np.concatenate([self.position[touched][held], firings.position])
        hashes = np.concatenate([self.context[touched][held], hashes])
        windows = np.concatenate([self.around[touched][held], around(firings)])

        keep = self._winners(latent, key, at, position, None if context is None else hashes)
        slot = _rank_in_group(latent[keep])
        self.key[touched], self.at[touched] = -np.inf, _ABSENT
        where = (latent[keep], slot)
        self.key[where], self.value[where], self.context[where] = key[keep], value[keep], hashes[keep]
        self.at[where], self.position[where], self.around[where] = at[keep], position[keep], windows[keep]

    def _winners(
        self,
        latent: IntArray,
        key: NDArray[np.float64],
        at: IntArray,
        position: IntArray,
        context: HashArray | None,
    ) -> IntArray:
        """Row numbers of the firings that stay, by latent and then from best to worst."""
        order = np.lexsort((position, at, -key, latent))
        if context is not None:
            # The sort is stable, so the first row of a (latent, context) group is its best one.
            grouped = order[np.lexsort((context[order], latent[order]))]
            first = np.ones(len(grouped), dtype=bool)
            first[1:] = (latent[grouped][1:] != latent[grouped][:-1]) | (
                context[grouped][1:] != context[grouped][:-1]
            )
            stays = np.zeros(len(latent), dtype=bool)
            stays[grouped[first]] = True
            order = order[stays[order]]
        return order[_rank_in_group(latent[order]) < self.size]


def _rank_in_group(sorted_groups: IntArray) -> IntArray:
    """Rank 0, 1, 2 … of each row within its run of equal values."""
    if not len(sorted_groups):
        return np.zeros(0, dtype=np.int64)
    starts = np.flatnonzero(np.concatenate([[True], sorted_groups[1:] != sorted_groups[:-1]]))
    lengths = np.diff(np.concatenate([starts, [len(sorted_groups)]]))
    return np.arange(len(sorted_groups), dtype=np.int64) - np.repeat(starts, lengths)


class Tally:
    """Exact counts, sums, maxima and equal-width histograms of each latent's nonzero activations.

    A histogram has 64 bins over [0, 2^e) with the smallest e that holds the latent's maximum; when a
    larger value arrives, neighbouring bins are merged, which is exact, so the order of arrival leaves no
    trace.
    """

    def __init__(self, d_sae: int) -> None:
        self.count = np.zeros(d_sae, dtype=np.int64)
        self.documents = np.zeros(d_sae, dtype=np.int64)
        self.total = np.zeros(d_sae, dtype=np.float64)
        self.max = np.zeros(d_sae, dtype=np.float32)
        self.histogram = np.zeros((d_sae, HISTOGRAM_BINS), dtype=np.int64)
        self._last_document = np.full(d_sae, _ABSENT, dtype=np.int64)
        self._exponent = np.full(d_sae, _LOWEST_EXPONENT, dtype=np.int64)

    def add(self, firings: Firings, document: IntArray) -> None:
        """Count a batch; `document` (n,) numbers each firing's document and never falls between batches."""
        d_sae = len(self.count)
        self.count += np.bincount(firings.latent, minlength=d_sae)
        self.total += np.bincount(firings.latent, weights=firings.value.astype(np.float64), minlength=d_sae)
        np.maximum.at(self.max, firings.latent, firings.value)
        self._count_documents(firings.latent, document)
        needed = np.where(self.max > 0, np.frexp(self.max)[1], _LOWEST_EXPONENT)
        self._widen(np.maximum(self._exponent, needed))
        width = np.exp2(-self._exponent[firings.latent].astype(np.float64)) * HISTOGRAM_BINS
        bins = np.minimum((firings.value * width).astype(np.int64), HISTOGRAM_BINS - 1)
        np.add.at(self.histogram, (firings.latent, bins), 1)

    def _count_documents(self, latent: IntArray, document: IntArray) -> None:
        order = np.lexsort((document, latent))
        latent, document = latent[order], document[order]
        fresh = np.ones(len(latent), dtype=bool)
        fresh[1:] = (latent[1:] != latent[:-1]) | (document[1:] != document[:-1])
        # A long document's later windows may come in the next batch.
        fresh &= document != self._last_document[latent]
        np.add.at(self.documents, latent[fresh], 1)
        np.maximum.at(self._last_document, latent, document)

    def _widen(self, exponent: IntArray) -> None:
        grown = np.flatnonzero(exponent > self._exponent)
        shift = np.minimum(exponent[grown] - self._exponent[grown], 62)
        merged = np.zeros((len(grown), HISTOGRAM_BINS), dtype=np.int64)
        target = np.arange(HISTOGRAM_BINS)[None, :] >> shift[:, None]
        np.add.at(merged, (np.arange(len(grown))[:, None], target), self.histogram[grown])
        self.histogram[grown] = merged
        self._exponent[grown] = exponent[grown]

    @property
    def histogram_top(self) -> NDArray[np.float64]:
        """Upper edge of each latent's last bin (d_sae,); 0 for a latent that never fired."""
        return np.where(self.count > 0, np.exp2(self._exponent.astype(np.float64)), 0.0)

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean of the nonzero activations (d_sae,); 0 for a latent that never fired."""
        return self.total / np.maximum(self.count, 1)


def quantile_groups(values: FloatArray, groups: int) -> IntArray:
    """Group number 0 (weakest) … groups-1 (strongest) of each value (n,), groups of equal size up to one."""
    order = np.argsort(values, kind="stable")
    number = np.empty(len(values), dtype=np.int64)
    number[order] = np.arange(len(values)) * groups // max(len(values), 1)
    return number
