"""How often each latent fires on each token, counted over all firings, in bounded memory.

A pair is a latent and a token.  Pairs are held sorted by latent; when there are more than `ROOM` of them
they go to a file (a run), and a finish adds up the runs a block of latents at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unbraid.features import lists
from unbraid.features.hashes import I32, I64
from unbraid.manifest.files import writing
from unbraid.sae.kernels.cpu import PARTS, side_by_side

ROOM = 1 << 22
"""Pairs held in memory: 34 MB."""
MOST_RUNS = 8
"""Files that are kept before they are made one."""
BLOCK = 512
"""Latents that are added up at a time."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """Those of latent j are token, times[first[j]:first[j + 1]], each token once, in no order."""

    first: I64
    """(d_sae + 1,)."""
    token: I32
    times: I32

    @staticmethod
    def none(d_sae: int) -> Pairs:
        """No pairs."""
        return Pairs(np.zeros(d_sae + 1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int32))

    def plus(self, first: I64, token: I32, times: I32) -> Pairs:
        """The sum with other pairs, whose times are 1 where `times` is empty; a token may be there twice."""
        d_sae, out = len(first) - 1, first + self.first
        room = int(out[-1])
        item, count = np.empty(room, np.int32), np.empty(room, np.int32)
        found, new_first = np.empty(d_sae, np.int64), np.empty(d_sae + 1, np.int64)
        items = 1 + max(int(token.max(initial=0)), int(self.token.max(initial=0)))
        cuts = np.searchsorted(out, np.linspace(0, room, PARTS + 1)).clip(max=d_sae)
        cuts[0], cuts[-1] = 0, d_sae

        def some(part: int) -> None:
            lists.count_pairs(
                int(cuts[part]), int(cuts[part + 1]), first, token, self.first, self.token, self.times,
                np.zeros(items, np.int32), out, item, count, found, times,
            )  # fmt: skip

        side_by_side(some, range(PARTS))
        lists.close_up(out, found, item, count, new_first)
        for array in (item, count):  # where they are, for a copy would be their memory once more
            array.resize(int(new_first[-1]), refcheck=False)
        return Pairs(new_first, item, count)

    def block(self, begin: int, end: int) -> Pairs:
        """The pairs of latents begin … end − 1, numbered from 0."""
        first = self.first[begin : end + 1]
        return Pairs(first - first[0], self.token[first[0] : first[-1]], self.times[first[0] : first[-1]])


class Run:
    """Pairs in a file: first, tokens and times, one after another, little-endian."""

    def __init__(self, path: Path, d_sae: int) -> None:
        self.path, self.d_sae = path, d_sae
        self.first = np.fromfile(path, "<i8", d_sae + 1)

    def block(self, begin: int, end: int) -> Pairs:
        """The pairs of latents begin … end − 1, numbered from 0."""
        first = self.first[begin : end + 1]
        at, n, base = int(first[0]), int(first[-1] - first[0]), 8 * (self.d_sae + 1)
        token, times = (
            np.fromfile(self.path, "<i4", n, offset=base + 4 * (at + skip))
            for skip in (0, int(self.first[-1]))
        )
        return Pairs(first - at, token, times)


class TokenCounts:
    """Pairs of a growing corpus: what is held, and runs in `folder`, numbered as they were written."""

    def __init__(self, folder: Path, d_sae: int, runs: int = 0) -> None:
        self.folder, self.d_sae = folder, d_sae
        self.held = Pairs.none(d_sae)
        self.runs = runs
        """Number of the next run."""
        self.oldest = 0
        """Number of the oldest run that counts: those before it were made one."""
        self.firings = 0
        """Firings among what is held."""

    def add(self, first: I64, token: I32, times: I32 | None = None) -> None:
        """Count firings by latent, each with its token, or pairs of them."""
        self.held = self.held.plus(first, token, np.zeros(0, np.int32) if times is None else times)
        self.firings += len(token) if times is None else int(times.sum(dtype=np.int64))
        if len(self.held.token) > ROOM or self.firings > 1 << 30:
            self.spill()

    def spill(self) -> None:
        """Write what is held to a run of its own."""
        self._write((self.held.block(j, j + BLOCK) for j in self._begins()), self.held.first)
        self.held, self.firings = Pairs.none(self.d_sae), 0
        if self.runs - self.oldest > MOST_RUNS:
            self._compact()

    def _begins(self) -> range:
        return range(0, self.d_sae, BLOCK)

    def _write(self, blocks: Iterator[Pairs], first: I64) -> None:
        with writing(self._path(self.runs)) as path, path.open("w+b") as file:
            first.astype("<i8").tofile(file)
            base, at, total = 8 * len(first), 0, int(first[-1])
            for block in blocks:
                for skip, values in ((0, block.token), (total, block.times)):
                    file.seek(base + 4 * (at + skip))
                    values.astype("<i4").tofile(file)
                at += len(block.token)
        self.runs += 1

    def _compact(self) -> None:
        runs = self._runs()
        sizes = [np.diff(self._sum(runs, j).first) for j in self._begins()]
        first = np.concatenate([[0], np.cumsum(np.concatenate(sizes))]).astype(np.int64)
        self._write((self._sum(runs, j) for j in self._begins()), first)
        self.oldest = self.runs - 1

    def tidy(self) -> None:
        """Remove the files of runs that count no more, once nothing that was saved names them."""
        for path in self.folder.glob("run-*.bin"):
            if not self.oldest <= int(path.stem.removeprefix("run-")) < self.runs:
                path.unlink()

    def blocks(self) -> Iterator[Pairs]:
        """All pairs, BLOCK latents at a time, each latent's most frequent token first, then by number."""
        runs = self._runs()
        for begin in self._begins():
            total = self._sum([*runs, self.held], begin)
            latent = np.repeat(np.arange(len(total.first) - 1), np.diff(total.first))
            order = np.lexsort((total.token, -total.times.astype(np.int64), latent))
            yield Pairs(total.first, total.token[order], total.times[order])

    def _runs(self) -> list[Run | Pairs]:
        return [Run(self._path(number), self.d_sae) for number in range(self.oldest, self.runs)]

    def _sum(self, parts: list[Run | Pairs], begin: int) -> Pairs:
        end = min(begin + BLOCK, self.d_sae)
        total = Pairs.none(end - begin)
        for part in parts:
            block = part.block(begin, end)
            total = total.plus(block.first, block.token, block.times)
        return total

    def _path(self, number: int) -> Path:
        return self.folder / f"run-{number:06d}.bin"
