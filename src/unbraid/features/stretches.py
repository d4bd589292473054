"""From documents to sparse codes: parts of the corpus, cut into stretches of text that are coded at a time.

A part is a run of whole documents, cut by their number of characters, so where parts begin needs no
tokenizer.  Stretches and batches stay within a part: a part's codes depend on its documents and the settings
alone, whoever computes them and whatever was computed before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from unbraid.activations.documents import Document
from unbraid.activations.plan import Piece, batched
from unbraid.activations.text import Positions
from unbraid.activations.text import windows as windows_of
from unbraid.features import hashes, loops
from unbraid.features.hashes import F32, I32, I64, U64
from unbraid.features.loops import Rows
from unbraid.features.state import row_keys
from unbraid.features.tables import PLACES
from unbraid.manifest.errors import UserError
from unbraid.model.load import LanguageModel
from unbraid.model.read import read_sites
from unbraid.model.sites import Site
from unbraid.sae.base import SAE

STRETCH = 8
"""Batches' worth of tokens whose codes are in memory at a time, and whose windows are sorted by length."""


@dataclass(frozen=True)
class Reading:
    """How a corpus is read."""

    positions: Positions
    context: int
    batch_tokens: int
    same_context: int
    seed: int


@dataclass(frozen=True)
class Part:
    """A run of documents."""

    number: int
    """Its place in the corpus."""
    first: int
    """Number of its first document."""
    documents: tuple[Document, ...]


@dataclass(frozen=True, eq=False)
class Stretch:
    """Some windows of a part, in reading order, and the codes of their counted tokens."""

    pieces: tuple[Piece, ...]
    """The windows with the tokens that count."""
    passage: int
    """Number of the first window."""
    starts: I64
    """Where the codes of each counted token begin (n + 1,)."""
    latents: I32
    values: F32
    rows: Rows
    """What these tokens are."""


def parts_of(
    documents: Iterable[Document], characters: int, number: int = 0, first: int = 0
) -> Iterator[Part]:
    """Runs of documents; each ends with the one that brings it to so many characters."""
    held: list[Document] = []
    size = 0
    for document in documents:
        held.append(document)
        size += len(document.text or "") + sum(len(m["content"]) for m in document.messages or ())
        if size >= characters:
            yield Part(number, first, tuple(held))
            number, first, held, size = number + 1, first + len(held), [], 0
    if held:
        yield Part(number, first, tuple(held))


class Classes:
    """What tokens have in common: a number for each, the same for those that differ by case, spaces, digits.

    Contexts of equal classes are the same context.
    """

    def __init__(self, piece: Callable[[int], str]) -> None:
        self._piece = piece
        self._known: U64 = np.zeros(0, np.uint64)
        self._asked = np.zeros(0, bool)

    def __call__(self, tokens: I64 | I32) -> U64:
        """The class of each token."""
        room = int(tokens.max(initial=-1)) + 1
        if room > len(self._known):
            self._known = np.concatenate([self._known, np.zeros(room - len(self._known), np.uint64)])
            self._asked = np.concatenate([self._asked, np.zeros(room - len(self._asked), bool)])
        for token in np.unique(tokens[~self._asked[tokens]]).tolist():
            self._known[token] = class_of(self._piece(token))
            self._asked[token] = True
        return self._known[tokens]


def class_of(text: str) -> int:
    """The class of a token with this text; 0 and 1 are nobody's."""
    plain = "".join("0" if c.isdigit() else c for c in text.strip().casefold())
    # Half a character's bytes decode to the replacement sign, and say nothing about what they are.
    return int.from_bytes(hashlib.sha256((plain or text).encode()).digest()[:8], "little") | 2


