"""Shards of a store at a URL, on this machine's disk while they are needed.

A file lies in the cache under its own hash, which was compared when it came: the same bytes are there once,
whatever store they are of. Where the cache is full, what was not used for longest goes.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import suppress
from functools import lru_cache
from io import FileIO
from pathlib import Path

from unbraid.activations.space import parse_size, show_size
from unbraid.manifest.errors import UserError
from unbraid.manifest.files import WRITING
from unbraid.manifest.record import FileEntry
from unbraid.manifest.remote import Remote

FOLDER, SIZE = "UNBRAID_CACHE", "UNBRAID_CACHE_SIZE"
"""Environment variables with the cache's folder and size."""
DEFAULT_SIZE = "20GB"
THREADS = 4
"""Files that come at once: one alone waits for the network most of the time."""
LEAST = 2 * THREADS
"""Files for which a cache must have room, so that none goes before it was read."""


def cache_folder() -> Path:
    """Where the cache is, and beside it what is on its way to a URL."""
    return Path(os.environ.get(FOLDER) or "~/.cache/unbraid").expanduser()


class Cache:
    """A folder with files named by their hashes, together no larger than `size` bytes."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        self._lock = threading.Lock()
        self._coming: dict[str, int] = {}
        """Files being written and the bytes that they will have."""

    def path(self, entry: FileEntry) -> Path:
        """Where a file lies if it is there."""
        return self.folder / entry.digest[1]

    def open(self, entry: FileEntry) -> FileIO:
        """A file for reading, from now on the last to go; FileNotFoundError where it is not there."""
        path = self.path(entry)
        file = path.open("rb", buffering=0)
        if os.fstat(file.fileno()).st_size != entry.bytes:  # as the end of a machine's power may leave it
            file.close()
            path.unlink(missing_ok=True)
            raise FileNotFoundError(path)
        with suppress(FileNotFoundError):  # it has just gone; what is open can be read all the same
            os.utime(path)
        return file

    def fetch(self, remote: Remote, name: str, entry: FileEntry) -> None:
        """Bring a file, unless it is there. Raises as `Remote.fetch` does."""
        path = self.path(entry)
        if path.exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = self.folder / f".{path.name}.{os.getpid()}-{threading.get_ident()}{WRITING}"
        try:
            self._make_room(temporary.name, entry.bytes)
            remote.fetch(name, entry, temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
            with self._lock:
                self._coming.pop(temporary.name, None)

    def _make_room(self, name: str, n: int) -> None:
        with self._lock:
            self._coming[name] = n
            there = _files(self.folder)
            total = sum(self._coming.values())
            total += sum(size for _, file, size in there if file not in self._coming)
            for _, file, size in sorted(there):
                if total <= self.size:
                    return
                if file not in self._coming:
                    with suppress(OSError):  # another process took it, or Windows has it open
                        (self.folder / file).unlink()
                        total -= size


def default_cache() -> Cache:
    """The cache that the environment names; UserError for a size that is none."""
    return _cache(cache_folder() / "shards", parse_size(os.environ.get(SIZE) or DEFAULT_SIZE, SIZE))


@lru_cache
def _cache(folder: Path, size: int) -> Cache:
    # One for all stores of a process: it knows what is coming.
    return Cache(folder, size)


def _files(folder: Path) -> list[tuple[int, str, int]]:
    """When each file was last used, its name and its bytes."""
    found: list[tuple[int, str, int]] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # one that came meanwhile has another name now
                stat = entry.stat()
                found.append((stat.st_mtime_ns, entry.name, stat.st_size))
    return found


class Fetched:
    """Files of an artifact at a URL, each brought when it is needed, or before by threads."""

    def __init__(self, remote: Remote, kind: str, cache: Cache, *, check: bool) -> None:
        """Read the manifest, which has to be of that kind, and compare the sizes of all files where the store
        tells them; with `check` their hashes.

        Raises UserError where there is no manifest or the cache is too small to hand files on, IntegrityError
        naming a file that does not match.
        """
        self.remote, self.cache, self.manifest = remote, cache, remote.manifest(kind)
        self._files = files = self.manifest.files
        remote.check_sizes(files)
        if check:
            remote.check_all(self.manifest)
        self._lock = threading.Lock()
        self._waiting: deque[str] = deque()
        self._coming: dict[str, Future[None]] = {}
        self._busy = 0
        if (least := LEAST * max((entry.bytes for entry in files.values()), default=0)) > cache.size:
            raise UserError(
                f"{remote} has shards for which the cache of {show_size(cache.size)} is too small; set {SIZE}"
                f" to {show_size(least)} at least"
            )

    @property
    def size(self) -> int:
        """Bytes of all of them together."""
        return sum(entry.bytes for entry in self._files.values())

    def require_room(self) -> None:
        """Raise UserError unless all files fit into the cache at once."""
        if self.size > self.cache.size:
            raise UserError(
                f"{self.remote} has {show_size(self.size)}, more than the cache of"
                f" {show_size(self.cache.size)} in {self.cache.folder}, and shuffled reading needs all of it"
                f" at once; set {SIZE} higher, or read in the order of capture with --follow"
            )

    def expect(self, names: Iterable[str]) -> dict[str, Future[None]]:
        """Begin to bring these files, in this order; no more than half of the cache holds.

        Returns those that were not here, to wait for: each tells how its coming ended, also when it is over.
        """
        room = self.cache.size // 2 if self.size > self.cache.size else self.size
        coming: dict[str, Future[None]] = {}
        with self._lock:
            for name in names:
                if (room := room - self._files[name].bytes) < 0:
                    break
                if name not in self._coming and not self.cache.path(self._files[name]).exists():
                    self._coming[name] = Future()
                    self._waiting.append(name)
                if name in self._coming:
                    coming[name] = self._coming[name]
            more = min(THREADS - self._busy, len(self._waiting))
            self._busy += more
        for _ in range(more):
            # Daemons: the end of the process does not wait until all that was expected has come.
            threading.Thread(target=self._work, name="unbraid-fetch", daemon=True).start()
        return coming

    def open(self, name: str) -> FileIO:
        """A file for reading; waits until it is here. Raises what bringing it raised."""
        while True:
            try:
                return self.cache.open(self._files[name])
            except FileNotFoundError:
                for coming in self.expect([name]).values():
                    coming.result()

    def home(self, name: str) -> Path:
        """Where a file lies once it is here."""
        return self.cache.path(self._files[name])

    def path(self, name: str) -> Path:
        """A file's place, where it is now; waits until it is."""
        self.open(name).close()
        return self.home(name)

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._busy -= 1
                    return
                name = self._waiting.popleft()
            try:
                self.cache.fetch(self.remote, name, self._files[name])
            except BaseException as error:
                self._done(name).set_exception(error)
            else:
                self._done(name).set_result(None)

    def _done(self, name: str) -> Future[None]:
        with self._lock:
            return self._coming.pop(name)
