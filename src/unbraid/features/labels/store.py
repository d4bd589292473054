"""Where labels, reviews and lists are kept: one SQLite file beside an index, to which rows are only added.

What was said once stays: a label's status is the verdict of its latest review, its scores are the latest
ones, a latent is on a list when it was last put there.  So several processes may write at once, the history
is all there is, and two files merge by taking the rows of both.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unbraid.features.labels.label import (
    LONGEST_NAME,
    LONGEST_TEXT,
    LONGEST_WHY,
    Label,
    Review,
    checked_latent,
    checked_scores,
    checked_verdict,
    clean,
)
from unbraid.features.labels.rows import TABLES, Row, label_of
from unbraid.manifest.errors import IntegrityError, UserError
from unbraid.stats.agreement import Agreement, agreement

if TYPE_CHECKING:  # the store loads neither torch nor the index's tables
    from unbraid.features.page import Index

SCHEMA = 1
APPLICATION = 0x756E6272  # "unbr": says whose file this is
PATIENCE = 30.0
"""Seconds to wait for another process that is writing."""
AT_ONCE = 500
"""Latents asked for in one query."""

_TABLES = """
CREATE TABLE sae (id TEXT NOT NULL);
CREATE TABLE labels (id TEXT PRIMARY KEY, sae TEXT NOT NULL, latent INTEGER NOT NULL, text TEXT NOT NULL,
    by TEXT NOT NULL, kind TEXT NOT NULL, model TEXT, at TEXT NOT NULL);
CREATE TABLE scores (id TEXT PRIMARY KEY, label TEXT NOT NULL, scores TEXT NOT NULL, at TEXT NOT NULL);
CREATE TABLE reviews (id TEXT PRIMARY KEY, label TEXT NOT NULL, verdict TEXT NOT NULL, by TEXT NOT NULL,
    why TEXT NOT NULL, at TEXT NOT NULL);
CREATE TABLE kept (id TEXT PRIMARY KEY, sae TEXT NOT NULL, list TEXT NOT NULL, latent INTEGER NOT NULL,
    there INTEGER NOT NULL, at TEXT NOT NULL);
