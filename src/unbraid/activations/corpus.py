"""Text as padded batches, with masks that say where an autoencoder is spliced in and what is scored."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
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
    """Unit of each window for intervals, (B,) int64: the place of its document when all are ordered by a hash
    of their tokens, modulo BLOCKS. So intervals do not depend on the documents' order."""
    first: Tensor
    """How many chosen tokens stand before each window, (B,) int64, in the documents' order."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """All batches of an evaluation."""

    batches: tuple[Batch, ...]
    """In the documents' order, or the longest windows first."""
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
    by_length: bool = False,
) -> Corpus:
    """Tokenise documents until `tokens` tokens are chosen (exactly; None: all), in windows of `context`.

    With `by_length` the longest windows come first, so that hardly any padding is needed. Raises UserError
    when no token could be chosen.
    """
    rows: list[_Row] = []
    digests: list[bytes] = []
    total = 0
    for document in documents:
        before, digest = total, hashlib.sha256()
        for window in windows(lm, document, context):
            if tokens is not None and total == tokens:
                break
            window, count = _cut(window, positions, None if tokens is None else tokens - total)
            if count:
                rows.append(_Row.of(window, positions, len(digests), total))
                digest.update(repr(window.input_ids).encode())
                total += count
        if total > before:
            digests.append(digest.digest())
        if tokens is not None and total == tokens:
            break
    if not total:
        what = "no tokens of assistant replies" if positions == "reply" else "no tokens"
        raise UserError(f"the text has {what} to evaluate on; give another --text")
    order = sorted(range(len(digests)), key=digests.__getitem__)
    units = {document: place % BLOCKS for place, document in enumerate(order)}
    if by_length:
        rows.sort(key=lambda row: -len(row.ids))
    batches = (_batch(group, units, lm.pad_id) for group in _groups(rows, batch_tokens))
    return Corpus(tuple(batches), total, len(digests))


class _Row(NamedTuple):
    """A window, the number of its document, and how many chosen tokens stand before it.

    As arrays: tuples of Python's integers would take twenty times the memory, and all rows are held at once.
    """

    ids: NDArray[np.int32]
    chosen: NDArray[np.bool_]
    plain: NDArray[np.bool_]
    """Neither BOS, EOS nor PAD."""
    document: int
    first: int

    @classmethod
    def of(cls, window: TokenisedDocument, positions: Positions, document: int, first: int) -> _Row:
        """A tokenised window."""
        plain = ~np.array(window.special_mask, dtype=np.bool_)
        return cls(
            np.array(window.input_ids, dtype=np.int32), window.captured(positions), plain, document, first
        )


def _groups(rows: list[_Row], batch_tokens: int) -> Iterator[list[_Row]]:
    """Rows that make a batch, padding counted."""
    waiting: list[_Row] = []
    longest = 0
    for row in rows:
        length = len(row.ids)
        if waiting and max(longest, length) * (len(waiting) + 1) > batch_tokens:
            yield waiting
            waiting, longest = [], 0
        waiting.append(row)
        longest = max(longest, length)
    yield waiting


def _cut(window: TokenisedDocument, positions: Positions, left: int | None) -> tuple[TokenisedDocument, int]:
    """The window up to its `left`-th chosen token, and how many it has."""
    chosen = window.captured(positions)
    count = int(chosen.sum())
    if left is None or count <= left:
        return window, count
    end = int(chosen.cumsum().searchsorted(left)) + 1
    return window.until(end), left


def _batch(rows: list[_Row], units: dict[int, int], pad_id: int) -> Batch:
    length = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    real, chosen, plain = (torch.zeros(len(rows), length, dtype=torch.bool) for _ in range(3))
    for i, row in enumerate(rows):
        end = len(row.ids)
        ids[i, :end] = torch.from_numpy(row.ids)
        real[i, :end] = True
        chosen[i, :end] = torch.from_numpy(row.chosen)
        plain[i, :end] = torch.from_numpy(row.plain)
    blocks = torch.tensor([units[row.document] for row in rows])
    first = torch.tensor([row.first for row in rows])
    return Batch(ids, real.long(), chosen, plain[:, :-1] & plain[:, 1:], blocks, first)
