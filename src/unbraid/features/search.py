"""Search an index: by text, by meaning, by a pasted text, by direction, by numbers.

Every way gives the same kind of answer, latents with a score and the reason.  What a way needs is made when
it is first used and kept: a full-text file beside the index folder, a rough copy of the encoder in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unbraid.features.embedding import Embedder, open_embedder
from unbraid.features.labels.store import Labels
from unbraid.features.page import Index
from unbraid.features.search_activation import Order, Reader
from unbraid.features.search_labels import LabelText
from unbraid.features.search_meaning import Meanings
from unbraid.features.search_numbers import Condition, Numbers, smallest
from unbraid.features.search_text import TextIndex
from unbraid.manifest.errors import UserError
from unbraid.manifest.progress import Progress
from unbraid.model.load import LanguageModel
from unbraid.sae.base import SAE

BLOCK = 65_536
"""Decoder rows that are compared with a direction at a time."""


@dataclass(frozen=True)
class Hit:
    """A latent that a search found."""

    latent: int
    """Number of the latent."""
    score: float
    """What it is ranked by; the unit depends on the search, see `why`."""
    why: str
    """The reason, in words; quotes text of the corpus, which is not to be trusted."""
    activations: tuple[float, ...] = ()
    """In a search by activation, the latent's activation at each token of the text."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


class Search:
    """All ways to search one index; the labels of people are searched as well where they are given."""

    def __init__(
        self, index: Index, labels: Labels | None = None, *, embedder: Embedder | None = None
    ) -> None:
        self.index = index
        self.embedder = embedder
        self.labels = labels
        self._reader: Reader | None = None
        self._lengths: tuple[SAE, Tensor] | None = None

    @cached_property
    def words(self) -> TextIndex:
        """The full-text index, which is built on first use."""
        return TextIndex.of(self.index)

    def text(self, query: str, limit: int = 20) -> list[Hit]:
        """Latents whose label, firing words, promoted tokens or examples hold all words of `query`.

        "Words in quotes" stand next to each other, and a word* is the beginning of one.  The score says
        where: 5 in a label, 4 in the words that the latent mostly fires on, 3 in words that it fires on, or
        fires on at times, or in a phrase that it fires within, 2 in tokens that it promotes, 1 around its
        strongest firings; then the latent that fires more often comes first.  No query fails: what is no
        word is passed over.
        """
        found: dict[int, Hit] = {}
        if self.labelled is not None:
            for label in self.labelled.search(query, limit):
                found[label.latent] = Hit(label.latent, 5, f"label: {label.text}")
        for match in self.words.search(query, limit + len(found)):
            found.setdefault(match.latent, Hit(match.latent, match.place, match.why))
        return list(found.values())[: max(limit, 0)]

    @cached_property
    def labelled(self) -> LabelText | None:
        """The words of the labels, where there are any."""
        return None if self.labels is None else LabelText(self.labels)

    def meaning(self, query: str, limit: int = 20, progress: Progress | None = None) -> list[Hit]:
        """Latents whose label, or else what they fire on, is nearest in meaning, by the cosine.

        The first question embeds every latent, at the embedding model's speed.  Raises UserError, saying what
        to install, where there is no embedding model.
        """
        found = self.meanings.search(query, limit, progress)
        return [Hit(latent, cosine, text) for latent, cosine, text in found]

    @cached_property
    def meanings(self) -> Meanings:
        """The vectors of what is said of each latent."""
        return Meanings(self.index, self.embedder or open_embedder(), self.labels)

    def activation(
        self, sae: SAE, lm: LanguageModel, text: str, limit: int = 20, *, order: Order = "surprise"
    ) -> list[Hit]:
        """Latents that fire on a text, with their activation at each of its tokens (which `reader` gives).

        `order`: "surprise" is the largest activation as a share of the latent's largest over the corpus,
        times −log10 of its density; "activation" is the largest activation as it is.
        """
        read = self.reader(sae).read(lm, text)
        return [
            Hit(latent, score, why, values)
            for latent, score, why, values in read.ranked(self._scale, order, limit)
        ]

    def reader(self, sae: SAE) -> Reader:
        """What encodes a text fast, made once for an autoencoder; it holds a quarter of its encoder again."""
        if self._reader is None or self._reader.sae is not sae:
            self._reader = Reader(sae)
        return self._reader

    @cached_property
    def _scale(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Each latent's largest activation and its density over the corpus, (d_sae,) each."""
        # A latent that never fired over the corpus counts as one that fired once.
        rare = np.maximum(self.numbers.column("density"), 1 / max(self.index.n_tokens, 1))
        return self.numbers.column("max"), rare

    def direction(self, vector: NDArray[np.floating[Any]], sae: SAE, limit: int = 20) -> list[Hit]:
        """Latents whose decoder row has the largest cosine with `vector` (d_in,).

        Raises UserError for a vector of another width, of length zero or with entries that are not finite.
        """
        known = self._lengths
        if known is None or known[0] is not sae:
            known = self._lengths = sae, row_lengths(sae)
        cosines = decoder_cosines(vector, sae, known[1])
        best = smallest(-cosines, limit)
        return [Hit(int(j), float(cosines[j]), f"decoder cosine {cosines[j]:.3f}") for j in best]

    def statistics(
        self, where: Sequence[str | Condition] = (), order: str = "-density", limit: int = 20
    ) -> list[Hit]:
        """Latents that fulfil all conditions, such as "density<0.01", by a column ("-" for largest first).

        Columns are the numbers of latents.parquet.  Raises UserError naming a condition that is none.
        """
        return [Hit(*found) for found in self.numbers.matching(where, order, limit)]

    @cached_property
    def numbers(self) -> Numbers:
        """The numbers of every latent, read on first use."""
        return Numbers(self.index)


def row_lengths(sae: SAE) -> Tensor:
    """Lengths of the decoder's rows (d_sae,); a row of zeros counts as nearly 0, to be divided by."""
    with torch.no_grad():
        parts = [block.float().norm(dim=1) for block in sae.W_dec.split(BLOCK)]
    return torch.cat(parts).clamp(min=1e-30)


def decoder_cosines(
    vector: NDArray[np.floating[Any]], sae: SAE, lengths: Tensor | None = None
) -> NDArray[np.float32]:
    """Cosine of a direction (d_out,) with every decoder row, (d_sae,); a row of zeros has 0.

    `lengths` are `row_lengths`, where they are known from an earlier question.

    Raises UserError for a vector of another width, of length zero or with entries that are not finite.
    """
    wanted = sae.W_dec.shape[1]
    v = torch.as_tensor(np.asarray(vector, dtype=np.float32)).reshape(-1)
    if len(v) != wanted:
        raise UserError(
            f"the direction has {len(v)} entries but decoder rows have {wanted}; give one of these"
        )
    if not bool(torch.isfinite(v).all()) or not bool(v.any()):
        raise UserError("the direction is zero or holds entries that are not finite; give another")
    v = v / v.norm()
    lengths = row_lengths(sae) if lengths is None else lengths
    found = np.empty(len(sae.W_dec), dtype=np.float32)
    with torch.no_grad():
        # In blocks, so that a decoder that is mapped from the disk is passed through and not held.
        for first in range(0, len(found), BLOCK):
            rows = sae.W_dec[first : first + BLOCK].float()
            cosines = (rows @ v) / lengths[first : first + BLOCK]
            found[first : first + BLOCK] = cosines.cpu().numpy()
    return found
