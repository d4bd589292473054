"""Writing shards so that a killed run goes on after the last finished one.

A shard is a safetensors file: the activations of each site, (n, d), as float32, float16, or int8 with one
float32 scale a row, and the columns, (n,) int32. While rows are collected for one, a thread hashes the one
before, writes it and waits for the disk.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors.torch import load_file
from torch import Tensor

from unbraid.activations.filling import COLUMNS, Filling
from unbraid.activations.shardfile import write_tensors
from unbraid.manifest.errors import IntegrityError, UserError
from unbraid.manifest.files import becoming, settle, temporary_beside, write_json, writing
from unbraid.manifest.identity import blake3_file
from unbraid.manifest.record import FileEntry

SETTINGS = "settings.json"
FINISHED = "shards.jsonl"
DOCUMENTS = "documents.jsonl"


def shard_name(index: int) -> str:
    """File name of a shard, counted from 0."""
    return f"shard-{index:05d}.safetensors"


def row_bytes(widths: Mapping[str, int], dtype: str) -> int:
    """Bytes of a row in a shard, all sites and columns together."""
    scales = len(widths) * torch.float32.itemsize if dtype == "int8" else 0
    values = sum(widths.values()) * getattr(torch, dtype).itemsize
    return values + scales + len(COLUMNS) * torch.int32.itemsize


def read_finished(folder: Path) -> list[dict[str, Any]]:
    """The records of a folder's finished shards; half a line is one being written, or torn by a kill."""
    return finished_of(folder / FINISHED)


def finished_of(path: Path) -> list[dict[str, Any]]:
    """The records in a file; none where it is missing."""
    records: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []:
        if not line.endswith("\n"):
            break
        try:
            records.append(cast("dict[str, Any]", json.loads(line)))
        except ValueError as error:
            raise IntegrityError(f"{path} is damaged; delete {path.parent} and capture again") from error
    return records


class Finished(Protocol):
    """A finished capture that another one begins with."""

    folder: Path | str
    """Where it is."""

    def file(self, name: str) -> Path:
        """One of its files, on this disk."""
        ...


class Destination(Protocol):
    """Where shards are sent once they are written."""

    url: str
    """Its name."""

    def send(self, path: Path, name: str) -> None:
        """Send a file."""
        ...

    def record(self, path: Path) -> None:
        """Send what was recorded of the shard that was sent last, and remove it here."""
        ...

    def forget(self) -> None:
        """Take away what was sent."""
        ...


