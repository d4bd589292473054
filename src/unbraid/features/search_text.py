"""Full text over what an index says of its latents: one SQLite file beside the index folder (FTS5).

What a word says of a latent depends on where it stands: the latent fires on it, most of the time or at
times, or promotes it, or it merely stands around.  So a match is ranked by its place first, and by how often
the latent fires next; nothing has to be scored that will not be shown.  Most of the text are examples: those
of the latents that fire most often are in a table of their own, and where that has enough nothing else is
looked at.  The file is no part of the artifact: it can be thrown away, and is made again when next needed.
"""

from __future__ import annotations

import re
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from unbraid.features.page import Index
from unbraid.features.tables import PLACES, Table
from unbraid.manifest.errors import UserError
from unbraid.manifest.files import writing
from unbraid.manifest.progress import Progress

SCHEMA = 3
EXAMPLES = 5
"""Strongest examples of a latent whose text can be searched."""
REACH = 10
"""Tokens on either side of a firing whose text can be searched."""
OFTEN = 1 / 32
"""Share of all stored examples that have to be of one token, and two at least, for its word to be one that
the latent fires on at times. The strongest firings are of a few words, also where it fires on many."""
MOSTLY = 3
"""Of these examples, so many have to fire on the same word for a latent to fire mostly on it."""
CANDIDATES = 20_000
"""Latents that are compared in each place a word may stand in; of more, those with the lowest numbers."""
COMMON = 1 / 8
"""Words that stand in the examples of more than this share of latents are not asked for beside rarer ones."""
COMMON_FROM = 10_000
"""Where fewer latents have it, no word is common: there is no time to be saved."""
TABLES = (1 / 32, 1 / 8, 1 / 2, 1.0)
"""Examples of so many of the latents, those that fire most often, are in the first table, the first two …"""
TOKENIZER = "unicode61 remove_diacritics 2"
"""Of FTS5: words are runs of letters and digits, and café is cafe."""
MOST_TERMS = 32
"""Words and phrases of a query that are looked for."""
# Scripts that put no spaces between words: each character is indexed as a word of its own.
_UNSPACED = re.compile(
    r"([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])"
)
_PHRASE = re.compile(r"\w\W+\w")
_TERM = re.compile(r'"([^"]*)"?|(\S+)')
_WORD = re.compile(r"\w")
_INSIDE, _NEXT = re.compile(r"\w*"), re.compile(r"\W*\w+")


@dataclass(frozen=True)
class Match:
    """A latent whose text holds what was looked for."""

    latent: int
    """Number of the latent."""
    place: int
    """Where: 4 mostly fires on it, 3 fires on it or within it, 2 promotes it, 1 it stands in its examples."""
    why: str
    """The same in words."""


_AROUND = tuple(f"around{number}" for number in range(len(TABLES)))
# Tables and column of each place, best first.
_PLACES = (
    (4, ("said",), "mostly", "fires mostly on it"),
    (3, ("said",), "fires", "fires on it"),
    (3, ("said",), "times", "fires on it at times"),
    (3, ("said",), "within", "fires within it"),
    (2, ("said",), "promoted", "promotes it"),
    (1, _AROUND, "examples", "stands in its examples"),
)


def text_path(index: Index) -> Path:
    """Where the full-text file of an index lies: beside its folder."""
    folder = index.folder.resolve()
    return folder.parent / f"{folder.name}.text.sqlite"


def terms(query: str) -> list[str]:
    """The words and phrases that a person typed, each as FTS5 takes it: "several words", "word", "begin"*.

    Everything goes in as a quoted string, so no word is an operator and there is nothing that FTS5 could
    refuse.  What holds no letter or digit is left out.
    """
    found: list[str] = []
    for phrase, word in _TERM.findall(plain(query)):
        term = spaced(phrase or word).replace('"', " ").strip()
        if _WORD.search(term.replace("_", " ")):
            found.append(f'"{term}"' + ("*" if word.endswith("*") else ""))
    return found[:MOST_TERMS]


def spaced(text: str) -> str:
    """Text with spaces around each character of a script that writes none."""
    return _UNSPACED.sub(r" \1 ", text)


