"""Activations in a shuffled order, from disk, in bounded memory.

Tokens of one document are alike and lie side by side. A group of `buffer_shards` shards' worth of rows is
therefore gathered from many short runs all over the store, and its rows are dealt out in random order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unbraid.activations.store import ActivationStore
from unbraid.manifest.errors import UserError
from unbraid.model.sites import Site

T = TypeVar("T")

# Rows of a run: long enough to read in one go, short enough that a buffer mixes hundreds of places.
RUN_ROWS = 256


def batches(
    store: ActivationStore,
    site: Site | str,
    batch_size: int,
    *,
    seed: int,
    epochs: int | None = None,
    steps: int | None = None,
    start: int = 0,
    buffer_shards: int = 4,
    device: str | torch.device = "cpu",
) -> Iterator[Tensor]:
    """Shuffled batches (batch_size, d_in) in float32, the same for the same seed.

    Give `epochs` or `steps`, not both. Every epoch delivers every row exactly once; a batch may reach over
    the end of an epoch into the next, and only the very last one of `epochs` may be shorter. `steps` counts
    batches from the first, and the first `start` batches are left out without being read, so that
    `start=n` continues exactly where n batches ended. Memory: `buffer_shards` shards of one site as stored.

    Raises UserError for an unknown site or a store without rows, ValueError for impossible numbers.
    """
    if (epochs is None) == (steps is None):
        raise ValueError("give either epochs or steps")
    if batch_size < 1 or buffer_shards < 1 or start < 0 or (epochs or steps or 0) < 0:
        raise ValueError(
            "batch_size and buffer_shards must be at least 1, start, epochs and steps at least 0"
        )
    found = store.site(site)
    if not store.n_tokens:
        raise UserError(f"{store.folder} holds no rows; capture some tokens")
    store.require_room()
    total = store.n_tokens * epochs if epochs is not None else batch_size * (steps or 0)
    shuffle = Shuffle.of(store, seed, buffer_shards)

    # Filled anew for each group: fresh memory's pages cost as much as reading into them.
    buffer = store.memory(found, shuffle.most)
    row, ready = start * batch_size, 0
    batch = torch.empty((batch_size, store.d_in(found)))
    while row < total:
        group, offset = shuffle.find(row)
        order = torch.from_numpy(shuffle.order(group))
        store.gather(found, shuffle.runs(group), buffer)
        if row - offset + len(order) < total:  # while these are dealt out, the system may fetch the next
            store.expect(found, shuffle.runs(shuffle.find(row - offset + len(order))[0]))
        while offset < len(order) and row < total:
            take = min(batch_size - ready, len(order) - offset, total - row)
            batch[ready : ready + take] = buffer.take(order[offset : offset + take])
            ready, offset, row = ready + take, offset + take, row + take
            if ready == batch_size or row == total:
                yield batch[:ready].to(device)
                batch, ready = torch.empty_like(batch), 0


def ahead(
    items: Iterator[T], depth: int = 4, *, cancel: Callable[[], None] | None = None
) -> Generator[T, None, None]:
    """The same items, made by a thread of their own while those before them are used, at most `depth` of them
    in advance. What making one raises is raised where it would have come. `cancel` is called when no more are
    wanted, to end a wait for one.
    """
    threads, end = torch.get_num_threads(), object()
    pool = ThreadPoolExecutor(1, "unbraid-data", torch.set_num_threads, (1,))
    try:
        ready = deque([pool.submit(next, items, end)])
        ready[0].exception()  # the thread has begun
        torch.set_num_threads(threads)  # what it has set, MKL takes for all threads
        while (found := ready.popleft().result()) is not end:
            ready.extend(pool.submit(next, items, end) for _ in range(depth - len(ready)))
            yield cast(T, found)
    finally:
        if cancel is not None:
            cancel()
        pool.shutdown(cancel_futures=True)


def check_aligned(one: ActivationStore, other: ActivationStore) -> None:
    """Make sure that rows of the same number are of the same token, so that `batches` with one seed deals
    them out together.

    Raises UserError that says where two captures differ, and when an import does not know its tokens.
    """
    for store in (one, other):
        if "tokens" in store.unknown:
            raise UserError(
                f"{store.folder} does not say which tokens its rows are of; import it again with --tokens,"
                " or all sites into one folder"
            )
    for name in ("n_tokens", "shard_tokens"):
        if getattr(one, name) != getattr(other, name):
            raise UserError(
                f"{other.folder} has {name} {getattr(other, name)} but {one.folder} {getattr(one, name)}; "
                "capture both from the same text with the same options"
            )
    for shard in range(len(one.shards)):
        a, b = one.columns(shard), other.columns(shard)
        for name in ("tokens", "documents", "positions"):
            differ = (getattr(a, name) != getattr(b, name)).nonzero()
            if len(differ):
                raise UserError(
                    f"{other.folder} does not hold the same tokens as {one.folder}: {name} differ from row "
                    f"{shard * one.shard_tokens + int(differ[0])}; capture both from the same text"
                )


@dataclass(frozen=True)
class Group:
    """One bufferful: which epoch and which stretch of that epoch's shuffled runs."""

    epoch: int
    index: int


