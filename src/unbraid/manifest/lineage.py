"""Walking what was made from what: every file, every id, every link, and that splits share no document."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unbraid.manifest.errors import IntegrityError, UserError
from unbraid.manifest.files import PARTIAL
from unbraid.manifest.progress import Progress
from unbraid.manifest.record import MANIFEST, Manifest, check_files, read_manifest
from unbraid.manifest.remote import Remote, is_url

SPLIT_DOCUMENTS = "documents.txt"


@dataclass(frozen=True)
class Artifact:
    """One artifact that was looked at."""

    path: str
    """Its folder, relative to the one that was verified."""
    kind: str
    """What it is; "unreadable" when its manifest is."""
    id: str
    """Its content id; empty when its manifest is unreadable."""
    problem: str | None = None
    """What does not fit in the artifact itself, or None."""


@dataclass(frozen=True)
class LineageReport:
    """What `verify` found."""

    artifacts: tuple[Artifact, ...]
    """Every artifact below the folder, and inputs outside it that their users point to, by path."""
    problems: tuple[str, ...]
    """One sentence for each thing that does not fit; empty when all does."""
    external: dict[str, str]
    """Inputs that no artifact here is, such as a model's weights: id by name."""

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "artifacts": [asdict(artifact) for artifact in self.artifacts],
            "problems": list(self.problems),
            "external": self.external,
        }


def verify(root: Path | str, *, progress: Progress | None = None) -> LineageReport:
    """Check every artifact below `root`: its id, its files, the ids of its inputs, and the splits.

    Folders that are still being built (`.partial`) are passed over. An input that lies outside `root` is
    followed where the manifest says it lived and checked like the rest. A URL is that of one artifact, whose
    files are hashed as they come. Raises UserError when `root` is no folder or holds no artifact.
    """
    if is_url(root):
        return _verify_url(root, progress)
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; name one that holds artifacts")
    waiting = list(_folders(root))
    if not waiting:
        raise UserError(f"no {MANIFEST} lies below {root}; name a folder that holds artifacts")

    artifacts: list[Artifact] = []
    manifests: dict[Path, Manifest] = {}
    seen = {folder.resolve() for folder in waiting}
    for done, folder in enumerate(waiting, start=1):  # the list grows while inputs outside `root` are found
        shown = Path(os.path.relpath(folder, root)).as_posix()
        try:
            manifest = read_manifest(folder)
        except (UserError, IntegrityError) as error:
            artifacts.append(Artifact(path=shown, kind="unreadable", id="", problem=str(error)))
            continue
        manifests[folder] = manifest
        try:
            check_files(folder)
            problem = None
        except (IntegrityError, OSError) as error:
            problem = str(error)
        artifacts.append(Artifact(path=shown, kind=manifest.kind, id=manifest.id, problem=problem))
        for outside in _inputs_on_disk(folder, manifest).values():
            if outside.resolve() not in seen:
                seen.add(outside.resolve())
                waiting.append(outside)
        if progress is not None:
            progress(done, len(waiting), shown)

    broken_links, external = _follow_inputs(manifests)
    own = [artifact.problem for artifact in artifacts if artifact.problem is not None]
    return LineageReport(
        artifacts=tuple(sorted(artifacts, key=lambda artifact: artifact.path)),
        problems=(*own, *broken_links, *_shared_documents(manifests)),
        external=external,
    )


def _verify_url(url: str, progress: Progress | None) -> LineageReport:
    remote = Remote(url)
    manifest = remote.manifest()
    problem: str | None = None
    try:
        remote.check_all(manifest, progress)
    except IntegrityError as error:
        problem = str(error)
    return LineageReport(
        artifacts=(Artifact(path=".", kind=manifest.kind, id=manifest.id, problem=problem),),
        problems=() if problem is None else (problem,),
        external=manifest.inputs,
    )


def _folders(root: Path) -> Iterator[Path]:
    """Every folder with a manifest, from the top down and in the order of their names."""
    for folder, below, files in os.walk(root):
        below[:] = sorted(name for name in below if not name.endswith(PARTIAL))
        if MANIFEST in files:
            yield Path(folder)


def _inputs_on_disk(folder: Path, manifest: Manifest) -> dict[str, Path]:
    """Where an artifact's inputs lived, as far as artifacts lie there now, by name."""
    places = {name: folder / relative for name, relative in (manifest.paths or {}).items()}
    return {name: place for name, place in places.items() if (place / MANIFEST).is_file()}


def _follow_inputs(manifests: dict[Path, Manifest]) -> tuple[list[str], dict[str, str]]:
    """Compare each input id with the artifacts that were read; what matches none comes back as external."""
    by_id = {manifest.id for manifest in manifests.values()}
    by_place = {folder.resolve(): manifest for folder, manifest in manifests.items()}
    problems: list[str] = []
    external: dict[str, str] = {}
    for folder, manifest in manifests.items():
        places = _inputs_on_disk(folder, manifest)
        for name, wanted in manifest.inputs.items():
            place = places.get(name)
            there = by_place.get(place.resolve()) if place is not None else None
            if there is not None and there.id != wanted:
                found = os.path.normpath(places[name])
                problems.append(
                    f"{folder} was made from {name} {wanted[:12]}…, but {found} is now "
                    f"{there.id[:12]}…; restore that input or make {folder.name} again"
                )
            elif wanted not in by_id:
                free = external.get(name, wanted) == wanted
                external[name if free else f"{name} of {folder.name}"] = wanted
    return problems, external


def _shared_documents(manifests: dict[Path, Manifest]) -> list[str]:
    """Name each pair of differently named splits that have a document in common."""
    splits: list[tuple[str, Path, set[str]]] = []
    for folder, manifest in manifests.items():
        listing = folder / SPLIT_DOCUMENTS
        if isinstance(split := manifest.facts.get("split"), str) and listing.is_file():
            splits.append((split, folder, set(listing.read_text(errors="replace").split())))
    problems: list[str] = []
    for number, (split, folder, documents) in enumerate(splits):
        for other, other_folder, other_documents in splits[:number]:
            common = documents & other_documents
            if split != other and common:
                problems.append(
                    f"{folder / SPLIT_DOCUMENTS} (split {split}) shares {len(common)} document(s) with "
                    f"{other_folder / SPLIT_DOCUMENTS} (split {other}), first {min(common)[:16]}; "
                    "splits must be disjoint, make them again"
                )
    return problems
