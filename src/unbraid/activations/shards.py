"""Writing shards so that a killed run goes on after the last finished one."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from unbraid.manifest.errors import IntegrityError, UserError
from unbraid.manifest.files import write_json, writing
from unbraid.manifest.identity import sha256_file

SETTINGS = "settings.json"
FINISHED = "shards.jsonl"
DOCUMENTS = "documents.jsonl"
COLUMNS = ("tokens", "documents", "positions")


_DTYPES = {"F32": torch.float32, "F16": torch.float16, "I32": torch.int32}


def shard_name(index: int) -> str:
    """File name of a shard, counted from 0."""
    return f"shard-{index:05d}.safetensors"


@dataclass(frozen=True)
class Place:
    """Where a tensor is in a shard's file."""

    offset: int
    """Byte at which it begins."""
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def pitch(self) -> int:
        """Bytes from one row to the next."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


def places(path: Path) -> dict[str, Place]:
    """Where the tensors of a shard are, by the header of the safetensors format: eight bytes with its length,
    then JSON. Raises ValueError where that is not what the file holds.
    """
    found: dict[str, Place] = {}
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size - 8 - length
        if size < 0:
            raise ValueError("its header is longer than the file")
        try:
            header = cast("dict[str, Any]", json.loads(file.read(length)))
            for name, entry in header.items():
                if name != "__metadata__":
                    begin, end = entry["data_offsets"]
                    found[name] = place = Place(
                        8 + length + begin, _DTYPES[entry["dtype"]], tuple(entry["shape"])
                    )
                    if not 0 <= begin <= end <= size or place.shape[0] * place.pitch != end - begin:
                        raise ValueError("its header names more than the file holds")
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError("its header is no safetensors header") from error
    return found


class ShardWriter:
    """Collects rows and writes a shard whenever it is full; memory is one shard.

    `finished` rows lie on disk already when a partial folder is continued: the caller passes the rows from
    there on, and calls `confirm` as it passes each finished shard's end.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], *, widths: dict[str, int]) -> None:
        self.folder = folder
        self.capacity = int(settings["shard_tokens"])
        self.rows = 0
        """Rows that the caller has passed or skipped so far."""
        self._open(settings)
        dtype = getattr(torch, settings["dtype"])
        self._buffers = {
            site: torch.empty((self.capacity, width), dtype=dtype) for site, width in widths.items()
        }
        self._columns = {name: torch.empty(self.capacity, dtype=torch.int32) for name in COLUMNS}
        self._filled = 0
        self._digest = ""
        # Rewritten from the start by every run: its lines follow from the documents alone.
        self._documents = (folder / DOCUMENTS).open("w", encoding="utf-8", newline="\n")

    @property
    def finished(self) -> int:
        """Rows in finished shards."""
        return sum(record["rows"] for record in self.records)

    def add_documents(self, records: list[dict[str, Any]]) -> None:
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
        """Append n rows: `values` (n, d) by site name, `columns` (n,) by name; digest as in the plan."""
        n = len(columns["tokens"])
        if self.records and self.records[-1]["rows"] < self.capacity:
            raise self._other("corpus")  # the old run had come to the corpus' end before these rows
        self._digest = digest
        done = 0
        while done < n:
            take = min(n - done, self.capacity - self._filled)
            for source, target in ((values, self._buffers), (columns, self._columns)):
                for name, buffer in target.items():
                    buffer[self._filled : self._filled + take] = source[name][done : done + take]
            self._filled += take
            done += take
            self.rows += take
            if self._filled == self.capacity:
                self._commit(digest)

    def close(self) -> None:
        """Write the last, shorter shard; raises UserError when the run continued here had more rows."""
        if self.rows < self.finished:
            raise self._other("corpus")
        if self._filled:
            self._commit(self._digest)
        self._documents.close()

    def abandon(self, *, clear: bool) -> None:
        """After an error: keep what is finished; where nothing is and `clear`, remove this writer's files."""
        self._documents.close()
        if clear and not self.records:
            for name in (DOCUMENTS, FINISHED, SETTINGS):
                (self.folder / name).unlink(missing_ok=True)

    # --- on disk ---

    def _open(self, settings: dict[str, Any]) -> None:
        path = self.folder / SETTINGS
        self.records: list[dict[str, Any]] = self._read_finished()
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
        for record in self.records:
            self._verify(record)
        for stray in set(self.folder.glob("shard-*")) - {self.folder / r["file"] for r in self.records}:
            stray.unlink()  # finished just before a kill, but not recorded: written again
        # Ending with whole lines: a record torn by a kill is written again.
        lines = "".join(_line(record) for record in self.records)
        with writing(self.folder / FINISHED) as temporary:
            temporary.write_text(lines, encoding="utf-8", newline="\n")

    def _read_finished(self) -> list[dict[str, Any]]:
        path = self.folder / FINISHED
        records: list[dict[str, Any]] = []
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []:
            if not line.endswith("\n"):
                break
            try:
                records.append(cast("dict[str, Any]", json.loads(line)))
            except ValueError as error:
                raise IntegrityError(f"{path} is damaged; delete {self.folder} and capture again") from error
        return records

    def _verify(self, record: dict[str, Any]) -> None:
        # The manifest will vouch for these bytes, so they must be what was computed.
        path = self.folder / record["file"]
        if (
            not path.exists()
            or path.stat().st_size != record["bytes"]
            or sha256_file(path) != record["sha256"]
        ):
            raise IntegrityError(
                f"{path} is missing or not what was written there; delete {self.folder} and capture again"
            )

    def _commit(self, digest: str) -> None:
        path = self.folder / shard_name(len(self.records))
        tensors = {**self._buffers, **self._columns}
        with writing(path) as temporary:
            save_file({name: tensor[: self._filled] for name, tensor in tensors.items()}, temporary)
        record = {
            "file": path.name,
            "rows": self._filled,
            "bytes": path.stat().st_size,
            "sha256": sha256_file(path),
            "corpus": digest,
        }
        with (self.folder / FINISHED).open("a", encoding="utf-8", newline="\n") as file:
            file.write(_line(record))
            file.flush()
            os.fsync(file.fileno())
        self.records.append(record)
        self._filled = 0

    def _ends(self) -> list[int]:
        ends: list[int] = []
        for record in self.records:
            ends.append((ends[-1] if ends else 0) + record["rows"])
        return ends

    def _other(self, what: str) -> UserError:
        return UserError(
            f"{self.folder} was begun with other settings ({what}); run with those again to go on, delete it,"
            " or choose another --out"
        )


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, sort_keys=True) + "\n"
