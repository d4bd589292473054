"""The compiled loops on tensors: what `sae.codes` calls for float32 on the processor.

Work is cut into chunks of rows or ranges of latents of about equal work, and run on torch's number of
threads. No sum crosses a chunk, so results do not depend on how many threads there are.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unbraid.sae.kernels import loops

S = TypeVar("S")
T = TypeVar("T")
F32, I32, I64 = NDArray[np.float32], NDArray[np.int32], NDArray[np.int64]
Precision = Literal["int8", "float32"]
CHUNK_ROWS = 256
"""Rows that a thread works on at a time."""
NEAR_ROWS = 128
"""Rows of them whose int8 products exist at the same time."""
NARROW = 16
"""Width below which the product is in float32: few errors do not add up as many do, and little is to gain."""
SIGMAS = 5.0
"""Standard errors that the screen allows a rough product to be off, or two of them together."""
PARTS = 64
"""Ranges of about equal work that the latents are split into."""
ROW_COST = 6
"""Work of passing over a latent's rows that no token fired, in units of one entry."""


def precision() -> Precision:
    """What the rough product is computed in: int8 where the processor has an instruction for it."""
    return "int8" if loops.multiplies_int8() else "float32"


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that are kept: what a new one's first product allocates costs more than many a product."""
    return ThreadPoolExecutor(threads, "unbraid")


os.register_at_fork(after_in_child=_pool.cache_clear)


def side_by_side(work: Callable[[S], T], items: Iterable[S], threads: int | None = None) -> list[T]:
    """work(item) of each, in order, on so many threads (torch's number, if None); inside each of them torch
    uses one.
    """
    items, before = list(items), torch.get_num_threads()
    threads = threads or before
    if threads == 1 or len(items) == 1:
        return [work(item) for item in items]
    torch.set_num_threads(1)
    try:
        return list(_pool(threads).map(work, items))
    finally:
        torch.set_num_threads(before)


def fits(*tensors: Tensor) -> bool:
    """Whether these are what the loops read: float32 in the processor's memory."""
    return all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)


def array(tensor: Tensor) -> NDArray[Any]:
    """The tensor's memory, copied only where it is not contiguous."""
    return tensor.detach().contiguous().numpy()


@dataclass(frozen=True, eq=False)
class Lists:
    """Entries grouped by latent: latent j's stand at first[j]:first[j + 1]; those of value 0 in no list."""

    first: I64
    """(F + 1,)."""
    rows: I32
    """Which row each belongs to."""
    entries: I32
    """Where it stands among the codes."""

    @classmethod
    def of(cls, starts: I64, latents: I32, values: F32, d_sae: int) -> Lists:
        """Group the entries `latents`, `values` of rows that begin at `starts`."""
        first = np.empty(d_sae + 1, np.int64)
        rows, entries = np.empty(len(latents), np.int32), np.empty(len(latents), np.int32)
        loops.group_by_latent(starts, latents, values, first, rows, entries)
        return cls(first, rows, entries)

    def cuts(self) -> I64:
        """Where to cut the latents into ranges of about equal work, (PARTS + 1,)."""
        work = self.first + ROW_COST * np.arange(len(self.first))
        return np.searchsorted(work, np.linspace(0, work[-1], PARTS + 1)).clip(max=len(self.first) - 1)


