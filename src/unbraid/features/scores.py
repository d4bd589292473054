"""How strongly each latent is active in each document: the table that every search starts from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from unbraid.activations.documents import Document
from unbraid.activations.text import Positions
from unbraid.features.rows import read_rows, site_of
from unbraid.manifest.errors import UserError
from unbraid.manifest.progress import Progress
from unbraid.model.load import LanguageModel
from unbraid.model.sites import Site
from unbraid.sae.base import SAE


@dataclass(frozen=True, eq=False)
class DocumentScores:
    """Mean activations over the read tokens of each document."""

    ids: tuple[str, ...]
    """Document ids (n_docs), in reading order."""
    latents: NDArray[np.float32]
    """Mean activation of each latent (n_docs, d_sae)."""
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
    latents, raw, tokens = _means(
        lm, kept, site_of(sae, lm, site), sae, positions, context, batch_tokens, progress
    )
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
    return _means(lm, list(documents), site, None, positions, context, batch_tokens, None)[1]


def _means(
    lm: LanguageModel,
    kept: list[Document],
    site: Site,
    sae: SAE | None,
    positions: Positions,
    context: int,
    batch_tokens: int,
    progress: Progress | None,
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    if not kept:
        raise UserError("there is no document to score; give a file that holds some")
    positions = _settled(kept, positions)
    d_sae = 0 if sae is None else sae.config.d_sae
    latents = np.zeros((len(kept), d_sae), dtype=np.float32)
    raw = np.zeros((len(kept), lm.layout.width(site)), dtype=np.float32)
    tokens = np.zeros(len(kept), dtype=np.int64)
    for rows in read_rows(lm, kept, site, positions=positions, context=context, batch_tokens=batch_tokens):
        x = rows.x[torch.from_numpy(rows.counted).to(rows.x.device)]
        window = torch.from_numpy(rows.window[rows.counted]).to(x.device)
        # A document may have several windows, also in different batches, so sums are divided at the end.
        if sae is not None:
            with torch.no_grad():
                codes = sae.encode(x)
            sums = torch.zeros(len(rows.windows) * d_sae, device=x.device)
            flat = window[:, None] * d_sae + codes.indices.to(x.device)
            sums.index_add_(0, flat.reshape(-1), codes.values.to(x.device).float().reshape(-1))
            np.add.at(latents, rows.documents, sums.view(-1, d_sae).cpu().numpy())
        raw_sums = torch.zeros((len(rows.windows), x.shape[1]), device=x.device).index_add_(0, window, x)
        np.add.at(raw, rows.documents, raw_sums.cpu().numpy())
        np.add.at(tokens, rows.documents[rows.window[rows.counted]], 1)
        if progress is not None:
            progress(int(rows.documents[-1]) + 1, len(kept), "documents")
    if not tokens.all():
        name = kept[int(np.argmin(tokens))].id
        raise UserError(f"document {name} has no token at its {positions} positions; remove or mend it")
    return latents / tokens[:, None].astype(np.float32), raw / tokens[:, None].astype(np.float32), tokens


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
