"""Files of an artifact at a URL, such as s3://bucket/acts, through fsspec.

A call that fails is tried again after a pause, a few times; what fails for good is an OSError that names the
URL. No credentials pass through here: fsspec's packages find them where they always do. fsspec is imported
where a URL is given and nowhere else.
"""

from __future__ import annotations

import errno
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from time import sleep
from typing import Any, TypeGuard, TypeVar, cast

from blake3 import blake3

from unbraid.manifest.errors import IntegrityError, UserError
from unbraid.manifest.files import KEPT
from unbraid.manifest.progress import Progress
from unbraid.manifest.record import MANIFEST, FileEntry, Manifest, manifest_of

T = TypeVar("T")

PAUSES = (0.5, 1.0, 2.0, 4.0)
"""Seconds between one try and the next."""
READ = 1 << 24
"""Bytes asked for at once where a file is hashed at its place."""
_FINAL = (FileNotFoundError, IsADirectoryError, NotADirectoryError, IntegrityError, UserError)
_REFUSED = (PermissionError, NotImplementedError)
# Two letters at least: one is a drive of Windows.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:(//|:)")


def is_url(place: object) -> TypeGuard[str]:
    """Whether a place is a URL and no folder. A Path never is: it has made one slash of two."""
    return isinstance(place, str) and _URL.match(place) is not None