CREATE INDEX labels_of_latent ON labels (latent, at);
CREATE INDEX scores_of_label ON scores (label, at);
CREATE INDEX reviews_of_label ON reviews (label, at);
CREATE INDEX kept_in_list ON kept (list, latent, at);
"""


def labels_path(index: Index | Path | str) -> Path:
    """The file of labels that belongs to an index: it lies beside the folder, which never changes."""
    folder = Path(index if isinstance(index, Path | str) else index.folder).absolute()
    return folder.parent / f"{folder.name}.labels.sqlite"


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class Labels:
    """Labels, reviews and lists of one autoencoder.  Safe to use from several threads and processes.

    The file is made when first written to.  `sae` is the autoencoder's id; it may be left out where the file
    exists.  Raises UserError when the file belongs to another autoencoder, comes from a newer version or is
    no file of labels.
    """

    def __init__(self, path: Path | str, sae: str = "", *, clock: Callable[[], str] = _now) -> None:
        self.path = Path(path)
        self._clock = clock
        known = self._known() if self.path.is_file() else ""
        if known and sae and known != sae:
            raise UserError(
                f"{self.path} holds labels of autoencoder {known[:12]}…, not of {sae[:12]}…;"
                " name another file"
            )
        self.sae = known or sae
        """Id of the autoencoder."""

    @classmethod
    def of_index(cls, index: Index) -> Labels:
        """The labels that lie beside an index, bound to its autoencoder."""
        return cls(labels_path(index), index.manifest.inputs["sae"])

    # What is said about a latent.

    def propose(
        self,
        latent: int,
        text: str,
        *,
        by: str,
        kind: str,
        model: str | None = None,
        scores: Mapping[str, Any] | None = None,
    ) -> Label:
        """Add a label as a hypothesis; raises UserError where something about it cannot be kept."""
        label = self.draft(latent, text, by=by, kind=kind, model=model)
        rows = [Row.of_label(label)]
        if scores is not None:
            rows.append(Row.of_scores(label.id, checked_scores(scores), label.at))
        self.add(rows)
        return self.label(label.id)

    def draft(self, latent: int, text: str, *, by: str, kind: str, model: str | None = None) -> Label:
        """A label that is not added yet; raises UserError where something about it cannot be kept."""
        return Label(
            sae=self.sae,
            latent=checked_latent(latent),
            text=clean(text, "the label", LONGEST_TEXT),
            by=clean(by, "the name of who proposes", LONGEST_NAME),
            kind=clean(kind, "the kind of the label", LONGEST_NAME),
            model=None if model is None else clean(model, "the model's name", LONGEST_NAME),
            at=self._clock(),
        )

    def score(self, label: str, scores: Mapping[str, Any]) -> Label:
        """Set a label's scores; earlier ones stay in the history."""
        self.label(label)
        self.add([Row.of_scores(label, checked_scores(scores), self._clock())])
        return self.label(label)

    def review(self, label: str, verdict: str, *, by: str, why: str = "") -> Label:
        """Accept, reject or send back a label; only accepting needs no reason."""
        self.label(label)
        review = Review(
            label=label,
            verdict=checked_verdict(verdict),
            by=clean(by, "the reviewer's name", LONGEST_NAME),
            why=clean(why, f"why the label is {verdict}", LONGEST_WHY, empty=verdict == "accepted"),
            at=self._clock(),
        )
        self.add([Row.of_review(review)])
        return self.label(label)

    # Reading.

    def label(self, label: str) -> Label:
        """One label by its id; raises UserError where there is none."""
        found = self._labels("WHERE l.id = ?", [label])
        if not found:
            raise UserError(f"{self.path} has no label {label!r}; `unbraid label --queue` shows their ids")
        return found[0]

    def of(self, latent: int) -> list[Label]:
        """All labels of a latent, the current one first, then the newest first; those rejected are last."""
        return sorted(self._labels("WHERE l.latent = ?", [latent]), key=_standing, reverse=True)

    def current(self, latents: Iterable[int] | None = None) -> dict[int, Label]:
        """The label to show of each latent (of all that have one): an accepted one before a proposed one
        before one that needs work, the newest of several; none where all were rejected."""
        found: list[Label] = []
        if latents is None:
            found = self._labels("", [])
        else:
            asked = list(latents)
            for start in range(0, len(asked), AT_ONCE):
                some = asked[start : start + AT_ONCE]
                found += self._labels(f"WHERE l.latent IN ({','.join('?' * len(some))})", some)
        best: dict[int, Label] = {}
        for label in found:
            held = best.get(label.latent)
            if label.status != "rejected" and (held is None or _standing(label) > _standing(held)):
                best[label.latent] = label
        return best

    def history(self, latent: int) -> list[dict[str, Any]]:
        """Everything that was ever said about a latent, oldest first, as the lines of an export."""
        rows = self.rows("WHERE labels.latent = ?", [latent])
        return [row.line() for row in sorted(rows, key=lambda row: (row.values["at"], row.order))]

    def queue(
        self, *, by: str = "", status: str = "proposed", limit: int = 100, offset: int = 0
    ) -> list[Label]:
        """Labels that wait for a decision, by latent and then oldest first.

        With `by`, those that this person has not reviewed, whatever others decided: two reviewers then judge
        independently.  Without, those whose status is `status`.
        """
        if by:
            where = "WHERE NOT EXISTS (SELECT 1 FROM reviews r WHERE r.label = l.id AND r.by = ?)"
            given: list[Any] = [by]
        else:
            where = (
                "WHERE coalesce((SELECT r.verdict FROM reviews r WHERE r.label = l.id"
                " ORDER BY r.at DESC, r.id DESC LIMIT 1), 'proposed') = ?"
            )
            given = [status]
        return self._labels(
            f"{where} ORDER BY l.latent, l.at, l.id LIMIT ? OFFSET ?", [*given, limit, offset]
        )

    def counts(self) -> dict[str, int]:
        """How many labels have each status."""
        counts = dict.fromkeys(("proposed", "accepted", "needs work", "rejected"), 0)
        query = (
            "SELECT coalesce((SELECT r.verdict FROM reviews r WHERE r.label = l.id"
            " ORDER BY r.at DESC, r.id DESC LIMIT 1), 'proposed') AS status, count(*) AS n FROM labels l"
            " GROUP BY status"
        )
        return counts | {row["status"]: row["n"] for row in self.ask(query)}

    def revision(self) -> int:
        """A number that grows whenever something is added: what was made from the labels is stale then."""
        tables = " + ".join(f"(SELECT count(*) FROM {table})" for table in TABLES)
        return int(self.ask(f"SELECT {tables} AS n")[0]["n"]) if self.path.is_file() else 0

    def agreement(self) -> Agreement | None:
        """How far reviewers agree, by their latest verdicts on each label; None where no two judged one."""
        latest: dict[tuple[str, str], str] = {}
        for row in self.ask("SELECT label, by, verdict FROM reviews ORDER BY at, id"):
            latest[row["label"], row["by"]] = row["verdict"]
        return agreement([(label, by, verdict) for (label, by), verdict in latest.items()])

    # Files that diff well: see lines.py.

    def export(self, path: Path | str) -> int:
        """Write everything as JSON Lines, sorted so that what is added is a line added; returns how many."""
        from unbraid.features.labels.lines import write_lines

        return write_lines(self.rows(), Path(path))

    def load(self, path: Path | str) -> int:
        """Add the lines of an export that are not here yet; returns their number.

        Raises UserError, naming file and line, where one is of another autoencoder or cannot be kept; then
        nothing is added.
        """
        from unbraid.features.labels.lines import read_lines

        rows = read_lines(Path(path), self.sae)
        known = {row.values["id"] for row in rows} | {row["id"] for row in self.ask("SELECT id FROM labels")}
        for row in rows:
            if "label" in row.values and row.values["label"] not in known:
                raise UserError(
                    f"{path}: label {row.values['label']} is reviewed or scored, but it is neither in the"
                    f" file nor in {self.path}; load the file that proposes it first"
                )
        if not self.sae and rows:
            self.sae = next((str(row.values["sae"]) for row in rows if "sae" in row.values), "")
        return self.add(rows)

    # The database.

    def add(self, rows: Sequence[Row]) -> int:
        """Add rows in one transaction, skipping those that are there; returns how many were added."""
        if not rows:
            return 0
        if not self.sae:
            raise UserError(f"{self.path} does not exist yet; say which autoencoder its labels belong to")
        added = 0
        with self._open(make=True) as connection:
            connection.execute("BEGIN IMMEDIATE")
            for row in rows:
                names, marks = ",".join(row.values), ",".join("?" * len(row.values))
                cursor = connection.execute(
                    f"INSERT OR IGNORE INTO {row.table} ({names}) VALUES ({marks})", list(row.values.values())
                )
                added += cursor.rowcount
            connection.execute("COMMIT")
        return added

    def rows(self, where: str = "", given: Sequence[Any] = ()) -> list[Row]:
        """All rows, or those of labels (and lists) that fit a condition on `labels`."""
        joined = "JOIN labels ON labels.id = t.label"
        found = [Row("labels", row) for row in self.ask(f"SELECT * FROM labels {where}", given)]
        for table in ("scores", "reviews"):
            query = f"SELECT t.*, labels.latent FROM {table} t {joined} {where}"
            found += [Row(table, row) for row in self.ask(query, given)]
        if not where:
            found += [Row("kept", row) for row in self.ask("SELECT * FROM kept")]
        return found

    def _labels(self, where: str, given: Sequence[Any]) -> list[Label]:
        # The latest of a label's scores, and its reviews as one JSON array, so that one query is enough.
        query = (
            "SELECT l.*, (SELECT s.scores FROM scores s WHERE s.label = l.id ORDER BY s.at DESC, s.id DESC"
            " LIMIT 1) AS scores, (SELECT json_group_array(json_object('label', r.label, 'verdict',"
            " r.verdict, 'by', r.by, 'why', r.why, 'at', r.at)) FROM reviews r WHERE r.label = l.id)"
            " AS reviews"
            f" FROM labels l {where}"
        )
        return [label_of(row) for row in self.ask(query, given)]

    def ask(self, query: str, given: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """Rows of a query; none where the file or its tables do not exist yet."""
        if not self.path.is_file():
            return []
        with self._open() as connection:
            connection.execute("BEGIN")
            if not self._is_made(connection):
                return []
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute(query, list(given))]

    def _known(self) -> str:
        rows = self.ask("SELECT id FROM sae")
        return str(rows[0]["id"]) if rows else ""

    @contextmanager
    def _open(self, *, make: bool = False) -> Generator[sqlite3.Connection, None, None]:
        # A connection each time: threads cannot share one, and a fork must not.
        try:
            if make:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=PATIENCE, isolation_level=None)) as connection:
                if make:
                    self._make(connection)
                yield connection
        except sqlite3.DatabaseError as error:
            if "not a database" in str(error) or "malformed" in str(error):
                raise IntegrityError(f"{self.path} is no file of labels, or is damaged ({error})") from error
            raise OSError(None, f"the file of labels cannot be used ({error})", str(self.path)) from error

    def _make(self, connection: sqlite3.Connection) -> None:
        connection.execute("BEGIN IMMEDIATE")  # so that of several who come at once one makes the tables
        if not self._is_made(connection):
            for statement in _TABLES.split(";"):
                connection.execute(statement)
            connection.execute("INSERT INTO sae VALUES (?)", [self.sae])
            connection.execute(f"PRAGMA application_id = {APPLICATION}")
            connection.execute(f"PRAGMA user_version = {SCHEMA}")
        connection.execute("COMMIT")

    def _is_made(self, connection: sqlite3.Connection) -> bool:
        """Within a transaction: whether the tables are there; UserError where they are not ours."""
        version, tables, application = connection.execute(
            "SELECT (SELECT user_version FROM pragma_user_version), (SELECT count(*) FROM sqlite_master),"
            " (SELECT application_id FROM pragma_application_id)"
        ).fetchone()
        if version == 0 and tables == 0:
            return False  # the file is there; who opened it first has not made the tables yet
        if version == 0 or application != APPLICATION:
            raise UserError(f"{self.path} is a database, but not one of labels; name another file")
        if version > SCHEMA:
            raise UserError(
                f"{self.path} has schema {version} and this version knows {SCHEMA}; update unbraid"
            )
        return True

    # Lists of latents.

    def keep(self, name: str, latent: int) -> None:
        """Put a latent on a list, which is made when it does not exist."""
        self._keep(name, latent, True)

    def drop(self, name: str, latent: int) -> None:
        """Take a latent from a list."""
        self._keep(name, latent, False)

    def lists(self) -> dict[str, int]:
        """Names of the lists with a latent on them, and how many they have."""
        found: dict[str, int] = {}
        for row in self.ask(_KEPT + "ORDER BY list"):
            found[row["list"]] = found.get(row["list"], 0) + 1
        return found

    def list(self, name: str) -> list[int]:
        """Latents on a list, in the order in which they were put there."""
        return [row["latent"] for row in self.ask(_KEPT + "AND k.list = ? ORDER BY k.at, k.id", [name])]

    def _keep(self, name: str, latent: int, there: bool) -> None:
        name = clean(name, "the list's name", LONGEST_NAME)
        # Its page would have the address of another.
        if there and (name in (".", "..") or name.endswith(".json")):
            raise UserError(f"the list's name is {name!r}; choose one that is not . or .. or ends in .json")
        if (checked_latent(latent) in self.list(name)) != there:
            self.add([Row.of_kept(self.sae, name, latent, there, self._clock())])


# Latents that were last put on their list, not taken from it.
_KEPT = (
    "SELECT k.list, k.latent FROM kept k WHERE k.there = 1 AND NOT EXISTS (SELECT 1 FROM kept later"
    " WHERE later.list = k.list AND later.latent = k.latent AND (later.at, later.id) > (k.at, k.id)) "
)
_RANK = {"accepted": 3, "proposed": 2, "needs work": 1, "rejected": 0}


def _standing(label: Label) -> tuple[int, str, str]:
    return _RANK[label.status], label.reviews[-1].at if label.reviews else label.at, label.id
