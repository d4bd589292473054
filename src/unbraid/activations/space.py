"""Disk space, asked for before anything is read: rows × (Σ over sites of width × bytes a value + 12)."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from unbraid.manifest.errors import UserError
from unbraid.manifest.files import KEPT

_DECIMAL = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS = {**_DECIMAL, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?b)?", re.IGNORECASE)


def parse_size(text: str, option: str) -> int:
    """Bytes of a size such as 20GB (10⁹ bytes each), 512MiB (2²⁰) or 1000000; UserError names the option."""
    found = _SIZE.fullmatch(text.strip())
    size = int(float(found[1]) * _UNITS[(found[2] or "").lower()]) if found else 0
    if size < 1:
        raise UserError(f"{option} {text!r} is no size; give one such as 20GB or 500MB")
    return size


def show_size(n: int) -> str:
    """A size that a person can read."""
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if n >= unit:
            return f"{n / unit:,.1f} {name}"
    return f"{n} bytes"


PASSING = 3
"""Shards that lie on the disk at once where they are sent on: one being sent, one being written, and what a
kill has left of one."""


@dataclass(frozen=True)
class Space:
    """What a capture writes, and whether there is room for it."""

    out: Path | str
    """Where it will lie: a folder, or a URL."""
    row_bytes: int
    """Bytes of a token's row, all sites and columns together."""
    shard_rows: int
    """Rows in a full shard."""
    rows: int | None
    """Rows that will be written at most; None where the corpus alone knows."""
    copied: int = 0
    """Bytes that are copied beforehand, since they cannot be linked."""
    budget: int | None = None
    """Bytes that the capture may take on the disk, if that was given."""
    by: Path | None = None
    """Folder here from which shards are sent where `out` is a URL: no more than PASSING lie there."""

    @property
    def free(self) -> int:
        """Bytes that are free where it is written."""
        return shutil.disk_usage(_there(self.by or Path(self.out))).free

    @property
    def sentence(self) -> str:
        """What will be written, for a person."""
        if self.rows is None:
            what = f"{show_size(self.row_bytes)} a token, of as many as the corpus has,"
        else:
            what = f"up to {show_size(self._bytes(self.rows))}"
        where = str(self.out)
        if self.by is not None:
            where += f", at most {show_size(self._passing)} at a time by way of {self.by}"
        return f"{what} will be written to {where}; {show_size(self.free)} are free there"

    def check(self, done: int = 0) -> None:
        """Raise UserError, with the numbers and what to change, when the rest has no room.

        `done` rows lie on the disk already. Where nobody knows how many will come, the next shard must have
        room. The list of documents and the headers of shards, a few bytes a row, are not counted.
        """
        if self.by is not None:
            self._check_passing()
            return
        rows = done + self.shard_rows if self.rows is None else self.rows
        less = "a smaller --shard-tokens" if self.rows is None else "fewer --tokens"
        if self.budget is not None and (whole := self._bytes(rows)) > self.budget:
            raise UserError(
                f"{self.out} needs {show_size(whole)} for {rows:,} rows, more than the --disk-budget of"
                f" {show_size(self.budget)}; "
                + (
                    f"give a larger one and {KEPT}"
                    if done
                    else f"choose {less}, fewer --site or a larger one"
                )
            )
        more = (rows - done) * self.row_bytes + (0 if done else self.copied)
        if more > (free := self.free):
            raise UserError(
                f"{self.out} needs {show_size(more)} for {rows - done:,} more rows, but {show_size(free)} are"
                " free there; "
                + (f"free some space and {KEPT}" if done else f"choose {less}, fewer --site or another --out")
            )

    @property
    def _passing(self) -> int:
        rows = PASSING * self.shard_rows
        return (rows if self.rows is None else min(rows, self.rows)) * self.row_bytes

    def _check_passing(self) -> None:
        for room, what in ((self.budget, "the --disk-budget of {}"), (self.free, "the {} that are free")):
            if room is not None and self._passing > room:
                raise UserError(
                    f"{self.out} needs {show_size(self._passing)} at a time in {self.by}, more than"
                    f" {what.format(show_size(room))}; choose a smaller --shard-tokens, or another folder"
                    " with UNBRAID_CACHE"
                )

    def _bytes(self, rows: int) -> int:
        return rows * self.row_bytes + self.copied


def same_disk(one: Path, other: Path) -> bool:
    """Whether two places are in one file system, where a file can have links in both."""
    return _there(one).stat().st_dev == _there(other).stat().st_dev


def _there(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.absolute()
    return path if path.exists() else _there(path.parent)
