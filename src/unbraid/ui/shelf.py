"""What lies in a folder: indexes, and the autoencoders, findings and structures that belong to them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from unbraid.causal.finding import Finding, load_finding
from unbraid.features.exchange.neuronpedia import SOURCE_SET, layer_of
from unbraid.features.labels.store import Labels
from unbraid.features.page import Index
from unbraid.features.search import Search
from unbraid.features.structure import Structure
from unbraid.manifest.errors import IntegrityError, UserError
from unbraid.manifest.files import PARTIAL
from unbraid.manifest.record import MANIFEST, Manifest, read_manifest

KEY_DIGITS = 12
"""Hexadecimal digits of an index's content id that name it in links."""
MOST_NAMED = 5
"""Indexes that are named where none is found."""
MOST_FOLDERS = 20_000
"""Folders that are looked into."""


class NotFoundError(UserError):
    """There is no such index, latent, list or file; its page is a 404."""


@dataclass(frozen=True, eq=False)
class FoundFinding:
    """A finding that belongs to an index's autoencoder."""

    id: str
    """Content id."""
    folder: Path
    """Where it lies."""
    latents: tuple[int, ...]
    """The latents that it is about."""

    @cached_property
    def finding(self) -> Finding:
        """The finding, its files checked."""
        return load_finding(self.folder)


@dataclass(frozen=True, eq=False)
class Source:
    """One index with what belongs to it."""

    index: Index
    """The index."""
    name: str
    """Its folder, relative to the one that is browsed."""
    sae_folder: Path | None = None
    """Where its autoencoder lies; None where it was not found."""
    findings: tuple[FoundFinding, ...] = ()
    """Findings on its autoencoder's latents."""
    structures: tuple[Path, ...] = ()
    """Folders of kind structure that were made from it."""

    @property
    def key(self) -> str:
        """The first digits of its content id: links with it hold wherever the folder lies."""
        return self.index.manifest.id[:KEY_DIGITS]

    @property
    def site(self) -> str:
        """The site that it is about."""
        return str(self.index.manifest.facts["site"])

    @property
    def model_name(self) -> str:
        """What people call its model."""
        return str(self.index.manifest.facts["model_name"])

    @property
    def exported_as(self) -> str:
        """The source's id in what `unbraid export` writes where nothing else is said."""
        return f"{layer_of(self.site)}-{SOURCE_SET}"

    @property
    def sae_id(self) -> str:
        """Content id of its autoencoder."""
        return self.index.manifest.inputs["sae"]

    @cached_property
    def labels(self) -> Labels:
        """Labels, reviews and lists that lie beside it."""
        return Labels.of_index(self.index)

    @cached_property
    def structure(self) -> Structure | None:
        """Its clusters, kinds and map, where they were made."""
        return Structure(self.structures[0]) if self.structures else None

    @cached_property
    def search(self) -> Search:
        """All ways to search it."""
        return Search(self.index, self.labels)

    def check(self, latent: int) -> int:
        """The latent's number; raises NotFoundError where there is no such latent."""
        if not 0 <= latent < self.index.d_sae:
            raise NotFoundError(
                f"latent {latent} does not exist; this index holds latents 0 to {self.index.d_sae - 1}"
            )
        return latent


@dataclass(frozen=True)
class Shelf:
    """Everything that can be browsed below one folder."""

    folder: Path
    """The folder."""
    sources: tuple[Source, ...]
    """Its indexes, by name."""
    problems: tuple[str, ...] = field(default=())
    """One sentence for each artifact that could not be read."""

    @classmethod
    def open(cls, folder: Path | str) -> Shelf:
        """Look for artifacts by their manifests; raises UserError where `folder` holds no index."""
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder; name an index, or a folder in which some lie")
        found: list[tuple[Path, Manifest]] = []
        problems: list[str] = []
        for place in _folders(folder):
            try:
                found.append((place, read_manifest(place)))
            except (UserError, IntegrityError) as error:
                problems.append(str(error))
        sources: list[Source] = []
        for place, manifest in found:
            if manifest.kind == "index":
                try:
                    sources.append(_source(folder, place, manifest, found))
                except (UserError, IntegrityError) as error:
                    problems.append(str(error))
        if not sources:
            more = f" ({problems[0]})" if problems else ""
            raise UserError(f"{folder} holds no index{more}; make one with `unbraid index`")
        return cls(folder, tuple(sorted(sources, key=lambda s: s.name)), tuple(problems))

    def source(self, key: str) -> Source:
        """The index that a link names; raises NotFoundError where there is none."""
        for source in self.sources:
            if len(key) >= KEY_DIGITS and source.index.manifest.id.startswith(key):
                return source
        raise NotFoundError(f"there is no index {key[:64]!r} here; the first page lists those that there are")

    def of(self, what: str, id: str) -> Source | None:
        """The index whose own content id, or whose autoencoder's (`what`: index or sae), is this one; of
        several the first by name."""
        own = {"index": lambda s: s.index.manifest.id, "sae": lambda s: s.sae_id}[what]
        return next((source for source in self.sources if own(source) == id), None)

    def named(self, model: str, layer: str) -> Source:
        """The index of a model (by its name) at a site, or with a key, a folder name, or the source's id that
        `unbraid export` gives it.

        Raises NotFoundError where there is none, and UserError where there are several.
        """
        found = [
            source
            for source in self.sources
            if model in (source.model_name, source.key)
            and layer in (source.site, source.key, source.name, source.exported_as)
        ]
        if not found:
            there = "; ".join(f"{s.model_name!r} at {s.site!r}" for s in self.sources[:MOST_NAMED])
            raise NotFoundError(f"there is no index of {model[:64]!r} at {layer[:64]!r} here, but of {there}")
        if len(found) > 1:
            keys = ", ".join(source.key for source in found)
            raise UserError(
                f"several indexes are of {model[:64]} at {layer[:64]}; name one of {keys} instead"
            )
        return found[0]


def _folders(folder: Path) -> Iterator[Path]:
    for seen, (place, below, files) in enumerate(os.walk(folder)):
        below[:] = sorted(name for name in below if not name.startswith(".") and not name.endswith(PARTIAL))
        if MANIFEST in files:
            yield Path(place)
        if seen >= MOST_FOLDERS:
            raise UserError(f"{folder} holds more than {MOST_FOLDERS:,} folders; name one of them")


def _source(root: Path, place: Path, manifest: Manifest, found: list[tuple[Path, Manifest]]) -> Source:
    sae = manifest.inputs["sae"]
    named = place / (manifest.paths or {}).get("sae", "")
    candidates = [other for other, m in found if m.kind == "sae" and m.id == sae]
    findings = [
        FoundFinding(m.id, other, tuple(int(j) for j in m.facts.get("latents", ())))
        for other, m in found
        if m.kind == "finding" and m.inputs.get("sae") == sae
    ]
    return Source(
        index=Index(place),
        name=place.relative_to(root).as_posix() if place != root else place.resolve().name,
        sae_folder=next(iter(candidates), named if named != place and named.exists() else None),
        findings=tuple(sorted(findings, key=lambda f: f.folder)),
        structures=tuple(
            other for other, m in found if m.kind == "structure" and m.inputs.get("index") == manifest.id
        ),
    )