class Screen:
    """A rough copy of an encoder in which the best latents are looked for; the codes found are exact."""

    def __init__(self, W_enc: F32, b_enc: F32, kind: Precision | None = None) -> None:
        """W_enc: (F, d), one latent a row; b_enc: (F,); kind: as fast as the processor can, if None."""
        F, d = W_enc.shape
        self.W_enc, self.b_enc = W_enc, b_enc
        self.kind: Precision = "float32" if d < NARROW or kind == "float32" else precision()
        groups = -(-F // loops.GROUP)
        self.width = groups * loops.GROUP
        steps = -(-d // (loops.WORD * loops.STEP)) if self.kind == "int8" else 0
        self.shadow = torch.zeros(groups, steps * loops.STEP, loops.GROUP, dtype=torch.int32).numpy()
        self.shift, self.unit = np.zeros(self.width, np.int32), np.zeros(self.width, np.float32)
        self.length = np.zeros(self.width, np.float32)
        self.local = threading.local()
        edges = np.linspace(0, F, PARTS + 1).astype(np.int64)
        side_by_side(lambda part: self.refresh(edges[part], edges[part + 1]), range(PARTS))

    def refresh(self, begin: int, end: int) -> None:
        """Copy latents begin … end − 1 again, after their weights have changed."""
        loops.quantise_latents(begin, end, self.W_enc, self.shadow, self.shift, self.unit, self.length)

    def top_k(self, x: Tensor, latents: I32, values: F32) -> None:
        """Fill latents and values (m, k) with the k largest pre-activations of x (m, d), m ≤ CHUNK_ROWS."""
        loops.best_entries(*self.entries(x, self.b_enc, wanted=latents.shape[1]), latents, values)

    def improve(self, x: Tensor, first: int, latents: I32, values: F32) -> None:
        """Put latents of this screen, numbered from `first`, where x (m, d), m ≤ CHUNK_ROWS, has lesser ones
        among the k best that were found in others: latents and values (m, k).
        """
        better = self.entries(x, self.b_enc, least=values.min(axis=1))
        loops.improve(*better, first, latents, values)

    def above(self, x: Tensor, edge: F32) -> tuple[I64, I32, F32]:
        """Entries of x (m, d), m ≤ CHUNK_ROWS, whose pre-activation exceeds edge (F,): where each row's begin
        (m + 1,), their latents and values.
        """
        starts, latents, values = self.entries(x, self.b_enc - edge, least=np.zeros(len(x), np.float32))
        kept = values > edge[latents]
        return np.concatenate([[0], np.cumsum(kept)])[starts], latents[kept], values[kept]

    def entries(
        self, x: Tensor, bias: F32, *, wanted: int = 0, least: F32 | None = None
    ) -> tuple[I64, I32, F32]:
        """Those of x (m, d) that may be among the `wanted` largest of x W_encᵀ + bias in a row, or may reach
        `least` (m,) there, with exact pre-activations; the first two as in `loops.candidates`. The last two
        are written over by the next call in this thread.
        """
        least = np.zeros(len(x), np.float32) if least is None else least
        kept, starts, F = self._kept(), np.zeros(len(x) + 1, np.int64), len(bias)
        # Groups first, where there are enough of them.
        size = loops.GROUP if 2 * loops.GROUP * wanted <= F else 1
        off = kept.off[: -(-F // size)]
        find = self._by_int8 if self.kind == "int8" else self._by_float32
        # Of two scores that are compared, each may be wrong by so much.
        share = 0.5 if wanted else 1.0
        while (found := find(x, bias, wanted, least, share, off, size, starts, kept)) < 0:
            kept.make_room(2 * len(kept.latents))
        return starts, kept.latents[:found], kept.values[:found]

    def _by_int8(
        self, x: Tensor, bias: F32, wanted: int, least: F32, share: float, off: F32, size: int, starts: I64,
        kept: Kept,
    ) -> int:  # fmt: skip
        kept.bias[: len(bias)] = bias
        return loops.entries_by_int8(
            x.numpy(), self.W_enc, self.b_enc, kept.bias, wanted, least, share * SIGMAS, self.shadow,
            self.shift, self.unit, self.length, kept.tiles, kept.scores, kept.best, off, size, starts,
            kept.latents, kept.values,
        )  # fmt: skip

    def _by_float32(
        self, x: Tensor, bias: F32, wanted: int, least: F32, share: float, off: F32, size: int, starts: I64,
        kept: Kept,
    ) -> int:  # fmt: skip
        weight = torch.from_numpy(self.W_enc).T
        scores, best = (torch.from_numpy(table)[: len(x)] for table in (kept.scores, kept.best))
        torch.addmm(torch.from_numpy(bias), x, weight, out=scores.flatten(1)[:, : len(bias)])
        torch.amax(scores, 2, out=best)
        scale = share * 2e-5 * x.norm(dim=1).max().item()
        loops.uncertainty(self.length, self.unit, np.float32(0), scale, size, off)
        groups = scores.numpy().swapaxes(0, 1)
        found = loops.candidates(groups, best.numpy(), off, size, wanted, least, starts, kept.latents)
        if found >= 0:
            entries = kept.latents[:found], kept.values[:found]
            loops.pre_activations(x.numpy(), self.W_enc, self.b_enc, starts, *entries)
        return found

    def _kept(self) -> Kept:
        """This thread's own, made once: fresh memory's pages cost more than many a use."""
        if not hasattr(self.local, "kept"):
            self.local.kept = Kept(*self.shadow.shape[:2])
        return self.local.kept


class Kept:
    """What a thread writes while it screens CHUNK_ROWS rows. Memory from torch begins where a line of the
    cache does."""

    def __init__(self, groups: int, words: int) -> None:
        rows, size = NEAR_ROWS if words else CHUNK_ROWS, loops.GROUP
        shape = (groups, rows, size) if words else (rows, groups, size)  # as each product writes them
        self.tiles = torch.zeros(rows // loops.TILE_ROWS, words, loops.TILE_ROWS, dtype=torch.int32).numpy()
        # −∞ stands for latents that are there only to fill up a group.
        self.bias = torch.full((groups * size,), -torch.inf).numpy()
        self.scores, self.best = torch.full(shape, -torch.inf).numpy(), torch.empty(rows, groups).numpy()
        self.off = np.empty(groups * size, np.float32)
        self.make_room(128 * CHUNK_ROWS)

    def make_room(self, entries: int) -> None:
        """For so many candidates."""
        self.latents, self.values = np.empty(entries, np.int32), np.empty(entries, np.float32)


def top_k_pre_activations(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices (n, k) of the k largest of x W_encᵀ + b_enc; x: (n, d), W_enc: (F, d)."""
    x, screen = x.detach().contiguous(), Screen(array(W_enc), array(b_enc))
    latents, values = np.empty((len(x), k), np.int32), np.empty((len(x), k), np.float32)

    def some(begin: int) -> None:
        rows = slice(begin, begin + CHUNK_ROWS)
        screen.top_k(x[rows], latents[rows], values[rows])

    side_by_side(some, range(0, len(x), CHUNK_ROWS))
    return torch.from_numpy(values), torch.from_numpy(latents.astype(np.int64))


def decode(indices: Tensor, values: Tensor, W_dec: Tensor) -> Tensor:
    """Σ_k values[i, k] · W_dec[indices[i, k]] for each row i, (n, d); indices and values: (n, k)."""
    table, latents, weights = array(W_dec), array(indices), array(values)
    out = np.empty((len(latents), table.shape[1]), np.float32)

    def some(begin: int) -> None:
        rows = slice(begin, begin + CHUNK_ROWS)
        loops.weighted_rows(latents[rows], weights[rows], table, out[rows])

    side_by_side(some, range(0, len(out), CHUNK_ROWS))
    return torch.from_numpy(out)


def value_gradients(indices: Tensor, grad: Tensor, W_dec: Tensor) -> Tensor:
    """grad[i] · W_dec[indices[i, k]] for every entry, (n, k); grad: (n, d)."""
    table, latents, rows_of = array(W_dec), array(indices), array(grad)
    out = np.empty(latents.shape, np.float32)

    def some(begin: int) -> None:
        rows = slice(begin, begin + CHUNK_ROWS)
        loops.row_products(latents[rows], rows_of[rows], table, out[rows])

    side_by_side(some, range(0, len(out), CHUNK_ROWS))
    return torch.from_numpy(out)


def sum_by_latent(indices: Tensor, weights: Tensor, rows: Tensor, d_sae: int) -> Tensor:
    """For each latent j, Σ weights[i, k] · rows[i] over all (i, k) with indices[i, k] = j: (d_sae, d)."""
    n, k = indices.shape
    latents, values = array(indices).astype(np.int32).reshape(-1), array(weights).reshape(-1)
    lists, table = Lists.of(np.arange(n + 1) * k, latents, values, d_sae), array(rows)
    out, cuts = np.empty((d_sae, table.shape[1]), np.float32), lists.cuts()

    def some(part: int) -> None:
        loops.sums_by_latent(
            cuts[part], cuts[part + 1], lists.first, lists.rows, lists.entries, values, table, out
        )

    side_by_side(some, range(PARTS))
    return torch.from_numpy(out)
