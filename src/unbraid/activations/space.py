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


@dataclass(frozen=True)
class Space:
    """What a capture writes, and whether there is room for it."""

    out: Path
    """Where it will lie."""
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

    @property
    def free(self) -> int:
        """Bytes that are free where `out` will lie."""
        return shutil.disk_usage(_there(self.out)).free

    @property
    def sentence(self) -> str:
        """What will be written, for a person."""
        if self.rows is None:
            what = f"{show_size(self.row_bytes)} a token, of as many as the corpus has,"
        else:
            what = f"up to {show_size(self._bytes(self.rows))}"
        return f"{what} will be written to {self.out}; {show_size(self.free)} are free there"

    def check(self, done: int = 0) -> None:
        """Raise UserError, with the numbers and what to change, when the rest has no room.

        `done` rows lie on the disk already. Where nobody knows how many will come, the next shard must have
        room. The list of documents and the headers of shards, a few bytes a row, are not counted.
        """
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

    def _bytes(self, rows: int) -> int:
        return rows * self.row_bytes + self.copied


def same_disk(one: Path, other: Path) -> bool:
    """Whether two places are in one file system, where a file can have links in both."""
    return _there(one).stat().st_dev == _there(other).stat().st_dev


def _there(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.absolute()
    return path if path.exists() else _there(path.parent)
