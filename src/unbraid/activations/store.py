"""Captured activations, opened for reading: on disk, or at a URL and brought to the disk as they are read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unbraid.activations.cache import Cache, Fetched, default_cache
from unbraid.activations.filling import COLUMNS, SCALE
from unbraid.activations.rows import Rows
from unbraid.activations.shardfile import Place, memory, places
from unbraid.activations.shards import DOCUMENTS, shard_name
from unbraid.manifest.errors import IntegrityError, UserError
from unbraid.manifest.record import Manifest, check_files, read_manifest
from unbraid.manifest.remote import Remote, is_url
from unbraid.model.sites import Site

KIND = "activations"


@dataclass(frozen=True, eq=False)
class Columns:
    """Where each row of a shard comes from; all (n,) int32."""

    tokens: Tensor
    """Token ids; -1 where an import does not know them."""
    documents: Tensor
    """Index of the document: its line in documents.jsonl, from 0."""
    positions: Tensor
    """Index of the token in its whole document's tokens, BOS included."""


class ActivationStore:
    """A finished capture. Shards are read piece by piece, never all at once."""

    def __init__(
        self,
        folder: Path | str,
        *,
        check: bool = False,
        manifest: Manifest | None = None,
        cache: Cache | None = None,
    ) -> None:
        """Open a folder or URL; sizes of all files are compared with the manifest, with `check` their hashes.
        `manifest` stands in for the folder's own where that is not written yet. What is read from a URL is
        brought to `cache`, where the environment says if it is None; its hash is compared when it comes.

        Raises UserError when it holds no activations or cannot be opened, IntegrityError naming the file
        that does not match, OSError naming a URL that fails again and again.
        """
        self.folder: Path | str = folder if is_url(folder) else Path(folder)
        """The folder, or the URL as text."""
        self._fetched: Fetched | None = None
        if isinstance(self.folder, str):
            self._fetched = Fetched(Remote(self.folder), KIND, cache or default_cache(), check=check)
            self.manifest: Manifest = self._fetched.manifest
        else:
            self.manifest = manifest or read_manifest(self.folder, kind=KIND)
            _check(self.folder, self.manifest, check)
        facts = self.manifest.facts
        self.sites: tuple[Site, ...] = tuple(Site.parse(name) for name in facts["sites"])
        self.n_tokens: int = facts["tokens"]
        """Rows in all shards together."""
        self.n_documents: int = facts["documents"]
        """Documents read, those without a captured token included."""
        self.shard_tokens: int = facts["shard_tokens"]
        """Rows in every shard but the last."""
        count = -(-self.n_tokens // self.shard_tokens)
        for name in map(shard_name, range(count)):
            if name not in self.manifest.files:
                raise IntegrityError(f"{self.folder}/{name} is not listed in the manifest; capture again")
        home = Path(self.folder).joinpath if self._fetched is None else self._fetched.home
        self.shards: tuple[Path, ...] = tuple(home(shard_name(i)) for i in range(count))
        """The shards' files; of a URL, where they lie once they are here."""
        self._places: dict[int, dict[str, Place]] = {}

    def __str__(self) -> str:
        return str(self.folder)

    @property
    def id(self) -> str:
        """The artifact's content id."""
        return self.manifest.id

    @property
    def model_name(self) -> str:
        """Name of the model that was read; empty when unknown."""
        return self.manifest.facts["model"]

    @property
    def model_id(self) -> str:
        """Content id of that model's weights; empty when unknown, as after an import."""
        return self.manifest.inputs.get("model", "")

    @property
    def tokenizer_id(self) -> str:
        """Content id of its tokenizer; empty when unknown."""
        return self.manifest.inputs.get("tokenizer", "")

    @property
    def unknown(self) -> frozenset[str]:
        """What nobody said about an import: model, tokenizer, tokens, documents. Empty for a capture."""
        return frozenset(self.manifest.facts.get("origin", {}).get("unknown", ()))

    @property
    def context(self) -> int:
        """Tokens the model read at once; 0 when unknown."""
        return self.manifest.facts["context"]

    @property
    def positions(self) -> str:
        """Which tokens were kept: all, reply, focus, mask or last."""
        return self.manifest.facts["positions"]

    @property
    def dtype(self) -> str:
        """How values are stored: float16, float32 or int8."""
        return self.manifest.facts["dtype"]

    def site(self, site: Site | str) -> Site:
        """The captured site of that name; raises UserError listing what was captured when there is none."""
        found = Site.parse(site)
        if found not in self.sites:
            known = ", ".join(map(str, self.sites))
            raise UserError(f"{self.folder} holds no site {found}; choose one of {known}")
        return found

    def d_in(self, site: Site | str) -> int:
        """Width of a site's activations."""
        facts = self.manifest.facts
        return facts.get("widths", {}).get(str(self.site(site)), facts["d_in"])

    def rows(self, shard: int) -> int:
        """Number of rows in a shard."""
        return min(self.shard_tokens, self.n_tokens - shard * self.shard_tokens)

    def read(self, site: Site | str, shard: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of a site in a shard: (n, d_in) in the stored type, float32 where int8."""
        first, stop = shard * self.shard_tokens + start, self.rows(shard) if stop is None else stop
        rows = self.memory(site, stop - start)
        self.gather(site, [(first, stop - start)], rows)
        return rows.take()

    def memory(self, site: Site | str, n: int) -> Rows:
        """Room for n rows of a site."""
        return Rows.empty(n, self.d_in(site), self.dtype)

    def file(self, name: str) -> Path:
        """One of its files on this disk; from a URL it is brought here first."""
        return Path(self.folder, name) if self._fetched is None else self._fetched.path(name)

    def require_room(self) -> None:
        """Raise UserError unless all of it can be on this disk at once, as reading here and there needs."""
        if self._fetched is not None:
            self._fetched.require_room()

    def gather(self, site: Site | str, runs: Sequence[tuple[int, int]], rows: Rows) -> None:
        """Fill the first of `rows` with runs of a site's rows one after another.

        A run is its first row, counted through all shards, and how many; none crosses the end of a shard.
        """
        name, n = str(self.site(site)), sum(length for _, length in runs)
        if self._fetched is not None:  # begun with all of them, they come side by side
            self.expect(site, runs)
        self._fill(name, runs, rows.values[:n])
        if rows.scale is not None:
            self._fill(name + SCALE, runs, rows.scale[:n])

    def expect(self, site: Site | str, runs: Sequence[tuple[int, int]]) -> None:
        """Tell the system, where it can be told, that these runs of a site's rows will be read soon; from a
        URL, begin to bring their shards."""
        if self._fetched is not None:
            shards = dict.fromkeys(first // self.shard_tokens for first, _ in runs)
            self._fetched.expect(map(shard_name, shards))
            return
        if not hasattr(os, "posix_fadvise"):
            return
        name = str(self.site(site))
        for shard, mine in groupby(runs, lambda run: run[0] // self.shard_tokens):
            place = self._places.get(shard, {}).get(name)
            if place is None:  # not read yet, and what is wrong with it is said then
                continue
            try:
                with self.shards[shard].open("rb", buffering=0) as file:
                    for first, rows in mine:
                        at = place.offset + (first - shard * self.shard_tokens) * place.pitch
                        os.posix_fadvise(file.fileno(), at, rows * place.pitch, os.POSIX_FADV_WILLNEED)
            except OSError:
                continue

    def columns(self, shard: int) -> Columns:
        """Where a shard's rows come from."""
        rows = self.rows(shard)
        columns = {name: torch.empty(rows, dtype=torch.int32) for name in COLUMNS}
        for name, column in columns.items():
            self._fill(name, [(shard * self.shard_tokens, rows)], column)
        return Columns(**columns)

    def documents(self) -> Iterator[dict[str, Any]]:
        """The documents in the order of their indices: id, tokens, captured."""
        with self.file(DOCUMENTS).open(encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)

    def _fill(self, name: str, runs: Iterable[tuple[int, int]], out: Tensor) -> None:
        # Plain reads into memory that is there already: a mapped shard's pages would count as this process's
        # memory, as many as have ever been touched.
        place_in, filled = memory(out), 0
        for shard, mine in groupby(runs, lambda run: run[0] // self.shard_tokens):
            place = self._place(shard, name, out)
            file = self._open(shard)
            try:
                with file:
                    for first, rows in mine:
                        file.seek(place.offset + (first - shard * self.shard_tokens) * place.pitch)
                        end = filled + rows * place.pitch
                        while filled < end and (read := file.readinto(place_in[filled:end])):
                            filled += read
                        if filled < end:
                            raise OSError("it ends early")
            except OSError as error:
                raise self._unreadable(shard, error) from error

    def _open(self, shard: int) -> FileIO:
        if self._fetched is not None:
            return self._fetched.open(shard_name(shard))  # what goes wrong on the way is no damage
        try:
            return self.shards[shard].open("rb", buffering=0)
        except OSError as error:
            raise self._unreadable(shard, error) from error

    def _place(self, shard: int, name: str, out: Tensor) -> Place:
        """Where a column is in a shard's file; checked to be what the manifest says and `out` holds."""
        if shard not in self._places:
            path = self.file(shard_name(shard))
            try:
                self._places[shard] = places(path)
            except (OSError, ValueError) as error:
                raise self._unreadable(shard, error) from error
        place = self._places[shard].get(name)
        wanted = (out.dtype, (self.rows(shard), *out.shape[1:]))
        if place is None or (place.dtype, place.shape) != wanted:
            raise IntegrityError(
                f"{self._at(shard)} does not hold the {name} that its manifest lists; restore it or capture"
                " again"
            )
        return place

    def _unreadable(self, shard: int, error: Exception) -> IntegrityError:
        return IntegrityError(f"{self._at(shard)} cannot be read ({error}); restore it or capture again")

    def _at(self, shard: int) -> str:
        return f"{self.folder}/{shard_name(shard)}"


def _check(folder: Path, manifest: Manifest, hashes: bool) -> None:
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise IntegrityError(f"{path} is missing; restore it or capture again")
        if (size := path.stat().st_size) != entry.bytes:
            raise IntegrityError(
                f"{path} has {size} bytes where its manifest lists {entry.bytes}; restore it or capture again"
            )
    if hashes:
        check_files(folder)
