"""Which tokens are captured and in which batches: a function of the documents and settings alone.

Nothing here depends on where an earlier run stopped, which is what lets a resumed capture repeat the very
batches of an undisturbed one, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unbraid.activations.strata import draw
from unbraid.activations.text import Document, Positions, TokenisedDocument, windows

# Windows are sorted by length within this many batches' worth of tokens: little padding, bounded memory.
LOOK_AHEAD = 32
# A batch that is this full ends rather than take a window that would make more than this of it padding.
FULL_ENOUGH, MOST_PADDING = 1 / 8, 1 / 16
# A stretch ends after so many documents even if nothing in them is captured.
MOST_DOCUMENTS = 16384


@dataclass(frozen=True, eq=False)
class Piece:
    """One window of one document with the tokens that are wanted from it."""

    window: TokenisedDocument
    """The tokens (T,) as the model reads them."""
    document: int
    """The document's place in the corpus, from 0."""
    keep: NDArray[np.bool_]
    """Mask (T,) of the tokens to capture."""

    @property
    def rows(self) -> int:
        """Number of tokens to capture."""
        return int(self.keep.sum())


@dataclass(frozen=True, eq=False)
class Group:
    """A stretch of the corpus whose windows are batched together."""

    batches: list[list[Piece]]
    """Batches in the order in which the model reads them; a padded one holds at most `batch_tokens`."""
    records: list[dict[str, Any]]
    """One record for each document read since the last group: id, tokens, captured."""
    digest: str
    """SHA-256 of everything tokenised up to here: ids, token ids and masks."""


@dataclass
class Plan:
    """Iterate over it once; then `digest`, `corpus` and the counts describe what was read."""

    tokenizer: Any
    documents: Iterable[Document]
    context: int
    batch_tokens: int
    positions: Positions
    tokens: int | None
    per_document: int | None = None
    seed: int = 0
    planned: int = 0
    """Tokens to capture so far; never more than `tokens`, to the token, counted in the corpus' order."""
    read: int = 0
    """Documents read so far, those that an earlier capture had read among them."""
    before: str = ""
    """Digest of what an earlier capture had tokenised, if this one goes on from it."""
    begun: dict[str, Any] | None = None
    """The earlier record of the first document, of which the rest is wanted."""
    _corpus: Any = field(default_factory=hashlib.sha256)
    _digest: Any = field(default_factory=hashlib.sha256)

    def __post_init__(self) -> None:
        self._digest.update(self.before.encode())

    @property
    def corpus(self) -> str:
        """SHA-256 of the ids of the documents read, one a line."""
        return self._corpus.hexdigest()

    @property
    def digest(self) -> str:
        """SHA-256 of everything tokenised."""
        return self._digest.hexdigest()

    def __iter__(self) -> Iterator[Group]:
        """Groups in the corpus' order; memory is bounded by one group and one document."""
        waiting: list[Piece] = []
        records: list[dict[str, Any]] = []
        size = 0
        for document in self.documents:
            pieces, record = self._pieces(document)
            records.append(record)
            for piece in pieces:
                waiting.append(piece)
                size += len(piece.window.input_ids)
                if size >= LOOK_AHEAD * self.batch_tokens:
                    yield Group(batched(waiting, self.batch_tokens), records, self.digest)
                    waiting, records, size = [], [], 0
            if len(records) >= MOST_DOCUMENTS:
                yield Group(batched(waiting, self.batch_tokens), records, self.digest)
                waiting, records, size = [], [], 0
            if self.tokens is not None and self.planned >= self.tokens:
                break
        if records or waiting:
            yield Group(batched(waiting, self.batch_tokens), records, self.digest)

    def count(self, id: str) -> None:
        """Count a document as read."""
        self._corpus.update(f"{json.dumps(id)}\n".encode())
        self.read += 1

    def measure(self, document: Document) -> tuple[int, int]:
        """A document's tokens, and how many of them are wanted without a budget."""
        cut = windows(self.tokenizer, document, self.context)
        return _length(cut), sum(int(keep.sum()) for keep in self._wanted(document, cut))

    def _pieces(self, document: Document) -> tuple[list[Piece], dict[str, Any]]:
        cut = windows(self.tokenizer, document, self.context)
        pieces: list[Piece] = []
        record = {**(self.begun or {"id": document.id, "captured": 0}), "tokens": _length(cut)}
        taken = record["captured"] + record.get("skipped", 0)
        self.begun = None
        for window, keep in zip(cut, self._wanted(document, cut), strict=True):
            wanted = int(keep.sum())
            keep &= np.cumsum(keep) > taken
            taken = max(taken - wanted, 0)
            if self.tokens is not None:
                # The budget ends inside a document, not at its end: the rest of it is not captured.
                keep &= np.cumsum(keep) <= self.tokens - self.planned
            self._digest.update(f"{document.id}\n".encode())
            self._digest.update(np.asarray(window.input_ids, dtype="<i8").tobytes())
            self._digest.update(keep.tobytes())
            piece = Piece(window, self.read, keep)
            if piece.rows:
                pieces.append(piece)
                record["captured"] += piece.rows
                self.planned += piece.rows
        self.count(document.id)
        return pieces, record

    def _wanted(self, document: Document, cut: list[TokenisedDocument]) -> list[NDArray[np.bool_]]:
        """Masks (T,) of each window's tokens at the wanted positions, at most `per_document` in all.

        Of more tokens a uniform sample is drawn, not the first: those are titles and openings, and a model
        treats the beginning of a text unlike the rest. The sample depends on the seed and the document.
        """
        wanted = [window.captured(self.positions) for window in cut]
        total = sum(int(keep.sum()) for keep in wanted)
        if self.per_document is None or total <= self.per_document:
            return wanted
        drawn = draw(self.seed, document.id).choice(total, self.per_document, replace=False)
        places = np.flatnonzero(np.concatenate(wanted))
        sampled = np.zeros(sum(map(len, wanted)), dtype=np.bool_)
        sampled[places[drawn]] = True
        return np.split(sampled, np.cumsum([len(keep) for keep in wanted])[:-1])


def _length(cut: list[TokenisedDocument]) -> int:
    """Tokens of a whole document, of its windows."""
    return cut[-1].positions[-1] + 1 if cut else 0


def batched(pieces: list[Piece], batch_tokens: int) -> list[list[Piece]]:
    """Batches of like length, shortest first; each padded batch has at most `batch_tokens`, or one window."""
    batches: list[list[Piece]] = []
    tokens = 0  # in the last batch, without padding
    for piece in sorted(pieces, key=lambda p: len(p.window.input_ids)):
        # Sorted by length, so the newcomer is the longest and sets the padded width.
        length = len(piece.window.input_ids)
        padded = length * (len(batches[-1]) + 1) if batches else 0
        loose = tokens >= FULL_ENOUGH * batch_tokens and tokens + length < (1 - MOST_PADDING) * padded
        if batches and padded <= batch_tokens and not loose:
            batches[-1].append(piece)
            tokens += length
        else:
            batches.append([piece])
            tokens = length
    return batches
