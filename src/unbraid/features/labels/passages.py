"""The passages of an index, read again: their tokens as text, and what a few latents do at each of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csc_array

from unbraid.features.page import Index
from unbraid.model.load import LanguageModel
from unbraid.model.read import read_sites
from unbraid.model.sites import Site
from unbraid.sae.base import SAE

BATCH_TOKENS = 4096
"""Tokens, padding included, that go through the model at once."""
LONGEST_PIECE = 80
"""Characters that are shown of one token."""


class Place(NamedTuple):
    """A firing that an index keeps as an example."""

    passage: int
    position: int
    kind: str


@dataclass(frozen=True, eq=False)
class Passage:
    """A passage of the index; T is its number of tokens."""

    document: str
    """Hash of what its document begins with; equal documents have equal ones."""
    tokens: tuple[int, ...]
    """Token numbers (T,)."""
    pieces: tuple[str, ...]
    """The tokens as text (T,); special ones are empty."""
    codes: Any
    """What the wanted latents do, sparse by column (T, m); 0 at special tokens."""

    def column(self, which: int) -> NDArray[np.float32]:
        """What one of them does (T,)."""
        out, (begin, end) = np.zeros(len(self.tokens), np.float32), self.codes.indptr[which : which + 2]
        out[self.codes.indices[begin:end]] = self.codes.data[begin:end]
        return out


class Passages:
    """Reads passages of an index through the model and the autoencoder."""

    def __init__(self, index: Index, sae: SAE, lm: LanguageModel, site: Site) -> None:
        self._index, self._sae, self._lm, self._site = index, sae, lm, site
        tokenizer = lm.tokenizer
        special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        self._special = frozenset(token for token in special if token is not None)
        self._pieces: dict[int, str] = {}

    def examples(self, latents: Sequence[int]) -> dict[int, list[Place]]:
        """Where the index keeps examples of each latent, the strongest first."""
        found: dict[int, list[Place]] = {}
        for start in range(0, len(latents), 500):
            some = list(latents[start : start + 500])
            marks = ",".join("?" * len(some))
            rows = self._index.query(
                f"SELECT latent, kind, passage, position FROM examples WHERE latent IN ({marks})"
                " ORDER BY latent, value DESC, passage, position",
                some,
            )
            for row in rows:
                place = Place(row["passage"], row["position"], row["kind"])
                found.setdefault(row["latent"], []).append(place)
        return found

    def drawn(self, count: int, seed: int) -> list[int]:
        """Numbers of up to `count` passages, drawn from all."""
        total = int(self._index.query("SELECT count(*) AS n FROM passages")[0]["n"])
        places = np.sort(np.random.default_rng(seed).permutation(total)[:count]).tolist()
        rows = self._index.query(
            "SELECT passage FROM (SELECT passage, row_number() OVER (ORDER BY passage) - 1 AS place"
            f" FROM passages) WHERE place IN ({','.join('?' * len(places))}) ORDER BY passage",
            places,
        )
        return [row["passage"] for row in rows]

    def read(self, passages: Sequence[int], latents: Sequence[int]) -> dict[int, Passage]:
        """Passages by number, with the codes of `latents` (m,) in their order."""
        rows = self._rows(passages)
        documents = self._documents({row["document"] for row in rows.values()})
        order = sorted(rows, key=lambda number: len(rows[number]["tokens"]))
        found: dict[int, Passage] = {}
        start = 0
        while start < len(order):
            stop = start + 1
            while stop < len(order) and len(rows[order[stop]]["tokens"]) * (stop + 1 - start) <= BATCH_TOKENS:
                stop += 1
            some = [tuple(rows[number]["tokens"]) for number in order[start:stop]]
            for number, tokens, codes in zip(
                order[start:stop], some, self._encode(some, latents), strict=True
            ):
                pieces = tuple(self.piece(token) for token in tokens)
                found[number] = Passage(documents[rows[number]["document"]], tokens, pieces, codes)
            start = stop
        return found

    def piece(self, token: int) -> str:
        """One token as text, cut where it is very long; empty for a special one."""
        if (known := self._pieces.get(token)) is None:
            known = "" if token in self._special else str(self._lm.tokenizer.decode([token]))
            # A SentencePiece decoder drops the blank before a word that stands alone.
            written = self._lm.tokenizer.convert_ids_to_tokens(token)
            if str(written).startswith("▁") and not known.startswith(" "):
                known = f" {known}"
            known = known if len(known) <= LONGEST_PIECE else known[: LONGEST_PIECE - 1] + "…"
            self._pieces[token] = known
        return known

    def _rows(self, passages: Sequence[int]) -> Mapping[int, dict[str, Any]]:
        rows: dict[int, dict[str, Any]] = {}
        for start in range(0, len(passages), 1000):
            some = list(passages[start : start + 1000])
            query = f"SELECT * FROM passages WHERE passage IN ({','.join('?' * len(some))})"
            rows |= {row["passage"]: row for row in self._index.query(query, some)}
        return rows

    def _documents(self, numbers: set[int]) -> dict[int, str]:
        """The hash of each document's first passage: the same text under two names is one document."""
        asked = sorted(numbers)
        found: dict[int, str] = {}
        for start in range(0, len(asked), 1000):
            some = asked[start : start + 1000]
            rows = self._index.query(
                "SELECT document, arg_min(tokens, passage) AS tokens FROM passages"
                f" WHERE document IN ({','.join('?' * len(some))}) GROUP BY document",
                some,
            )
            for row in rows:
                tokens = np.array(row["tokens"], dtype=np.int64).tobytes()
                found[row["document"]] = hashlib.sha256(tokens).hexdigest()
        return found

    def _encode(self, passages: Sequence[tuple[int, ...]], latents: Sequence[int]) -> list[Any]:
        """Codes (T, m) of each passage, sparse."""
        ids, mask = padded(passages)
        device = self._lm.device
        x = read_sites(self._lm, ids.to(device), mask.long().to(device), [self._site])[self._site]
        with torch.no_grad():
            codes = self._sae.encode(x[mask.to(x.device)].float())
        indices, values = codes.indices.cpu().numpy(), codes.values.float().cpu().numpy()
        special = np.isin(ids[mask].numpy(), list(self._special))
        order = np.argsort(np.asarray(latents))
        wanted = np.asarray(latents)[order]
        at = np.minimum(np.searchsorted(wanted, indices), len(wanted) - 1)
        keep = (wanted[at] == indices) & (values > 0) & ~special[:, None]
        row = np.broadcast_to(np.arange(len(values))[:, None], values.shape)
        shape = (len(values), len(wanted))
        dense = csc_array((values[keep], (row[keep], order[at[keep]])), shape=shape).tocsr()
        ends = np.cumsum([len(tokens) for tokens in passages])
        return [csc_array(dense[end - len(tokens) : end]) for end, tokens in zip(ends, passages, strict=True)]


def padded(sequences: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens padded on the right (B, T), and which of them are real (B, T)."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    ids = torch.zeros((len(sequences), int(lengths.max())), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
    return ids, torch.arange(ids.shape[1])[None, :] < lengths[:, None]
