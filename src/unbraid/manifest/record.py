"""The manifest of an artifact: one JSON file that says what a folder is, what made it and what is in it."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, cast

from unbraid.manifest.errors import IntegrityError, UserError
from unbraid.manifest.files import write_json
from unbraid.manifest.identity import TIME_KEYS, blake3_file, canonical_json, content_id, sha256_file

MANIFEST = "manifest.json"
SCHEMA = 1


@dataclass(frozen=True)
class MadeBy:
    """What made an artifact."""

    version: str
    """Version of unbraid that wrote the artifact."""
    command: str
    """Command line that makes it again; empty when it was made from Python."""
    seed: int | None
    """Seed of everything random in it; None when nothing is."""


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact, with the one of two digests that it is known by, 64 hexadecimal digits."""

    bytes: int
    """Length of the file."""
    sha256: str | None = None
    """SHA-256 of its bytes."""
    blake3: str | None = None
    """BLAKE3 of its bytes: of what is large, since hashing with SHA-256 would take longer than writing."""

    def __post_init__(self) -> None:
        if (self.sha256 is None) == (self.blake3 is None):
            raise ValueError("a file needs either sha256 or blake3")

    @property
    def digest(self) -> tuple[str, str]:
        """The name of the digest and its value."""
        return ("sha256", self.sha256) if self.sha256 is not None else ("blake3", self.blake3 or "")

    def as_dict(self) -> dict[str, Any]:
        """What stands in a manifest."""
        return {"bytes": self.bytes, **dict([self.digest])}

    @classmethod
    def of(cls, path: Path, digest: str = "sha256") -> FileEntry:
        """A file's entry with a digest of that name."""
        hashed = {"sha256": sha256_file, "blake3": blake3_file}[digest](path)
        return cls(path.stat().st_size, **{digest: hashed})

    def require(self, found: FileEntry, path: Path | str) -> None:
        """Raise IntegrityError, naming the path or URL, unless what was found there is this file."""
        if found.bytes != self.bytes:
            raise IntegrityError(
                f"{path} has {found.bytes} bytes where its manifest lists {self.bytes}; restore it or make"
                " the artifact again"
            )
        if found != self:
            (digest, now), (_, then) = found.digest, self.digest
            raise IntegrityError(
                f"{path} was changed: its {digest} is {now[:12]}… where its manifest lists {then[:12]}…;"
                " restore it or make the artifact again"
            )


@dataclass(frozen=True)
class Manifest:
    """What an artifact is, what it was made from, and every file in it."""

    kind: str
    """What the artifact is: activations, sae, index, finding, policy, ..."""
    made_by: MadeBy
    """Version, command and seed."""
    inputs: dict[str, str]
    """Content id of each thing it was made from, by name."""
    files: dict[str, FileEntry]
    """Every file below the folder but the manifest itself, by its path relative to the folder."""
    facts: dict[str, Any]
    """Whatever else is worth knowing about it; JSON values only."""
    id: str
    """SHA-256 of the canonical JSON of all the above and the schema, without times."""
    schema: int = SCHEMA
    """Version of this format."""
    paths: dict[str, str] | None = None
    """Where each input lived, relative to the folder, or its URL; a hint for walking the lineage, no part of
    the id."""

    def as_dict(self) -> dict[str, Any]:
        """Return what stands in the file."""
        record = asdict(self) | {"files": {name: entry.as_dict() for name, entry in self.files.items()}}
        if self.paths is None:
            del record["paths"]
        return record


def write_manifest(
    folder: Path,
    *,
    kind: str,
    command: str,
    seed: int | None,
    inputs: Mapping[str, str],
    facts: Mapping[str, Any],
    paths: Mapping[str, Path | str] | None = None,
    without: str = "",
    known: Mapping[str, FileEntry] | None = None,
) -> Manifest:
    """Hash every file below `folder`, write `manifest.json` into it and return what was written.

    The file `without` is not listed: one that is needed until there is a manifest, and then removed. Files
    that are `known` by name, having been hashed as they were written, are not read again, and may lie
    elsewhere. `paths` says where inputs lie: on this machine, stored relative to `folder`, or at a URL.
    Raises ValueError for an input or file called "time" or "times" (ids leave such keys out) and for NaN
    among the facts.
    """
    known = known or {}
    files = {
        name: known[name] if name in known else FileEntry.of(folder / name)
        for name in sorted({*list_files(folder), *known})
        if name != without
    }
    if clash := TIME_KEYS & (files.keys() | inputs.keys()):
        raise ValueError(f"an input or file cannot be called {min(clash)!r}: ids leave times out")
    made_by = MadeBy(version=_version(), command=command, seed=seed)
    where = {
        name: path if isinstance(path, str) else Path(os.path.relpath(path, folder)).as_posix()
        for name, path in (paths or {}).items()
    }
    # Through JSON and back, so that what is returned here equals what a reader gets.
    record = json.loads(
        canonical_json(
            {
                "kind": kind,
                "schema": SCHEMA,
                "made_by": asdict(made_by),
                "inputs": dict(inputs),
                "files": {name: entry.as_dict() for name, entry in files.items()},
                "facts": dict(facts),
            }
        )
    )
    manifest = Manifest(
        kind=kind,
        made_by=made_by,
        inputs=record["inputs"],
        files=files,
        facts=record["facts"],
        id=content_id(record),
        paths=where or None,
    )
    write_json(folder / MANIFEST, manifest.as_dict())
    return manifest


