"""Walk documents through a model in batches and hand back the activations of their tokens at one site."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unbraid.activations.documents import Document
from unbraid.activations.text import Positions, TokenisedDocument
from unbraid.activations.text import windows as windows_of
from unbraid.manifest.errors import UserError
from unbraid.model.load import LanguageModel
from unbraid.model.read import read_sites
from unbraid.model.sites import Site
from unbraid.sae.base import SAE


@dataclass(frozen=True, eq=False)
class Rows:
    """Activations of every token of a few windows; n is their number of tokens, pads are gone.

    A window is a document, or a part of one that is longer than the context.
    """

    windows: tuple[TokenisedDocument, ...]
    """The windows of this batch, in reading order."""
    documents: NDArray[np.int64]
    """Number of the document that each window belongs to (n_windows,), counted over the whole stream."""
    x: Tensor
    """Activations (n, d_in), float32."""
    window: NDArray[np.int64]
    """Which window of this batch each row belongs to (n,)."""
    position: NDArray[np.int64]
    """Token position inside that window (n,)."""
    counted: NDArray[np.bool_]
    """Whether the row is at one of the wanted positions and not a special token (n,)."""


def batches(
    windows: Iterable[tuple[int, TokenisedDocument]], batch_tokens: int
) -> Iterator[tuple[tuple[int, TokenisedDocument], ...]]:
    """Group windows in reading order; a padded batch has at most `batch_tokens` tokens, or one window."""
    batch: list[tuple[int, TokenisedDocument]] = []
    longest = 0
    for numbered in windows:
        length = len(numbered[1].input_ids)
        if batch and max(longest, length) * (len(batch) + 1) > batch_tokens:
            yield tuple(batch)
            batch, longest = [], 0
        batch.append(numbered)
        longest = max(longest, length)
    if batch:
        yield tuple(batch)


def read_rows(
    lm: LanguageModel,
    documents: Iterable[Document],
    site: Site,
    *,
    positions: Positions,
    context: int,
    batch_tokens: int,
) -> Iterator[Rows]:
    """Activations at `site`, a batch of windows of at most `context` tokens at a time, in reading order."""
    numbered = (
        (number, window)
        for number, document in enumerate(documents)
        for window in windows_of(lm, document, context)
    )
    for batch in batches(numbered, batch_tokens):
        windows = tuple(window for _, window in batch)
        lengths = np.array([len(window.input_ids) for window in windows])
        # Padding goes to the right, behind a causal model's back; the mask keeps it out of the rows as well.
        ids = torch.zeros((len(windows), int(lengths.max())), dtype=torch.long)
        for row, window in enumerate(windows):
            ids[row, : len(window.input_ids)] = torch.tensor(window.input_ids)
        mask = torch.arange(ids.shape[1])[None, :] < torch.from_numpy(lengths)[:, None]
        values = read_sites(lm, ids.to(lm.device), mask.long().to(lm.device), [site])[site]
        yield Rows(
            windows=windows,
            documents=np.array([number for number, _ in batch], dtype=np.int64),
            x=values[mask.to(values.device)].float(),
            window=np.repeat(np.arange(len(windows)), lengths),
            position=np.concatenate([np.arange(length) for length in lengths]),
            counted=np.concatenate([window.captured(positions) for window in windows]),
        )


def site_of(sae: SAE, lm: LanguageModel, site: Site | None) -> Site:
    """The site to read: `site`, or else the one that the SAE was trained on; UserError if it does not fit."""
    chosen = sae.site if site is None else site
    if sae.config.d_in != lm.d_in:
        raise UserError(
            f"the SAE reads {sae.config.d_in} dimensions but model {lm.name} has {lm.d_in}; "
            "choose the model that the SAE was trained on"
        )
    return chosen
