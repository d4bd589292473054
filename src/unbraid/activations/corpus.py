"""Text as padded batches, with masks that say where an autoencoder is spliced in and what is scored."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from unbraid.activations.documents import Document
from unbraid.activations.text import TokenisedDocument, windows
from unbraid.manifest.errors import UserError
from unbraid.model.load import LanguageModel

Positions = Literal["all", "reply"]
BLOCKS = 1024
"""The most units an interval draws from; more documents than that share units, so memory stays bounded."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Windows of documents side by side, padded on the right."""

    input_ids: Tensor
    """Token ids, (B, T) int64."""
    attention_mask: Tensor
    """1 on tokens and 0 on padding, (B, T) int64."""
    chosen: Tensor
    """Tokens whose activation is reconstructed and spliced, (B, T) booleans; never BOS, EOS or PAD."""
    scored: Tensor
    """Tokens whose prediction of the next one counts, (B, T - 1) booleans: neither of the two is special."""
    blocks: Tensor
    """Unit of each window for intervals, (B,) int64: the number of its document, modulo BLOCKS."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """All batches of an evaluation."""

    batches: tuple[Batch, ...]
    """In the documents' order."""
    tokens: int
    """Chosen tokens in all."""
    documents: int
    """Documents with at least one chosen token."""


def read_corpus(
    lm: LanguageModel,
    documents: Iterable[Document],
    *,
    tokens: int | None,
    context: int,
    positions: Positions,
    batch_tokens: int,
) -> Corpus:
    """Tokenise documents until `tokens` tokens are chosen (exactly; None: all), in windows of `context`.

    Raises UserError when no token could be chosen.
    """
    batches: list[Batch] = []
    waiting: list[tuple[TokenisedDocument, int]] = []
    total, seen, longest = 0, 0, 0
    for number, document in enumerate(documents):
        before = total
        for window in windows(lm, document, context):
            if tokens is not None and total == tokens:
                break
            window, count = _cut(window, positions, None if tokens is None else tokens - total)
            if not count:
                continue
            length = len(window.input_ids)
            if waiting and max(longest, length) * (len(waiting) + 1) > batch_tokens:
                batches.append(_batch(waiting, lm.pad_id, positions))
                waiting, longest = [], 0
            waiting.append((window, number % BLOCKS))
            longest, total = max(longest, length), total + count
        seen += total > before
        if tokens is not None and total == tokens:
            break
    if waiting:
        batches.append(_batch(waiting, lm.pad_id, positions))
    if not total:
        what = "no tokens of assistant replies" if positions == "reply" else "no tokens"
        raise UserError(f"the text has {what} to evaluate on; give another --text")
    return Corpus(tuple(batches), total, seen)


def _cut(window: TokenisedDocument, positions: Positions, left: int | None) -> tuple[TokenisedDocument, int]:
    """The window up to its `left`-th chosen token, and how many it has."""
    chosen = window.captured(positions)
    count = int(chosen.sum())
    if left is None or count <= left:
        return window, count
    end = int(chosen.cumsum().searchsorted(left)) + 1
    return window.until(end), left


def _batch(rows: list[tuple[TokenisedDocument, int]], pad_id: int, positions: Positions) -> Batch:
    length = max(len(window.input_ids) for window, _ in rows)
    ids = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    real, chosen, plain = (torch.zeros(len(rows), length, dtype=torch.bool) for _ in range(3))
    for i, (window, _) in enumerate(rows):
        end = len(window.input_ids)
        ids[i, :end] = torch.tensor(window.input_ids)
        real[i, :end] = True
        chosen[i, :end] = torch.from_numpy(window.captured(positions))
        plain[i, :end] = ~torch.tensor(window.special_mask)
    blocks = torch.tensor([block for _, block in rows])
    return Batch(ids, real.long(), chosen, plain[:, :-1] & plain[:, 1:], blocks)