def read_manifest(folder: Path, *, kind: str | None = None) -> Manifest:
    """Read and check a folder's manifest (not its files; see `check_files`).

    Raises UserError when the folder has no readable manifest or is not a `kind`, and IntegrityError when the
    manifest's id does not match its content.
    """
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        wanted = f"an artifact of kind {kind}" if kind else "an artifact"
        raise UserError(f"{folder} is not {wanted}: it has no {MANIFEST}; check the path") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    return manifest_of(data, folder, path, kind)


def manifest_of(data: bytes, folder: Path | str, path: Path | str, kind: str | None = None) -> Manifest:
    """Check the bytes of a manifest, whose folder and path may be URLs; raises as `read_manifest` does."""
    try:
        record = json.loads(data)
    except ValueError as error:
        raise UserError(f"{path} is not JSON; restore it or make the artifact again") from error
    manifest = _parse(path, record)
    if kind is not None and manifest.kind != kind:
        raise UserError(f"{folder} is of kind {manifest.kind}, not {kind}; name a folder of kind {kind}")
    return manifest


def check_files(folder: Path) -> Manifest:
    """Hash every file of an artifact again and return its manifest.

    Raises what `read_manifest` raises, and IntegrityError naming the first file, in the order of their names,
    that is missing, not listed, of another size, or different.
    """
    manifest = read_manifest(folder)
    present = set(list_files(folder))
    for name in sorted(present | manifest.files.keys()):
        path = folder / name
        if name not in manifest.files:
            raise IntegrityError(f"{path} is not listed in {folder / MANIFEST}; take it out of the artifact")
        if name not in present:
            raise IntegrityError(f"{path} is missing; restore it or make the artifact again")
        expected = manifest.files[name]
        expected.require(FileEntry.of(path, expected.digest[0]), path)
    return manifest


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Look whether every file of an artifact is there and as long as listed, which is quick.

    Raises IntegrityError naming the first that is not.
    """
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise IntegrityError(f"{path} is missing; restore it or make the artifact again")
        entry.require(replace(entry, bytes=path.stat().st_size), path)


def list_files(folder: Path) -> list[str]:
    """Return the paths of an artifact's files, relative to its folder, sorted.

    Its own manifest is left out, and so are folders below that have one: they are artifacts of their own.
    """
    found: list[str] = []
    for place, below, files in os.walk(folder):
        here = Path(place)
        below[:] = [name for name in below if not (here / name / MANIFEST).is_file()]
        paths = (here / name for name in files)
        found += [path.relative_to(folder).as_posix() for path in paths if path != folder / MANIFEST]
    return sorted(found)


@functools.cache
def _version() -> str:
    try:
        return importlib.metadata.version("unbraid")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that was not installed
        return "uninstalled"


def _parse(path: Path | str, record: Any) -> Manifest:
    """Turn parsed JSON into a Manifest, refusing a newer schema, a wrong id and a wrong shape."""
    if not isinstance(record, dict):
        raise IntegrityError(f"{path} is not a manifest; restore it or make the artifact again")
    fields = cast("dict[str, Any]", record)
    if isinstance(schema := fields.get("schema"), int) and schema > SCHEMA:
        raise UserError(f"{path} has schema {schema}, newer than this unbraid reads; upgrade unbraid")
    hashed = {key: value for key, value in fields.items() if key != "paths"}
    try:
        matches = content_id(hashed) == fields.get("id")
    except ValueError:  # NaN, or text that is not Unicode
        matches = False
    if not matches:
        raise IntegrityError(
            f"{path} was changed: its id does not match its content; restore it or make the artifact again"
        )
    try:
        manifest = Manifest(
            kind=_text(fields["kind"]),
            schema=int(fields["schema"]),
            made_by=MadeBy(**fields["made_by"]),
            inputs={name: _text(value) for name, value in fields["inputs"].items()},
            files={_inside(name): FileEntry(**entry) for name, entry in fields["files"].items()},
            facts=dict(fields["facts"]),
            id=_text(fields["id"]),
            paths={k: _text(v) for k, v in fields["paths"].items()} if "paths" in fields else None,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise IntegrityError(
            f"{path} lacks a field or has a wrong one ({error}); make the artifact again"
        ) from error
    return manifest


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, found {value!r}")
    return value


def _inside(name: str) -> str:
    # A manifest from elsewhere must not make us read outside its folder.
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts:
        raise ValueError(f"{name!r} is no path inside the folder")
    return name
