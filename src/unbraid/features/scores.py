"""How strongly each latent is active in each document: the table that every search starts from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csc_array
from torch import Tensor

from unbraid.activations.documents import Document
from unbraid.activations.text import Positions
from unbraid.features.rows import read_rows, site_of
from unbraid.features.search_activation import Reader
from unbraid.manifest.errors import UserError
from unbraid.manifest.progress import Progress
from unbraid.model.load import LanguageModel
from unbraid.model.sites import Site
from unbraid.sae.base import SAE

ROWS = 256
"""Tokens that are encoded at a time: where an encoder holds all pre-activations, these are ROWS × d_sae."""


@dataclass(frozen=True, eq=False)
class DocumentScores:
    """Mean activations over the read tokens of each document."""

    ids: tuple[str, ...]
    """Document ids (n_docs), in reading order."""
    latents: csc_array
    """Mean activation of each latent (n_docs, d_sae), float32; only what fires is held."""
    raw: NDArray[np.float32]
    """Mean of the site itself (n_docs, d_in)."""
    tokens: NDArray[np.int64]
    """Number of tokens read in each document (n_docs,)."""


def document_scores(
    sae: SAE,
    lm: LanguageModel,
    documents: Iterable[Document],
    site: Site | None = None,
    *,
    positions: Positions = "focus",
    context: int = 256,
    batch_tokens: int = 4096,
    progress: Progress | None = None,
) -> DocumentScores:
    """Mean latent and raw activation of each document over its focus (or reply, or all) tokens, streamed.

    Where `positions` is "focus" and no document names a focus, conversations are read at their reply and
    plain texts everywhere.  Raises UserError when some documents name a focus and others do not, or when
    a document has no token at the wanted positions.
    """
    kept = list(documents)
    sums = _Sums(sae)
    raw, tokens = _means(lm, kept, site_of(sae, lm, site), sums, positions, context, batch_tokens, progress)
    latents = sums.means(tokens)
    return DocumentScores(tuple(document.id for document in kept), latents, raw, tokens)


def site_means(
    lm: LanguageModel,
    documents: Iterable[Document],
    site: Site,
    *,
    positions: Positions = "focus",
    context: int = 256,
    batch_tokens: int = 4096,
) -> NDArray[np.float32]:
    """Mean activation at `site` of each document (n_docs, d_in), read and refused as in `document_scores`."""
    return _means(lm, list(documents), site, None, positions, context, batch_tokens, None)[0]


class _Sums:
    """Sums of each latent's activations over the tokens of each document, of those that fire there."""

    def __init__(self, sae: SAE) -> None:
        self.sae, self.d_sae = sae, sae.config.d_sae
        self._reader = Reader(sae)  # an encoder's rough copy is made once, not for each batch
        self._places: list[NDArray[np.int64]] = []  # document · d_sae + latent
        self._sums: list[NDArray[np.float32]] = []

    def add(self, x: Tensor, document: NDArray[np.int64]) -> None:
        """Encode x (n, d_in), ROWS tokens at a time, whose tokens belong to `document` (n,)."""
        for begin in range(0, len(x), ROWS):
            codes = self._reader.encode(x[begin : begin + ROWS])
            latents, values = codes.indices.cpu().numpy(), codes.values.float().cpu().numpy()
            row, slot = np.nonzero(values)
            self._append(document[begin + row] * self.d_sae + latents[row, slot], values[row, slot])

    def _append(self, places: NDArray[np.int64], values: NDArray[np.float32]) -> None:
        distinct, place = np.unique(places, return_inverse=True)
        sums = np.zeros(len(distinct), dtype=np.float32)
        np.add.at(sums, place, values)
        self._places.append(distinct)
        self._sums.append(sums)

    def means(self, tokens: NDArray[np.int64]) -> csc_array:
        """The sums divided by how many `tokens` (n_docs,) each document has, (n_docs, d_sae)."""
        self._append(
            np.concatenate([*self._places, np.empty(0, np.int64)]),
            np.concatenate([*self._sums, np.empty(0, np.float32)]),
        )
        document, latent = np.divmod(self._places[-1], self.d_sae)
        means = self._sums[-1] / tokens[document].astype(np.float32)
        return csc_array((means, (document, latent)), shape=(len(tokens), self.d_sae))


def _means(
    lm: LanguageModel,
    kept: list[Document],
    site: Site,
    sums: _Sums | None,
    positions: Positions,
    context: int,
    batch_tokens: int,
    progress: Progress | None,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    if not kept:
        raise UserError("there is no document to score; give a file that holds some")
    positions = _settled(kept, positions)
    raw = np.zeros((len(kept), lm.layout.width(site)), dtype=np.float32)
    tokens = np.zeros(len(kept), dtype=np.int64)
    for rows in read_rows(lm, kept, site, positions=positions, context=context, batch_tokens=batch_tokens):
        x = rows.x[torch.from_numpy(rows.counted).to(rows.x.device)]
        window = torch.from_numpy(rows.window[rows.counted]).to(x.device)
        document = rows.documents[rows.window[rows.counted]]
        # A document may have several windows, also in different batches, so sums are divided at the end.
        if sums is not None:
            sums.add(x, document)
        raw_sums = torch.zeros((len(rows.windows), x.shape[1]), device=x.device).index_add_(0, window, x)
        np.add.at(raw, rows.documents, raw_sums.cpu().numpy())
        np.add.at(tokens, document, 1)
        if progress is not None:
            progress(int(rows.documents[-1]) + 1, len(kept), "documents")
    if not tokens.all():
        name = kept[int(np.argmin(tokens))].id
        raise UserError(f"document {name} has no token at its {positions} positions; remove or mend it")
    return raw / tokens[:, None].astype(np.float32), tokens


def _settled(documents: list[Document], positions: Positions) -> Positions:
    if positions != "focus":
        return positions
    with_focus = sum(document.focus is not None for document in documents)
    if with_focus == len(documents):
        return "focus"
    if with_focus:
        missing = next(document.id for document in documents if document.focus is None)
        raise UserError(f"document {missing} names no focus but others do; give every document one or none")
    return "reply" if any(document.messages for document in documents) else "all"
