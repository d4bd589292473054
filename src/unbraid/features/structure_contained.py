"""What a latent is split into in a wider autoencoder, by where they fire: a part fires within the whole.

Two indexes of one text sample the same tokens, for a token's key depends on the text and the seed alone; the
sample of the one that kept less of it is the one that both have.  On these tokens all is counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy.sparse import csr_array

from unbraid.features.finish import SAMPLED
from unbraid.features.hashes import U64
from unbraid.features.page import Index
from unbraid.manifest.errors import UserError
from unbraid.stats.bootstrap import wilson

BLOCK = 256
"""Latents of the wider autoencoder whose firings are compared with all others' at a time."""


@dataclass(frozen=True)
class Part:
    """A latent of the wider autoencoder that fires almost only where another one does."""

    child: int
    """Its number there."""
    together: int
    """Sampled tokens on which both fire."""
    firings: int
    """Sampled tokens on which the part fires."""
    own: int
    """Sampled tokens on which the whole fires."""
    share: float
    """together / firings: how much of the part lies within the whole."""
    low: float
    """Lower end of that share's 95 % Wilson interval, tokens taken as independent."""
    high: float
    """Its upper end."""


def contained(
    index: Index, wider: Index, *, bar: float, support: int, dense: float
) -> tuple[dict[int, list[Part]], int]:
    """Parts by latent, those that share most tokens with it first, and how many tokens were compared.

    A part fires on `support` or more of these tokens, and its share's interval begins at `bar` or above.
    Latents that fire on more than `dense` of the tokens contain others by chance, and are nobody's whole.
    Raises UserError where the indexes are not of the same tokens and site, or the other one is no wider.
    """
    _require_same_tokens(index, wider)
    keys, mine = _sample(index)
    others, theirs = _sample(wider)
    both, a, b = np.intersect1d(keys, others, assume_unique=True, return_indices=True)
    whole, part = mine[a], theirs[b].tocsc()
    own, firings = (np.asarray(m.sum(axis=0)).ravel() for m in (whole, part))
    enough = np.flatnonzero(firings >= support)
    found: dict[int, list[Part]] = {}
    for begin in range(0, len(enough), BLOCK):
        some = enough[begin : begin + BLOCK]
        together: Any = (part[:, some].T @ whole).tocoo()
        for row, latent, n in zip(together.row, together.col, together.data, strict=True):
            child, trials = int(some[row]), int(firings[some[row]])
            if n < bar * trials or own[latent] > dense * len(both):
                continue
            low, high = wilson(int(n), trials)
            if low >= bar:
                one = Part(child, int(n), trials, int(own[latent]), int(n) / trials, low, high)
                found.setdefault(int(latent), []).append(one)
    for parts in found.values():
        parts.sort(key=lambda one: (-one.together, one.child))
    return found, len(both)


def _sample(index: Index) -> tuple[U64, Any]:
    """The keys of the sampled tokens (n,), rising, and who fires on each, (n, d_sae) of ones."""
    table = pq.read_table(index.folder / SAMPLED)
    of = table["latents"].combine_chunks()
    latents: NDArray[np.int32] = of.flatten().to_numpy()
    starts = np.concatenate([[0], np.cumsum(of.value_lengths().to_numpy(), dtype=np.int64)])
    ones = np.ones(len(latents), np.int64)
    return table["key"].to_numpy(), csr_array((ones, latents, starts), shape=(len(table), index.d_sae))


def _require_same_tokens(index: Index, wider: Index) -> None:
    def said(of: Index) -> dict[str, Any]:
        facts = of.manifest.facts
        return {
            "documents": of.manifest.inputs["documents"],
            "site": facts["site"],
            "counted tokens": facts["tokens"],
            "seed": facts["config"]["seed"],
        }

    theirs = said(wider)
    for name, value in said(index).items():
        if theirs[name] != value:
            raise UserError(
                f"{wider.folder} and {index.folder} differ in {name}, so they do not show the same tokens;"
                " index the wider SAE with the same text and settings"
            )
    if wider.d_sae <= index.d_sae:
        raise UserError(
            f"{wider.folder} has {wider.d_sae} latents, which is no more than the {index.d_sae} of"
            f" {index.folder}; name the index of a wider SAE"
        )