@dataclass
class Shuffle:
    """The order of all rows, computed where it is needed: nothing before `start` has to be replayed."""

    starts: NDArray[np.int64]
    """First row of each run (n_runs,), in the store's order; a run never crosses a shard."""
    lengths: NDArray[np.int64]
    """Rows of each run (n_runs,)."""
    rows: int
    """Rows in an epoch."""
    seed: int
    """Seed of every permutation."""
    per_group: int
    """Runs in a group."""
    _epoch: tuple[int, NDArray[np.int64]] | None = None

    @classmethod
    def of(cls, store: ActivationStore, seed: int, buffer_shards: int) -> Shuffle:
        """The shuffle of a store."""
        return cls.over(store.n_tokens, store.shard_tokens, seed, buffer_shards)

    @classmethod
    def over(cls, rows: int, shard_tokens: int, seed: int, buffer_shards: int) -> Shuffle:
        """The shuffle of so many rows in shards of that size."""
        whole = np.arange(0, rows, shard_tokens, dtype=np.int64)
        within = np.arange(0, shard_tokens, RUN_ROWS, dtype=np.int64)
        starts = (whole[:, None] + within[None, :]).reshape(-1)
        starts = starts[starts < rows]
        # Within a shard a run ends where the next one starts, which is also where the next shard starts.
        lengths = np.diff(np.append(starts, rows))
        return cls(starts, lengths, rows, seed, buffer_shards * len(within))

    @property
    def most(self) -> int:
        """Rows of the largest group, at most."""
        return min(self.rows, self.per_group * int(self.lengths.max()))

    def find(self, row: int) -> tuple[Group, int]:
        """The group that deals out the stream's row of that number, and the row's place in the group."""
        epoch, rest = divmod(row, self.rows)
        sizes = np.add.reduceat(
            self.lengths[self._runs_of(epoch)], np.arange(0, len(self.starts), self.per_group)
        )
        ends = np.cumsum(sizes)
        index = int(np.searchsorted(ends, rest, side="right"))
        return Group(epoch, index), int(rest - (ends[index] - sizes[index]))

    def runs(self, group: Group) -> list[tuple[int, int]]:
        """(first row, rows) of a group's runs, in the store's order."""
        low = group.index * self.per_group
        chosen = np.sort(self._runs_of(group.epoch)[low : low + self.per_group])
        return list(zip(self.starts[chosen].tolist(), self.lengths[chosen].tolist(), strict=True))

    def order(self, group: Group) -> NDArray[np.int64]:
        """The order (n,) in which a group's rows are dealt out."""
        n = sum(length for _, length in self.runs(group))
        return np.random.default_rng([self.seed, group.epoch, 1, group.index]).permutation(n)

    def _runs_of(self, epoch: int) -> NDArray[np.int64]:
        if self._epoch is None or self._epoch[0] != epoch:
            order = np.random.default_rng([self.seed, epoch, 0]).permutation(len(self.starts))
            self._epoch = (epoch, order)
        return self._epoch[1]