class ShardWriter:
    """Collects rows and writes a shard whenever it is full; memory is two shards.

    `finished` rows lie on disk already when a partial folder is continued: the caller passes the rows from
    there on, and calls `skip` for those that finished shards hold. With `after`, another finished capture
    with shards of this size, its rows are the first; the caller calls `begin`. With `destination`, finished
    shards lie there and no longer in the folder, which has the records of those that do.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        *,
        widths: dict[str, int],
        after: Finished | None = None,
        destination: Destination | None = None,
    ) -> None:
        self.folder = folder
        self._destination = destination
        self._name = folder if destination is None else destination.url
        self.capacity = int(settings["shard_tokens"])
        self.rows = 0
        """Rows that the caller has passed or skipped so far."""
        self._after = after
        self._before = [] if after is None else finished_of(after.file(FINISHED))
        self._open(settings)
        self._shards = [Filling(self.capacity, widths, settings["dtype"]) for _ in range(2)]
        """The one that is being filled, and the one that is being written."""
        self._threads = [
            ThreadPoolExecutor(1, f"unbraid-shards-{name}") for name in ("write", "settle", "hash")
        ]
        """One writes a shard and one hashes it, while the third waits until the one before is on the disk."""
        self._written: Future[None] | None = None
        self._settled: Future[None] | None = None
        self._next = len(self.records)
        self._digest = ""
        # Rewritten from the start by every run: its lines follow from the documents alone.
        self._documents = (folder / DOCUMENTS).open("w", encoding="utf-8", newline="\n")

    @property
    def finished(self) -> int:
        """Rows in finished shards."""
        return sum(record["rows"] for record in self.records)

    @property
    def before(self) -> int:
        """Rows of the capture that comes first."""
        return sum(record["rows"] for record in self._before)

    @property
    def begun(self) -> bool:
        """Whether there are finished shards but those of the capture that comes first."""
        return len(self.records) > len(self._full)

    def begin(self) -> None:
        """Put the rows of the capture that comes first where they belong: its full shards become links, or
        copies where the system cannot link or they are sent, and what a last shorter one holds goes into the
        next shard.
        Raises IntegrityError naming a shard that is damaged.
        """
        self.rows = self.before
        if self._after is None or self.begun:
            return
        advice = f"restore it, or choose another --append than {self._after.folder}"
        for record in self._before:
            source = self._after.file(record["file"])
            _verify(source, record, advice)
            if record["rows"] == self.capacity:
                if self._destination is not None:
                    self._destination.send(source, record["file"])
                else:
                    _link(source, self.folder / record["file"])
                self.records.append(record)
            else:
                self._shards[0].restore(load_file(source), record)
        self._next = len(self.records)
        self._list()

    @property
    def written(self) -> int:
        """Rows in shards that are finished or on their way to the disk, and are no links."""
        records = self.records[:]  # the threads add to it
        under_way = (self._next - len(records)) * self.capacity
        return sum(record["rows"] for record in records[len(self._full) :]) + under_way

    @property
    def _full(self) -> list[dict[str, Any]]:
        return [record for record in self._before if record["rows"] == self.capacity]

    def add_documents(self, records: Iterable[dict[str, Any]]) -> None:
        """Append a line for each document."""
        for record in records:
            self._documents.write(json.dumps(record, ensure_ascii=False) + "\n")

    def skip(self, rows: int, digest: str) -> None:
        """Pass over rows that a finished shard holds; raises UserError when the corpus is another one."""
        for record, end in zip(self.records, self._ends(), strict=True):
            if self.rows < end <= self.rows + rows and record["corpus"] != digest:
                raise self._other("corpus")
        self.rows += rows

    def add(self, values: dict[str, Tensor], columns: dict[str, Tensor], digest: str) -> None:
        """Append n rows: `values` (n, d) by site name, floats that the stored type can hold; `columns` (n,)
        by name; digest as in the plan."""
        n = len(columns["tokens"])
        if self.records and self.records[-1]["rows"] < self.capacity:
            raise self._other("corpus")  # the old run had come to the corpus' end before these rows
        self._digest = digest
        done = 0
        while done < n:
            shard = self._shards[0]
            took = shard.take(values, columns, done)
            done += took
            self.rows += took
            if shard.filled == self.capacity:
                self._commit(digest)

    def close(self) -> None:
        """Write the last, shorter shard; raises UserError when the run continued here had more rows."""
        if self.rows < self.finished:
            raise self._other("corpus")
        if self._shards[0].filled:
            self._commit(self._digest)
        self._wait()
        if self._settled is not None:
            self._settled.result()
        self._stop()

    def files(self) -> dict[str, FileEntry]:
        """The finished shards as a manifest lists them."""
        return {
            record["file"]: FileEntry(record["bytes"], blake3=record["blake3"]) for record in self.records
        }

    def error(self) -> dict[str, float] | None:
        """By site the share of the activations' variance that rounding to int8 took; None where it did not.

        The variance is about each shard's own mean, which makes the share no smaller than it is.
        """
        sums = [record["error"] for record in self.records if record["error"]]
        if not sums:
            return None
        totals = {
            site: [sum(part) for part in zip(*(one[site] for one in sums), strict=True)] for site in sums[0]
        }
        return {site: error / variance if variance else 0.0 for site, (error, variance) in totals.items()}

    def abandon(self, *, clear: bool) -> None:
        """After an error: keep what is finished; where nothing is and `clear`, remove this writer's files."""
        self._stop()  # what was handed over gets finished
        if clear and not self.begun:
            for name in (DOCUMENTS, FINISHED, SETTINGS, *(record["file"] for record in self.records)):
                (self.folder / name).unlink(missing_ok=True)
            if self._destination is not None:
                self._destination.forget()

    # --- on disk ---

    def _open(self, settings: dict[str, Any]) -> None:
        path = self.folder / SETTINGS
        self.records = read_finished(self.folder)
        if not self.begun:
            self.records = []  # links are made again
        if path.exists() and self.records:
            try:
                old = json.loads(path.read_bytes())
            except ValueError as error:
                raise IntegrityError(f"{path} is not JSON; delete {self.folder} and capture again") from error
            changed = sorted(k for k in old.keys() | settings.keys() if old.get(k) != settings.get(k))
            if changed:
                raise self._other(", ".join(changed))
        elif self.records:
            raise IntegrityError(f"{path} is missing; delete {self.folder} and capture again")
        else:
            write_json(path, settings)
        for record in self.records if self._destination is None else ():
            _verify(self.folder / record["file"], record, f"delete {self.folder} and capture again")
        for stray in set(self.folder.glob("shard-*")) - {self.folder / r["file"] for r in self.records}:
            stray.unlink()  # finished just before a kill, but not recorded: written again
        self._list()

    def _list(self) -> None:
        # Ending with whole lines: a record torn by a kill is written again.
        lines = "".join(_line(record) for record in self.records)
        with writing(self.folder / FINISHED) as temporary:
            temporary.write_text(lines, encoding="utf-8", newline="\n")

    def _commit(self, digest: str) -> None:
        """Hand the full shard to the thread that writes, once it is done with the one before."""
        self._wait()
        path = self.folder / shard_name(self._next)
        self._next += 1
        self._written = self._threads[0].submit(self._write, path, self._shards[0], digest)
        self._shards.reverse()
        self._shards[0].clear()

    def _wait(self) -> None:
        if self._written is not None:
            self._written.result()

    def _stop(self) -> None:
        for thread in self._threads:
            thread.shutdown()
        self._documents.close()

    def _write(self, path: Path, shard: Filling, digest: str) -> None:
        temporary = temporary_beside(path)
        with becoming(temporary, path):
            size, hashed = write_tensors(temporary, shard.tensors(), self._threads[2])
            if self._settled is not None:
                self._settled.result()
        record = {
            "file": path.name,
            "rows": shard.filled,
            "bytes": size,
            "blake3": hashed,
            "corpus": digest,
            "error": shard.error(),
        }
        self._settled = self._threads[1].submit(self._settle, temporary, path, record)

    def _settle(self, temporary: Path, path: Path, record: dict[str, Any]) -> None:
        with becoming(temporary, path):
            settle(temporary, path)
        if self._destination is not None:
            self._destination.send(path, path.name)
        with (self.folder / FINISHED).open("a", encoding="utf-8", newline="\n") as file:
            file.write(_line(record))
            file.flush()
            os.fsync(file.fileno())
        if self._destination is not None:
            self._destination.record(path)
        self.records.append(record)

    def _ends(self) -> list[int]:
        ends: list[int] = []
        for record in self.records:
            ends.append((ends[-1] if ends else 0) + record["rows"])
        return ends

    def _other(self, what: str) -> UserError:
        return UserError(
            f"{self._name} was begun with other settings ({what}); run with those again to go on, delete it,"
            " or choose another --out"
        )


def _verify(path: Path, record: dict[str, Any], advice: str) -> None:
    # The manifest will vouch for these bytes, so they must be what was computed.
    if not path.exists() or path.stat().st_size != record["bytes"] or blake3_file(path) != record["blake3"]:
        raise IntegrityError(f"{path} is missing or not what was written there; {advice}")


def _link(source: Path, path: Path) -> None:
    try:
        os.link(source, path)
    except OSError:  # another file system, or one without links
        with writing(path) as temporary:
            shutil.copyfile(source, temporary)


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, sort_keys=True) + "\n"
