"""Activations in the order of capture, shuffled within a buffer: dealt out before their end is known.

`stream.batches` mixes runs from all over a finished store. A capture that is still being written, or a model
that is read as training goes on, has no such places yet. Their rows come in groups of `buffer_tokens` that
follow one another, each shuffled inside: group g of epoch e in an order that (seed, e, g) and its size alone
decide. What is dealt out is therefore never a matter of timing, and both kinds of source, and a finished
store read the same way, deal out the same rows. The price is that the stream drifts along the corpus: text
sorted by topic is met topic after topic (`mixing.py` measures it).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unbraid.activations.rows import Rows
from unbraid.manifest.errors import UserError
from unbraid.model.sites import Site

BUFFER_TOKENS = 131_072


@dataclass(frozen=True)
class Origin:
    """What activations came from, as the manifest of what is made from them tells it."""

    inputs: Mapping[str, str]
    """Content ids by name."""
    paths: Mapping[str, Path | str] = field(default_factory=dict[str, Path | str])
    """Where those lie that lie anywhere: folders, or URLs."""
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """How they were read."""


class InOrder(ABC):
    """A source of rows in the order of capture; memory is one buffer of the sites that are read."""

    sites: tuple[Site, ...]
    """What can be read."""
    model_name: str
    """Name of the model that is read."""
    model_id: str
    """Content id of its weights."""
    tokenizer_id: str
    """Content id of its tokenizer."""
    context: int
    """Tokens it reads at once."""
    ahead: bool
    """Whether rows may be fetched by another thread while those before are used."""

    def __init__(self, buffer_tokens: int) -> None:
        if buffer_tokens < 1:
            raise UserError(f"buffer_tokens is {buffer_tokens}; choose a --buffer-tokens of at least 1")
        self.buffer_tokens = buffer_tokens
        self.length: int | None = None
        """Rows in an epoch, once the end has been seen."""
        self._sites: tuple[Site, ...] = ()
        self._buffers: dict[Site, Rows] = {}
        self._held: tuple[int, int] | None = None  # the group in the buffers and its rows
        self._cancelled = Event()

    @abstractmethod
    def site(self, site: Site | str) -> Site:
        """The site of that name; raises UserError listing what there is."""

    @abstractmethod
    def d_in(self, site: Site | str) -> int:
        """Width of a site's activations."""

    @abstractmethod
    def so_far(self, rows: int) -> str:
        """Content id of the settings and of all that was read for the stream's first `rows` rows: what must
        be the same when a run goes on after them."""

    @abstractmethod
    def origin(self, rows: int) -> Origin:
        """Where the first `rows` rows of the stream came from; waits until that can be told."""

    @abstractmethod
    def _stored(self) -> str:
        """How rows are held: the type in which a capture stores them."""

    @abstractmethod
    def _fill(self, first: int, out: Mapping[Site, Rows]) -> int:
        """Fill (buffer_tokens, d) of each site with an epoch's rows from number `first` on; returns how many.

        They are fewer only where the epoch ends, and then `length` is known.
        """

    def cancel(self) -> None:
        """Give up waiting for rows, in whatever thread that is done."""
        self._cancelled.set()

    def first_group(self, sites: Sequence[Site]) -> int:
        """Rows in the first group: what can be measured before training. Raises UserError for none."""
        rows = self._group(0, tuple(sites))[1]
        if not rows:
            raise UserError(f"{self} has no tokens to train on; give another text, or other --positions")
        return rows

    def batches(
        self, sites: Sequence[Site], batch_size: int, *, seed: int, steps: int, start: int = 0
    ) -> Iterator[dict[Site, Tensor]]:
        """Batches (batch_size, d) in float32 of every site, rows of one token together; `steps` of them
        counted from the first, less the first `start`, which are not read where they fill whole groups.

        Every epoch delivers every row once; a batch may reach over its end. Raises UserError for a source
        without rows, and what reading raises.
        """
        self._cancelled.clear()
        return self._deal(tuple(sites), batch_size, seed, steps, start)

    def _deal(
        self, sites: tuple[Site, ...], batch_size: int, seed: int, steps: int, start: int
    ) -> Iterator[dict[Site, Tensor]]:
        row, total = start * batch_size, steps * batch_size
        parts: dict[Site, list[Tensor]] = {site: [] for site in sites}
        ready = 0
        while row < total:
            epoch, place = divmod(row, self.length) if self.length else (0, row)
            group, offset = divmod(place, self.buffer_tokens)
            rows = self._group(group, sites)[1]
            if offset >= rows:  # the end lies before this row, which was not known
                if not self.length:
                    self.first_group(sites)
                continue
            order = torch.from_numpy(order_of(seed, epoch, group, rows))
            while offset < rows and row < total:
                take = min(batch_size - ready, rows - offset)
                # Looked up for every batch: another stream may have put other rows into the buffers.
                held, _ = self._group(group, sites)
                for site in sites:
                    parts[site].append(held[site].take(order[offset : offset + take]))
                ready, offset, row = ready + take, offset + take, row + take
                if ready == batch_size:
                    yield {site: torch.cat(found).to(torch.float32) for site, found in parts.items()}
                    parts, ready = {site: [] for site in sites}, 0

    def _group(self, group: int, sites: tuple[Site, ...]) -> tuple[dict[Site, Rows], int]:
        """A group's rows as they were captured, (n, d) of each site, and n."""
        if sites != self._sites:
            self._sites, self._held = sites, None
            self._buffers = {
                site: Rows.empty(self.buffer_tokens, self.d_in(site), self._stored()) for site in sites
            }
        if self._held is None or self._held[0] != group:
            self._held = None  # whatever goes wrong, half a group is never taken for a whole one
            self._held = (group, self._fill(group * self.buffer_tokens, self._buffers))
        return self._buffers, self._held[1]


def order_of(seed: int, epoch: int, group: int, rows: int) -> NDArray[np.int64]:
    """The order (rows,) in which a group's rows are dealt out."""
    return np.random.default_rng([seed, epoch, 2, group]).permutation(rows)