class Remote:
    """A folder at a URL. Calls may come from several threads."""

    def __init__(self, url: str) -> None:
        """Raises UserError for a URL that names no folder or holds a password, an unknown protocol, and a
        protocol whose package is not installed.
        """
        protocol, _, rest = url.partition("://")
        if re.search(r"^[^/]*:[^/]*@", rest):
            raise UserError(
                f"the {protocol} URL holds a password, which would be recorded; leave it out and give it in"
                " fsspec's own configuration (~/.config/fsspec) or the environment"
            )
        if "::" in url or "?" in url:
            raise UserError(f"{url} is no folder's URL; give it without {'::' if '::' in url else '?'}")
        if not rest.strip("/"):
            raise UserError(f"{url} names no folder; add one, such as {protocol}://bucket/acts")
        self.url = url.rstrip("/")
        self._lists = protocol not in ("http", "https")  # a web server cannot be asked what lies there
        try:
            from fsspec.core import url_to_fs

            found = cast("tuple[Any, str]", url_to_fs(self.url))
        except ImportError as error:
            raise UserError(f"{self.url} needs a package that is not installed: {error}") from error
        except ValueError as error:
            raise UserError(
                f"{self.url} cannot be opened ({error}); give a protocol that fsspec knows, such as s3, gs or"
                " file, or a folder without ://"
            ) from error
        except Exception as error:  # of whatever package the protocol has: some connect at once
            raise UserError(
                f"{self.url} cannot be opened ({_said(error)}); check it, and run again"
            ) from error
        self._fs, self._root = found[0], found[1].rstrip("/")

    def __str__(self) -> str:
        return self.url

    def sizes(self) -> dict[str, int | None]:
        """The files below and their lengths in bytes, None where the store does not tell them."""

        def find() -> dict[str, Any]:
            self._fs.invalidate_cache()  # what others have written is wanted
            return self._fs.find(self._root, detail=True)

        try:
            found = self._try("listed", "", find)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        prefix = self._root + "/"
        return {
            path.removeprefix(prefix): entry.get("size")
            for path, entry in found.items()
            if path.startswith(prefix)
        }

    def check_sizes(self, files: Mapping[str, FileEntry]) -> None:
        """Compare the lengths of files with their entries, where the store tells them without opening each;
        raises IntegrityError naming one that is missing or of another length.
        """
        there = self._told()
        if there is None:
            return
        for name, entry in files.items():
            if name not in there:
                raise IntegrityError(f"{self.at(name)} is missing; restore it or make it again")
            if (size := there[name]) is not None and size != entry.bytes:
                entry.require(FileEntry(size, **dict([entry.digest])), self.at(name))

    def _told(self) -> dict[str, int | None] | None:
        try:
            return self.sizes() if self._lists else None
        except UserError:  # who may read may not always list
            return None

    def read(self, name: str) -> bytes | None:
        """A small file's bytes; None where it is not there."""
        try:
            return self._try("read", name, lambda: self._fs.cat_file(self._at(name)))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    def make(self) -> None:
        """Make the folder where the store has folders. Raises UserError where it cannot lie there."""
        try:
            self._try("made", "", lambda: self._fs.mkdir(self._root, create_parents=False))
        except FileNotFoundError as error:
            raise UserError(
                f"{self.url} cannot be made: what it lies in does not exist; make that first"
            ) from error
        except FileExistsError:
            pass

    def send(self, path: Path, name: str) -> None:
        """Put a file there and compare its length there.

        Raises OSError, saying that the same command goes on, when that fails again and again.
        """
        size = path.stat().st_size

        def put() -> None:
            self._fs.put_file(str(path), self._at(name))
            self._fs.invalidate_cache()
            try:
                there = self._fs.info(self._at(name))["size"]
            except FileNotFoundError as error:
                raise OSError("it was sent and is not there") from error
            if there != size:
                raise OSError(f"{there} of {size} bytes are there")

        try:
            self._try("written", name, put)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise UserError(
                f"{self.at(name)} cannot be written ({_said(error)}); check that what it lies in exists"
            ) from error

    def fetch(self, name: str, entry: FileEntry, path: Path) -> None:
        """Bring a file to `path`, and compare it with its entry in the manifest.

        Bytes that do not fit are fetched once more. Raises IntegrityError naming a file that is missing or
        another one, OSError where the disk here is full.
        """

        def get() -> None:
            try:
                self._fs.get_file(self._at(name), str(path))
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise _Full(error.errno, "the disk is full; free some space", str(path)) from error
                raise

        for last in (False, True):
            try:
                self._try("read", name, get)
                entry.require(FileEntry.of(path, entry.digest[0]), self.at(name))
                return
            except (FileNotFoundError, IsADirectoryError) as error:
                raise IntegrityError(f"{self.at(name)} is missing; restore it or capture again") from error
            except IntegrityError:
                if last:
                    raise

    def check_all(self, manifest: Manifest, progress: Progress | None = None) -> None:
        """Hash every file as it comes; raises IntegrityError naming the first that is missing, not listed or
        not what the manifest lists.
        """
        there = self._told()
        if there is not None and (more := there.keys() - manifest.files.keys() - {MANIFEST}):
            raise IntegrityError(f"{self.at(min(more))} is not listed in its manifest; take it out")
        for done, (name, entry) in enumerate(sorted(manifest.files.items()), start=1):
            self._check(name, entry)
            if progress is not None:
                progress(done, len(manifest.files), name)

    def _check(self, name: str, entry: FileEntry) -> None:
        def hashed() -> FileEntry:
            digest, size = {"sha256": hashlib.sha256, "blake3": blake3}[entry.digest[0]](), 0
            with self._fs.open(self._at(name), "rb") as file:
                while data := file.read(READ):
                    digest.update(data)
                    size += len(data)
            return FileEntry(size, **{entry.digest[0]: digest.hexdigest()})

        try:
            entry.require(self._try("read", name, hashed), self.at(name))
        except (FileNotFoundError, IsADirectoryError) as error:
            raise IntegrityError(f"{self.at(name)} is missing; restore it or make it again") from error

    def remove(self, name: str, *, once: bool = False) -> None:
        """Take a file away, if it is there; try it once, or as often as all else."""
        with suppress(FileNotFoundError):
            self._try("removed", name, lambda: self._fs.rm_file(self._at(name)), () if once else PAUSES)

    def manifest(self, kind: str | None = None) -> Manifest:
        """The folder's manifest; raises as `read_manifest` does."""
        data = self.read(MANIFEST)
        if data is None:
            wanted = f"an artifact of kind {kind}" if kind else "an artifact"
            raise UserError(
                f"{self.url} is not {wanted}: it has no {MANIFEST}; check the URL, or run the command that"
                " makes it to its end"
            )
        return manifest_of(data, self.url, self.at(MANIFEST), kind)

    def at(self, name: str) -> str:
        """A file's own URL."""
        return f"{self.url}/{name}" if name else self.url

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _try(self, what: str, name: str, call: Callable[[], T], pauses: Sequence[float] | None = None) -> T:
        """Call until it succeeds, as often as there are pauses and once more."""
        pauses = PAUSES if pauses is None else pauses
        for pause in (*pauses, None):
            try:
                return call()
            except (*_FINAL, FileExistsError, _Full):
                raise
            except _REFUSED as error:
                raise UserError(
                    f"{self.at(name)} may not be {what} ({_said(error)}); check the rights that fsspec's"
                    " configuration or the environment gives you"
                ) from error
            except Exception as error:  # each protocol's package has errors of its own
                if pause is None:
                    raise OSError(
                        errno.EIO,
                        f"cannot be {what} ({_said(error)}), tried {len(pauses) + 1} times; {KEPT}",
                        self.at(name),
                    ) from error
                sleep(pause)
        raise AssertionError("the last try returns or raises")


class _Full(OSError):
    """The disk here has no room, which no other try makes."""


def _said(error: BaseException) -> str:
    """What an error says, in one line."""
    text = str(getattr(error, "strerror", None) or error) or type(error).__name__
    return " ".join(text.split())[:300]
