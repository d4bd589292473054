"""Search by meaning: what is said of each latent as a vector, compared with that of a question.

The vectors lie in a SQLite file beside the index folder, one for each embedding model.  Making them takes
the model's time for each latent, once; afterwards only latents whose label has changed are read anew.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from unbraid.features.embedding import Embedder
from unbraid.features.labels.store import Labels
from unbraid.features.page import Index
from unbraid.features.search_text import Texts
from unbraid.manifest.errors import UserError
from unbraid.manifest.progress import Progress

BATCH = 1024
"""Descriptions that are embedded before they are written down."""
BLOCK = 65_536
"""Vectors that are compared with a question at a time."""
LONGEST = 400
"""Characters of an unlabelled latent's description."""


class _Said(NamedTuple):
    """What is said of a latent, and whether a label says it."""

    latent: int
    text: str
    labelled: bool

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(self.text.encode()).digest()[:16]


class Meanings:
    """Vectors of an index's latents under one embedding model."""

    def __init__(self, index: Index, embedder: Embedder, labels: Labels | None = None) -> None:
        self.index, self.embedder, self.labels = index, embedder, labels
        folder = index.folder.resolve()
        self.path = folder.parent / f"{folder.name}.meaning-{embedder.id[:12]}.sqlite"  # one for each model
        self._revision = -1
        self._latents = np.empty(0, dtype=np.int64)
        self._vectors = np.empty((0, 0), dtype=np.float16)

    def search(
        self, query: str, limit: int = 20, progress: Progress | None = None
    ) -> list[tuple[int, float, str]]:
        """(latent, cosine, description) of the latents whose description is nearest in meaning."""
        self._refresh(progress)
        if not len(self._latents) or limit < 1 or not query.strip():
            return []
        wanted = self.embedder.encode([query])[0]
        cosines = np.concatenate(
            [
                self._vectors[i : i + BLOCK].astype(np.float32) @ wanted
                for i in range(0, len(self._latents), BLOCK)
            ]
        )
        best = np.argsort(-cosines, kind="stable")[:limit]
        with closing(self._connect()) as connection:
            return [
                (latent, float(cosines[i]), self._said(connection, latent))
                for i, latent in zip(best.tolist(), self._latents[best].tolist(), strict=True)
            ]

    @staticmethod
    def _said(connection: sqlite3.Connection, latent: int) -> str:
        ((text,),) = connection.execute("SELECT text FROM vectors WHERE latent = ?", [latent])
        return text

    def _refresh(self, progress: Progress | None) -> None:
        """Embed what is new: every latent the first time, later those whose label has changed."""
        revision = 0 if self.labels is None else self.labels.revision()
        if revision == self._revision:
            return
        try:
            with closing(self._connect()) as connection:
                known: dict[int, tuple[bytes, int]] = {
                    j: (digest, labelled)
                    for j, digest, labelled in connection.execute(
                        "SELECT latent, hash, labelled FROM vectors"
                    )
                }
                batch: list[_Said] = []
                for said in self._descriptions({j: bool(labelled) for j, (_, labelled) in known.items()}):
                    if known.get(said.latent, (b"", 0))[0] != said.digest:
                        batch.append(said)
                    if len(batch) == BATCH:
                        self._write(connection, batch)
                        batch = []
                        if progress is not None:
                            progress(said.latent + 1, self.index.d_sae, "latents")
                self._write(connection, batch)
                self._read(connection)
        except sqlite3.OperationalError as error:
            raise UserError(
                f"{self.path} could not be written ({error}); make its folder writable"
            ) from error
        self._revision = revision

    def _descriptions(self, known: dict[int, bool]) -> Iterator[_Said]:
        """What is said of latents: the label, else the words it fires on and its strongest example.

        `known` tells which were described before, and whether by a label; what cannot have changed is left
        out.
        """
        current = {} if self.labels is None else self.labels.current()
        for latent, label in current.items():
            yield _Said(latent, label.text, True)
        wanted = {j for j in range(self.index.d_sae) if j not in current and known.get(j, True)}
        if not wanted:
            return
        for latent, mostly, fires, *_, promoted, examples in Texts(self.index):
            if latent in wanted:
                parts = [mostly or fires, promoted if not examples else examples.split("\ue000")[0]]
                text = ": ".join(" ".join(part.replace("\ue000", ",").split()) for part in parts if part)
                yield _Said(latent, text[:LONGEST], False)

    def _write(self, connection: sqlite3.Connection, batch: Sequence[_Said]) -> None:
        if not batch:
            return
        vectors = self.embedder.encode([said.text for said in batch]).astype("<f2")
        rows = [
            (said.latent, said.text, said.labelled, said.digest, v.tobytes())
            for said, v in zip(batch, vectors, strict=True)
        ]
        with connection:  # one transaction, so that a stop loses no more than a batch
            connection.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?, ?, ?, ?)", rows)

    def _read(self, connection: sqlite3.Connection) -> None:
        rows = connection.execute(
            "SELECT latent, vector FROM vectors WHERE text <> '' ORDER BY latent"
        ).fetchall()
        self._latents = np.array([latent for latent, _ in rows], dtype=np.int64)
        flat: NDArray[np.float16] = np.frombuffer(b"".join(vector for _, vector in rows), dtype="<f2")
        self._vectors = flat.reshape(len(rows), -1) if rows else np.empty((0, 0), dtype=np.float16)

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=30)
        # Vectors of another index that lay here before would be of other latents.
        connection.executescript(
            "CREATE TABLE IF NOT EXISTS origin (id TEXT);"
            "CREATE TABLE IF NOT EXISTS vectors"
            " (latent INTEGER PRIMARY KEY, text TEXT, labelled INTEGER, hash BLOB, vector BLOB);"
        )
        if connection.execute("SELECT id FROM origin").fetchall() != [(self.index.manifest.id,)]:
            with connection:
                connection.execute("DELETE FROM vectors")
                connection.execute("DELETE FROM origin")
                connection.execute("INSERT INTO origin VALUES (?)", [self.index.manifest.id])
        return connection