class Reader:
    """Turns documents into codes."""

    def __init__(self, lm: LanguageModel, sae: SAE, site: Site, reading: Reading, classes: Classes) -> None:
        self.lm, self.sae, self.site, self.reading, self.classes = lm, sae, site, reading, classes

    def pieces(self, part: Part, budget: int | None) -> Iterator[Piece]:
        """The part's windows, up to and with the one in which `budget` counted tokens are reached."""
        counted = 0
        for number, document in enumerate(part.documents, start=part.first):
            for window in windows_of(self.lm, document, self.reading.context):
                piece = Piece(window, number, window.captured(self.reading.positions))
                yield piece
                counted += piece.rows
                if budget is not None and counted >= budget:
                    return

    def extent(self, part: Part, budget: int | None) -> tuple[int, int]:
        """How many tokens of a part are counted, and how many of its documents are read for them."""
        if budget is None:
            return 0, len(part.documents)  # nobody asks how many
        counted, last = 0, part.first - 1
        for piece in self.pieces(part, budget):
            counted, last = counted + piece.rows, piece.document
        return counted, len(part.documents) if counted < budget else last - part.first + 1

    def stretches(
        self, part: Part, budget: int | None, stratum: Callable[[Document], int]
    ) -> Iterator[Stretch]:
        """The part's windows and codes."""
        waiting: list[Piece] = []
        passage, size = part.number << PLACES, 0
        for piece in self.pieces(part, budget):
            waiting.append(piece)
            size += len(piece.window.input_ids)
            if size >= STRETCH * self.reading.batch_tokens:
                yield self._stretch(part, waiting, passage, stratum)
                passage, waiting, size = passage + len(waiting), [], 0
        if waiting:
            yield self._stretch(part, waiting, passage, stratum)
            passage += len(waiting)
        if (passage - 1) >> PLACES > part.number:
            raise UserError(
                f"a part of the corpus has more than {1 << PLACES} windows; choose a longer --context"
            )

    def _stretch(
        self, part: Part, pieces: list[Piece], passage: int, stratum: Callable[[Document], int]
    ) -> Stretch:
        lengths = np.array([len(piece.window.input_ids) for piece in pieces])
        ends = np.cumsum(lengths)
        tokens = np.concatenate([np.array(piece.window.input_ids, np.int64) for piece in pieces])
        context = np.empty(len(tokens), np.uint64)
        hashes.contexts_of(self.classes(tokens), ends - lengths, ends, self.reading.same_context, context)
        keep = np.concatenate([piece.keep for piece in pieces])
        window = np.repeat(np.arange(len(pieces)), lengths)[keep]
        document = np.array([piece.document for piece in pieces], np.int64)
        place = np.concatenate([np.array(piece.window.positions, np.int64) for piece in pieces])[keep]
        strata = np.array([stratum(part.documents[p.document - part.first]) for p in pieces], np.int32)
        first = np.ones(len(window), bool)
        first[1:] = window[1:] != window[:-1]
        rows: Rows = np.empty(len(window), loops.ROW)
        rows["passage"], rows["document"] = passage + window, document[window]
        rows["position"] = (np.arange(len(tokens)) - np.repeat(ends - lengths, lengths))[keep]
        rows["token"], rows["context"] = tokens[keep], context[keep]
        rows["stratum"], rows["first"] = strata[window], first
        rows["key"] = row_keys(self.reading.seed, document[window], place)
        return Stretch(tuple(pieces), passage, *self._codes(pieces), rows)

    @torch.no_grad()
    def _codes(self, pieces: list[Piece]) -> tuple[I64, I32, F32]:
        """Codes of the counted tokens, in reading order, whatever the batches' order."""
        begins = np.concatenate([[0], np.cumsum([piece.rows for piece in pieces])])
        at = {id(piece): int(begin) for piece, begin in zip(pieces, begins[:-1], strict=True)}
        found: list[tuple[I64, I64, I32, F32]] = []
        for batch in batched([piece for piece in pieces if piece.rows], self.reading.batch_tokens):
            # Padding goes to the right, behind a causal model's back; the mask keeps it out of the rows too.
            ids = torch.zeros((len(batch), max(len(p.window.input_ids) for p in batch)), dtype=torch.long)
            mask, keep = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
            for i, piece in enumerate(batch):
                n = len(piece.window.input_ids)
                ids[i, :n], mask[i, :n] = torch.tensor(piece.window.input_ids), 1
                keep[i, :n] = torch.from_numpy(piece.keep)
            device = self.lm.device
            x = read_sites(self.lm, ids.to(device), mask.to(device), [self.site])[self.site]
            codes = self.sae.encode(x[keep.to(x.device)].float())
            indices, values = codes.indices.cpu().numpy(), codes.values.float().cpu().numpy()
            fires = values > 0
            row = np.concatenate([np.arange(at[id(p)], at[id(p)] + p.rows) for p in batch])
            found.append((row, fires.sum(axis=1), indices[fires].astype(np.int32), values[fires]))
        sizes = np.zeros(int(begins[-1]), np.int64)
        for row, size, _, _ in found:
            sizes[row] = size
        starts = np.concatenate([[0], np.cumsum(sizes)])
        latents, values = np.empty(starts[-1], np.int32), np.empty(starts[-1], np.float32)
        for row, size, some, their in found:
            inside = np.arange(len(some)) - np.repeat(np.cumsum(size) - size, size)
            to = np.repeat(starts[row], size) + inside
            latents[to], values[to] = some, their
        return starts, latents, values
