"""Writing a capture to a URL: every shard is made in a folder here, sent, compared by its length and removed.

There is no renaming in an object store, so files go to where they stay, and the manifest goes last: without
it nobody takes the folder for a capture. settings.json goes first and shards.jsonl after each shard, so that
a killed run goes on after the last shard that was sent, on another machine too.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from unbraid.activations.cache import cache_folder
from unbraid.activations.norms import SKIPPED
from unbraid.activations.shards import FINISHED, SETTINGS, read_finished
from unbraid.manifest.errors import IntegrityError, UserError
from unbraid.manifest.files import KEPT, WRITING, held, write_bytes
from unbraid.manifest.identity import sha256_bytes
from unbraid.manifest.record import MANIFEST, read_manifest
from unbraid.manifest.remote import Remote

_SHARD = re.compile(r"shard-\d+\.safetensors")


class Elsewhere:
    """A capture that is being written to a URL."""

    def __init__(self, url: str, staging: Path | None = None) -> None:
        """`staging` is where shards lie until they are sent; in the cache's folder if it is None. Raises as
        `Remote` does."""
        self.remote = Remote(url)
        self.url = self.remote.url
        self.staging = staging or cache_folder() / "sending" / sha256_bytes(self.url.encode())[:16]
        self._sent: set[str] = set()

    @contextmanager
    def building(self) -> Generator[Path, None, None]:
        """Yield the folder in which the capture is made, with what an earlier run has recorded; on a clean
        exit send what is in it, the manifest last.

        One run on this machine at a time may hold it. Raises UserError when the URL holds a capture or other
        files, or cannot be written; OSError naming the URL when it fails again and again.
        """
        there = self.remote.sizes()
        if MANIFEST in there and self._whole():
            raise UserError(f"{self.url} exists already; choose another --out or delete it")
        if there and SETTINGS not in there:
            raise UserError(f"{self.url} holds other files, such as {min(there)}; choose another --out")
        self.staging.mkdir(parents=True, exist_ok=True, mode=0o700)
        with held(self.staging, self.url):
            self._recall(there)
            try:
                yield self.staging
                self._finish()
            except BaseException:
                if not any(self.staging.iterdir()):
                    self.staging.rmdir()
                raise

    def send(self, path: Path, name: str) -> None:
        """Send a file; before the first, the settings that all depend on."""
        if not self._sent:
            self.remote.make()
            self._sent.add(SETTINGS)
            self.remote.send(self.staging / SETTINGS, SETTINGS)
        self._sent.add(name)
        self.remote.send(path, name)

    def record(self, path: Path) -> None:
        """Send what was recorded of the shard that was sent last, and remove it here."""
        if (skipped := self.staging / SKIPPED).exists():  # first: the shard's record vouches for its lines
            sent = self.staging / f".{SKIPPED}{WRITING}"  # a copy, since the next batches are added meanwhile
            shutil.copyfile(skipped, sent)
            self.send(sent, SKIPPED)
            sent.unlink()
        self.send(self.staging / FINISHED, FINISHED)
        path.unlink()

    def forget(self) -> None:
        """Take away what was sent, where that can be done at once: no shard was finished."""
        for name in self._sent:
            with suppress(UserError, OSError):
                self.remote.remove(name, once=True)

    def _whole(self) -> bool:
        """Whether the manifest is one; a kill may have torn it where files are written in place."""
        try:
            self.remote.manifest()
        except IntegrityError:
            return False
        except UserError as error:
            if isinstance(error.__cause__, ValueError):
                return False
            raise
        return True

    def _recall(self, there: dict[str, int | None]) -> None:
        """Have in the folder here the settings and records of an earlier run: as many shards, from the first,
        as are at the URL in their full length."""
        settings = self.remote.read(SETTINGS) if SETTINGS in there else None
        mine, listed = self.staging / SETTINGS, self.staging / FINISHED
        same = settings is not None and mine.exists() and mine.read_bytes() == settings
        for path in self.staging.iterdir():
            if not same or path.name not in (SETTINGS, FINISHED, SKIPPED):
                path.unlink()
        if settings is not None and FINISHED in there:
            # This machine's record is whole where a kill has torn the one that was being sent; the other is
            # longer where another machine went on.
            other = self.remote.read(FINISHED) or b""
            if other.count(b"\n") > len(read_finished(self.staging)):
                skipped = self.remote.read(SKIPPED) if SKIPPED in there else None
                for path, data in ((mine, settings), (listed, other), (self.staging / SKIPPED, skipped)):
                    if data is not None:
                        write_bytes(path, data)
        try:
            records = read_finished(self.staging)
        except IntegrityError as error:
            raise IntegrityError(
                f"{self.remote.at(FINISHED)} is damaged; delete {self.url} and capture again"
            ) from error
        kept: list[str] = []
        for record in records:
            if there.get(record["file"], -1) not in (record["bytes"], None):
                break
            kept.append(record["file"])
        if records:
            write_bytes(listed, b"".join(listed.read_bytes().splitlines(keepends=True)[: len(kept)]))
        for name in there:
            if _SHARD.fullmatch(name) and name not in kept:
                self.remote.remove(name)

    def _finish(self) -> None:
        manifest = read_manifest(self.staging)
        for path in sorted(self.staging.iterdir()):
            if path.name != MANIFEST:
                self.send(path, path.name)
        try:
            self.remote.check_sizes(manifest.files)
        except IntegrityError as error:
            raise IntegrityError(f"{self.url} has lost what was sent ({error}); {KEPT}") from error
        self.remote.send(self.staging / MANIFEST, MANIFEST)
        shutil.rmtree(self.staging)
