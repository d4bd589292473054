"""Replies of a language model, kept by what was asked: what was paid for is on the disk before it is used."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from unbraid.manifest.errors import IntegrityError
from unbraid.manifest.identity import canonical_json, sha256_bytes

PATIENCE = 30.0
"""Seconds to wait for another process that is writing."""


class Reply(NamedTuple):
    """What a model answered, and what that took."""

    text: str
    """Its answer."""
    tokens_in: int
    """Tokens that were read, as the endpoint counts them; 0 where it does not say."""
    tokens_out: int
    """Tokens that were written."""


class Calls:
    """A file of replies.  Safe to use from several threads and processes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._open() as connection:
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS replies (asked TEXT PRIMARY KEY, model TEXT NOT NULL,"
                    " text TEXT NOT NULL, tokens_in INTEGER NOT NULL, tokens_out INTEGER NOT NULL)"
                )
        except sqlite3.DatabaseError as error:
            raise IntegrityError(f"{path} is no file of replies, or is damaged ({error})") from error

    def get(self, asked: str) -> Reply | None:
        """The reply to what has this hash."""
        with self._open() as connection:
            row = connection.execute(
                "SELECT text, tokens_in, tokens_out FROM replies WHERE asked = ?", [asked]
            ).fetchone()
        return Reply(*row) if row else None

    def keep(self, asked: str, model: str, reply: Reply) -> None:
        """Write a reply; it is on the disk when this returns."""
        with self._lock, self._open() as connection:
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?, ?)", [asked, model, *reply])

    def __len__(self) -> int:
        with self._open() as connection:
            return int(connection.execute("SELECT count(*) FROM replies").fetchone()[0])

    def _open(self) -> closing[sqlite3.Connection]:
        return closing(sqlite3.connect(self.path, timeout=PATIENCE, isolation_level=None))


def hash_of(request: Mapping[str, Any]) -> str:
    """The name under which the reply to a request is kept: a hash of everything that shapes the reply."""
    return sha256_bytes(canonical_json(request))
