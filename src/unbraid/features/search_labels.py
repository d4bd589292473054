"""Full text over labels as they stand now: kept in memory, brought up to date before each question."""

from __future__ import annotations

import sqlite3
import threading

from unbraid.features.labels.label import Label
from unbraid.features.labels.store import Labels
from unbraid.features.search_text import CANDIDATES, TOKENIZER, plain, spaced, terms

MOST_LOOKED_AT = 1_000
"""Labels with the wanted words, the shortest ones, of which it is asked whether they are current."""


class LabelText:
    """The words of all labels ever given; what was rejected or replaced is left out of the answers."""

    def __init__(self, labels: Labels) -> None:
        self.labels = labels
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(":memory:", check_same_thread=False)
        self._connection.execute(
            f"CREATE VIRTUAL TABLE words USING fts5(text, content='', columnsize=0, tokenize='{TOKENIZER}')"
        )
        self._connection.execute("CREATE TABLE lengths (row INTEGER PRIMARY KEY, latent, id, length)")
        self._seen = 0

    def search(self, query: str, limit: int) -> list[Label]:
        """The current labels that hold all words of a query, the shortest first."""
        wanted = terms(query)
        if not wanted or limit < 1:
            return []
        with self._lock:
            self._catch_up()
            rows = self._connection.execute(
                "SELECT l.latent, l.id FROM (SELECT rowid FROM words WHERE words MATCH ? LIMIT ?) w"
                " JOIN lengths l ON l.row = w.rowid ORDER BY l.length, l.latent, l.row LIMIT ?",
                (" AND ".join(wanted), CANDIDATES, MOST_LOOKED_AT),
            ).fetchall()
        current = self.labels.current({latent for latent, _ in rows})
        found = [current[latent] for latent, id in rows if latent in current and current[latent].id == id]
        return found[:limit]

    def _catch_up(self) -> None:
        # Rows of labels are only ever added.
        new = self.labels.ask(
            "SELECT rowid AS row, id, latent, text FROM labels WHERE rowid > ? ORDER BY rowid", [self._seen]
        )
        for row in new:
            text = spaced(plain(row["text"]))
            self._connection.execute("INSERT INTO words (rowid, text) VALUES (?, ?)", (row["row"], text))
            self._connection.execute(
                "INSERT INTO lengths VALUES (?, ?, ?, ?)", (row["row"], row["latent"], row["id"], len(text))
            )
            self._seen = row["row"]