def plain(text: str) -> str:
    """Text as SQLite can hold it."""
    # SQLite's strings end at NUL, and lone surrogates are no UTF-8.
    return text.replace("\0", " ").encode("utf-8", "replace").decode("utf-8")


class TextIndex:
    """The full-text file of an index, open for reading from any thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._local = threading.local()
        # How often each latent fires, (d_sae,): what is ranked by within a place.
        ((counts, common),) = self._connection.execute("SELECT counts, common FROM origin")
        self._counts = np.frombuffer(counts, dtype=np.int64)
        self._common = frozenset(common.split("\n"))

    @classmethod
    def of(cls, index: Index, progress: Progress | None = None) -> TextIndex:
        """The index's file, made now if it is missing or was made for another index at the same place."""
        path = text_path(index)
        if not _is_of(path, index):
            build(index, path, progress)
        return cls(path)

    def search(self, query: str, limit: int = 20) -> list[Match]:
        """The best latents for a query, all of whose words stand in the same place; none without a word.

        Of CANDIDATES and more matches in one table, the first by number are compared.
        """
        wanted = terms(query)
        found: dict[int, Match] = {}
        for place, table, column, why in ((p, t, *rest) for p, tables, *rest in _PLACES for t in tables):
            if not wanted or len(found) >= limit:
                break
            if column == "within" and not all(_PHRASE.search(term) for term in wanted):
                continue
            if table in _AROUND:
                wanted = [term for term in wanted if term.casefold() not in self._common] or wanted
            expression = f"{{{column}}} : ({' AND '.join(wanted)})"
            rows = self._connection.execute(_MATCHING.format(table=table), (expression, CANDIDATES))
            latents = np.fromiter((latent for (latent,) in rows), dtype=np.int64)
            # One may have been found in a better place already.
            for latent in latents[np.argsort(-self._counts[latents], kind="stable")][
                : limit + len(found)
            ].tolist():
                found.setdefault(latent, Match(latent, place, why))
        return list(found.values())[: max(limit, 0)]

    @property
    def _connection(self) -> sqlite3.Connection:
        if not hasattr(self._local, "connection"):
            self._local.connection = sqlite3.connect(f"{self.path.as_uri()}?mode=ro", uri=True)
        return self._local.connection


_MATCHING = "SELECT rowid FROM {table} WHERE {table} MATCH ? LIMIT ?"


def build(index: Index, path: Path, progress: Progress | None = None) -> None:
    """Write the full-text file of an index.  Raises UserError where its folder cannot be written to."""
    try:
        with writing(path) as temporary:
            _fill(index, temporary, progress)
    except (OSError, sqlite3.OperationalError) as error:
        raise UserError(
            f"the full-text file {path} could not be written ({error}); make its folder writable"
        ) from error


def _fill(index: Index, path: Path, progress: Progress | None) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(_TABLES)
        counts = pq.read_table(index.folder / "latents.parquet", columns=["count"])["count"].to_numpy()
        rank = np.empty(len(counts), np.int64)
        rank[np.argsort(-counts, kind="stable")] = np.arange(len(counts))
        table = np.searchsorted(len(counts) * np.array(TABLES), rank, side="right")
        for latent, *said, examples in Texts(index):
            if any(said):
                connection.execute(_SAID, (latent, *said))
            if examples:
                connection.execute(_EXAMPLES.format(table=_AROUND[table[latent]]), (latent, examples))
            if progress is not None and latent % 1024 == 0:
                progress(latent + 1, index.d_sae, "latents")
        for name in ("said", *_AROUND):
            connection.execute(f"INSERT INTO {name} ({name}) VALUES ('optimize')")
        for name in _AROUND:
            connection.execute(
                f"CREATE VIRTUAL TABLE temp.of_{name} USING fts5vocab('main', '{name}', 'row')"
            )
        common = connection.execute(_COMMON, (max(COMMON * index.d_sae, COMMON_FROM),)).fetchall()
        connection.execute(
            "INSERT INTO origin VALUES (?, ?, ?, ?)",
            (
                index.manifest.id,
                SCHEMA,
                "\n".join(f'"{term}"' for (term,) in common),
                counts.astype(np.int64).tobytes(),
            ),
        )
        connection.commit()


