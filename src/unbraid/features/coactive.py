"""Which latents fire on the same tokens: counted on a uniform sample of tokens, never as a dense matrix.

A token belongs to the sample at level s when its random key is below 2^(64 − s).  The level rises when the
sample's entries are more than there is room for, so the sample depends neither on batches nor on order, and
two samples can be merged.  At level 0 every token is in it, and the counts are exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from unbraid.features import lists
from unbraid.features.hashes import I32, I64, U64
from unbraid.features.memory import grown
from unbraid.sae.kernels.cpu import side_by_side

FEWEST = 5
"""Tokens on which two latents must fire together before their mutual information is ranked."""
BLOCK = 128
"""Latents whose neighbours are found at a time."""


@dataclass(frozen=True, eq=False)
class Neighbours:
    """For a block of latents those that fire on the same sampled tokens; all (n,)."""

    latent: I32
    rank: I32
    neighbour: I32
    together: I64
    own: I64
    other: I64


class TokenSample:
    """Codes of a uniform sample of tokens with at most `room` entries; memory 4 bytes each."""

    def __init__(self, d_sae: int, room: int) -> None:
        self.d_sae, self.room = d_sae, room
        self.level = 0
        self.keys: U64 = np.zeros(0, np.uint64)
        self.sizes: I32 = np.zeros(0, np.int32)
        self.latents: I32 = np.zeros(0, np.int32)

    def __len__(self) -> int:
        return len(self.keys)

    def add(self, keys: U64, starts: I64, latents: I32, level: int = 0) -> None:
        """Let the tokens with these keys (n,) in, whose latents are latents[starts[i]:starts[i + 1]]."""
        self.level = max(self.level, level)
        chosen = self._inside(keys)
        sizes = np.diff(starts).astype(np.int32)
        self.keys = grown(self.keys, keys[chosen])
        self.latents = grown(self.latents, latents[np.repeat(chosen, sizes)])
        self.sizes = grown(self.sizes, sizes[chosen])
        inside = self._inside(self.keys)
        while int(self.sizes.sum(dtype=np.int64, where=inside)) > self.room:
            self.level += 1
            inside = self._inside(self.keys)
        if not inside.all():
            self.latents = self.latents[np.repeat(inside, self.sizes)]
            self.keys, self.sizes = self.keys[inside], self.sizes[inside]

    def _inside(self, keys: U64) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        return (keys >> np.uint64(64 - self.level)) == 0 if self.level else np.ones(len(keys), bool)

    @property
    def starts(self) -> I64:
        """Where each token's latents begin (n + 1,)."""
        return np.concatenate([[0], np.cumsum(self.sizes, dtype=np.int64)])

    def neighbours(self, k: int) -> list[Neighbours]:
        """BLOCK latents at a time: the k with the highest Jaccard index, then more by mutual information."""
        starts, first, rows = self.starts, np.empty(self.d_sae + 1, np.int64), np.empty_like(self.latents)
        lists.by_latent(starts, self.latents, first, rows)
        own = np.diff(first)

        def some(begin: int) -> Neighbours:
            end = min(begin + BLOCK, self.d_sae)
            neighbour = np.empty((end - begin, 2 * k), np.int32)
            together, found = np.empty_like(neighbour), np.empty(end - begin, np.int64)
            lists.coactive(
                begin,
                end,
                starts,
                self.latents,
                first,
                rows,
                FEWEST,
                neighbour,
                together,
                found,
            )
            held = np.arange(2 * k) < found[:, None]
            latent, rank = np.nonzero(held)
            return Neighbours(
                (latent + begin).astype(np.int32),
                rank.astype(np.int32),
                neighbour[held],
                together[held].astype(np.int64),
                own[latent + begin],
                own[neighbour[held]],
            )

        return side_by_side(some, range(0, self.d_sae, BLOCK))