_TABLES = f"""
-- Nobody else sees the file before it is renamed, so there is nothing to roll back to.
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
PRAGMA cache_size = -64000;
CREATE TABLE origin (id TEXT, schema INTEGER, common TEXT, counts BLOB);
CREATE VIRTUAL TABLE said USING fts5(
    mostly, fires, times, within, promoted, content='', columnsize=0, tokenize='{TOKENIZER}');
""" + "".join(
    f"CREATE VIRTUAL TABLE {name} USING fts5(examples, content='', columnsize=0, tokenize='{TOKENIZER}');\n"
    for name in _AROUND
)
_SAID = "INSERT INTO said (rowid, mostly, fires, times, within, promoted) VALUES (?, ?, ?, ?, ?, ?)"
_EXAMPLES = "INSERT INTO {table} (rowid, examples) VALUES (?, ?)"
_COMMON = (
    f"SELECT term FROM ({' UNION ALL '.join(f'SELECT term, doc FROM temp.of_{name}' for name in _AROUND)})"
    " GROUP BY term HAVING SUM(doc) > ?"
)


def _is_of(path: Path, index: Index) -> bool:
    if not path.is_file():
        return False
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
            return connection.execute("SELECT id, schema FROM origin").fetchall() == [
                (index.manifest.id, SCHEMA)
            ]
    except sqlite3.DatabaseError:
        return False


# A token of its own, which no text holds, so that no phrase reaches from one example into the next.
_BREAK = " \ue000 "


class Texts:
    """The text of latents, a block of them at a time."""

    def __init__(self, index: Index) -> None:
        self._examples, self._weights = Table(index.folder, "examples"), Table(index.folder, "weights")
        self._passages = index.passages
        self._parts: dict[int, tuple[NDArray[np.int32], NDArray[np.int32]]] = {}
        vocabulary = pq.read_table(index.folder / "vocabulary.parquet", columns=["token", "text"])
        tokens = vocabulary["token"].to_numpy()
        self._words = vocabulary["text"].combine_chunks()
        self._place = np.zeros(int(tokens.max(initial=0)) + 1, dtype=np.int64)
        self._place[tokens] = np.arange(len(tokens))

    def __iter__(self) -> Iterator[tuple[int, str, str, str, str, str, str]]:
        """Latent, words it fires mostly on, or fires on, or at times, all these with the words beside them,
        tokens it promotes, its examples' text."""
        for number in range(self._weights.groups):
            weights = self._weights.group(number, ["latent", "promoted"])
            fires: dict[int, Counter[str]] = {}
            times: dict[int, set[str]] = {}
            within: dict[int, set[str]] = {}
            around: dict[int, list[str]] = {}
            examples = self._examples_of(number)
            for latent, before, peak, after in self._around(*_strongest(examples)):
                word, stretch = word_at(before, peak, after)
                fires.setdefault(latent, Counter())[word] += 1
                within.setdefault(latent, set()).add(stretch)
                around.setdefault(latent, []).append(before + peak + after)
            for latent, before, peak, after in self._around(*self._frequent(examples)):
                word, stretch = word_at(before, peak, after)
                times.setdefault(latent, set()).add(word)
                within.setdefault(latent, set()).add(stretch)
            for latent, promoted in zip(
                *(weights[c].to_pylist() for c in ("latent", "promoted")), strict=True
            ):
                often = fires.get(latent, Counter[str]())
                rest = times.get(latent, set[str]()) - often.keys()
                yield (
                    latent,
                    _column(word for word, times in often.items() if times >= MOSTLY),
                    _column(word for word, times in often.items() if times < MOSTLY),
                    _column(sorted(rest)),
                    _column(sorted(within.get(latent, ()))),
                    _column(promoted),
                    _column(around.get(latent, ())),
                )

    def _examples_of(self, number: int) -> Any:
        """The examples of the latents in a row group of weights."""
        per = self._weights.per_group // self._examples.per_group
        groups = range(number * per, min((number + 1) * per, self._examples.groups))
        columns = ["latent", "kind", "rank", "passage", "position"]
        return pa.concat_tables([self._examples.group(g, columns) for g in groups])

    def _frequent(self, examples: Any) -> Places:
        """One example for each token on which OFTEN, or more, of a latent's examples are."""
        latent, passage, position = (examples[c].to_numpy() for c in ("latent", "passage", "position"))
        peak = self._tokens(passage, position, 0)[:, 0]
        pairs = latent.astype(np.int64) << 32 | peak
        _, first, counts = np.unique(pairs, return_index=True, return_counts=True)
        of_all = np.bincount(latent, minlength=1)[latent[first]]
        chosen = first[counts >= np.maximum(OFTEN * of_all, 2)]
        return latent[chosen], passage[chosen], position[chosen]

    def _around(
        self, latent: NDArray[np.int32], passage: NDArray[np.int64], position: NDArray[np.int32]
    ) -> Iterator[tuple[int, str, str, str]]:
        """Latent and the text before, at and after each of its firings, (n,)."""
        tokens = self._tokens(passage, position, REACH)
        parts = (tokens[:, :REACH], tokens[:, REACH : REACH + 1], tokens[:, REACH + 1 :])
        yield from zip(latent.tolist(), *map(self._joined, parts), strict=True)

    def _tokens(
        self, passage: NDArray[np.int64], position: NDArray[np.int32], reach: int
    ) -> NDArray[np.int64]:
        """Token ids around each position (n,) of a passage (n,): (n, 2·reach + 1), −1 beyond its ends."""
        found = np.full((len(passage), 2 * reach + 1), -1, dtype=np.int64)
        for part in np.unique(passage >> PLACES).tolist():
            mine = np.flatnonzero(passage >> PLACES == part)
            row = passage[mine] & ((1 << PLACES) - 1)
            offsets, flat = self._flat(part)
            at = (offsets[row] + position[mine])[:, None] + np.arange(-reach, reach + 1)
            inside = (at >= offsets[row][:, None]) & (at < offsets[row + 1][:, None])
            found[mine] = np.where(inside, flat[np.where(inside, at, 0)], -1)
        return found

    def _flat(self, part: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """A part's tokens one after the other, and where each passage begins; in place if it is one batch."""
        if part not in self._parts:
            tokens = self._passages.part(part)["tokens"].combine_chunks()
            self._parts[part] = tokens.offsets.to_numpy(), tokens.values.to_numpy()
        return self._parts[part]

    def _joined(self, tokens: NDArray[np.int64]) -> list[str]:
        """Each row of token ids (n, w), −1 for none, as text."""
        inside = tokens >= 0
        ends = np.concatenate([[0], np.cumsum(inside.sum(axis=1))]).astype(np.int32)
        words = self._words.take(pa.array(self._place[tokens[inside]]))
        lists = pa.ListArray.from_arrays(pa.array(ends), words)
        return cast(Any, pc).binary_join(lists, "").to_pylist()


Places = tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int32]]
"""Latents (n,), and the passage (n,) and position (n,) of a firing of each."""


def _strongest(examples: Any) -> Places:
    """The strongest firings of each latent."""
    rank = examples["rank"].to_numpy()
    chosen = (examples["kind"].to_numpy() == "top") & (rank >= 0) & (rank < EXAMPLES)
    latent, passage, position = (examples[c].to_numpy()[chosen] for c in ("latent", "passage", "position"))
    return latent, passage, position


def _column(texts: Iterable[str]) -> str:
    return spaced(plain(_BREAK.join(texts)))


def word_at(before: str, peak: str, after: str) -> tuple[str, str]:
    """The whole word, or words, that a token belongs to, given the text on either side of it; and the same
    with the next word on either side."""
    # Backwards: a pattern that has to end where the text does is tried from each of its characters.
    back = before[::-1]
    start = _INSIDE.match(back) if _WORD.match(peak) else None
    end = _INSIDE.match(after) if peak and _WORD.match(peak[-1]) else None
    left = _NEXT.match(back, start.end() if start else 0)
    right = _NEXT.match(after, end.end() if end else 0)
    word = (start[0][::-1] if start else "") + peak + (end[0] if end else "")
    stretch = (left[0][::-1] if left else "") + word + (right[0] if right else "")
    return " ".join(word.split()), " ".join(stretch.split())
