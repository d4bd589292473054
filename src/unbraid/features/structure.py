"""The structure of a dictionary: kinds of latents, clusters, antonyms, a map, and what splits in a wider one.

An artifact of kind "structure", made from an index and the autoencoder's weights.  Everything in it is a
function of these, the settings and the seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from unbraid.features.page import Index
from unbraid.features.structure_clusters import Clustering, cluster
from unbraid.features.structure_contained import Part, contained
from unbraid.features.structure_geometry import antonyms, children, map_of
from unbraid.features.structure_kinds import Kinds, kinds_of
from unbraid.manifest.errors import UserError
from unbraid.manifest.files import building
from unbraid.manifest.record import Manifest, check_sizes, read_manifest, write_manifest
from unbraid.sae.base import SAE


@dataclass(frozen=True)
class StructureConfig:
    """What counts as what."""

    kinds: Kinds = field(default_factory=Kinds)
    """Thresholds of dense, position-bound and single-token latents."""
    levels: tuple[float, ...] = (0.1, 0.25, 0.5)
    """Mean Jaccard indices of firings at which clusters are cut, the coarsest first."""
    antonym: float = -0.7
    """Decoder cosine from which on down two latents are antonyms."""
    child: float = 0.5
    """Decoder cosine from which on up a latent of a wider autoencoder may be a part of one."""
    children: int = 10
    """Parts listed of each latent at most, by direction and by firing."""
    contained: float = 0.8
    """Share of the firings of a part that lie within the whole at least, at the lower end of its interval."""
    support: int = 20
    """Sampled tokens that a part fires on at least."""
    compared: int = 200_000
    """Wider decoders are not compared with themselves for antonyms: that takes width² · d_in steps."""
    spread: int = 12_000
    """Of so many live latents at most the map is t-SNE's; of more it is their two principal components."""
    seed: int = 0
    """Seed of the map."""

    def __post_init__(self) -> None:
        if list(self.levels) != sorted(set(self.levels)) or not all(0 < level < 1 for level in self.levels):
            raise UserError("levels must rise and lie between 0 and 1")
        if not -1 <= self.antonym < 0 or not 0 < self.child <= 1:
            raise UserError("antonym must lie between -1 and 0, and child between 0 and 1")
        if not 0 < self.contained < 1 or self.support < 1:
            raise UserError("contained must lie between 0 and 1, and support be at least 1")


@dataclass(frozen=True)
class Wider:
    """A wider autoencoder of the same site, in which latents may have been split."""

    sae: SAE
    """The autoencoder."""
    id: str
    """Its content id."""


def build_structure(
    index: Index,
    sae: SAE,
    out: Path,
    config: StructureConfig | None = None,
    *,
    wider: Wider | None = None,
    wider_index: Index | None = None,
    command: str = "",
) -> Structure:
    """Write the structure of an index's latents to the folder `out`.

    With `wider` parts are found by direction, with `wider_index`, of the same text, by where they fire.
    Raises UserError when `out` exists, when the autoencoder is not as wide as the index, when the wider one
    does not write to the same space, or when the other index is not of the same tokens.
    """
    config = config or StructureConfig()
    if sae.config.d_sae != index.d_sae:
        raise UserError(
            f"the SAE has {sae.config.d_sae} latents but {index.folder} has {index.d_sae}; name the SAE that "
            "it was made from"
        )
    with building(Path(out)) as folder:
        kinds = kinds_of(index, config.kinds)
        alive = index.densities > 0
        xy, how = map_of(sae, alive, config.spread, config.seed)
        clustering = cluster(index, config.levels)
        pq.write_table(
            pa.table(
                {
                    "latent": pa.array(range(index.d_sae), pa.int32()),
                    "kinds": pa.array(kinds, pa.list_(pa.string())),
                    "x": pa.array(xy[:, 0], pa.float32(), mask=~alive),
                    "y": pa.array(xy[:, 1], pa.float32(), mask=~alive),
                    "clusters": pa.array(clustering.of.tolist(), pa.list_(pa.int32())),
                }
            ),
            folder / "latents.parquet",
        )
        pq.write_table(_clusters(index, clustering, config), folder / "clusters.parquet")
        opposite = antonyms(sae, index, config.antonym) if index.d_sae <= config.compared else None
        pq.write_table(pa.Table.from_pylist(opposite or [], _ANTONYMS), folder / "antonyms.parquet")
        split = [] if wider is None else children(sae, wider.sae, config.child, config.children)
        pq.write_table(pa.Table.from_pylist(split, _CHILDREN), folder / "children.parquet")
        inputs = {"index": index.manifest.id, "sae": index.manifest.inputs["sae"]}
        paths, firing = {"index": index.folder}, None
        if wider_index is not None:
            firing = _write_contained(folder, index, wider_index, config)
            inputs[WIDER_INDEX] = wider_index.manifest.id
            paths[WIDER_INDEX] = wider_index.folder
        write_manifest(
            folder,
            kind="structure",
            command=command,
            seed=config.seed,
            inputs=inputs if wider is None else {**inputs, "wider": wider.id},
            facts={
                "d_sae": index.d_sae,
                "kinds": {name: sum(name in of for of in kinds) for name in KINDS},
                "map": how,
                "antonyms": None if opposite is None else len(opposite),
                "largest_piece": clustering.largest,
                "contained": firing,
                "config": asdict(config),
            },
            paths=paths,
        )
    return Structure(out)


WIDER_INDEX = "wider index"
KINDS = ("dead", "dense", "position-bound", "single-token")
_ANTONYMS = pa.schema(
    {"a": pa.int32(), "b": pa.int32(), "cosine": pa.float32(), "tokens": pa.list_(pa.string())}
)
_CHILDREN = pa.schema({"latent": pa.int32(), "rank": pa.int16(), "child": pa.int32(), "cosine": pa.float32()})
_CONTAINED = pa.schema(
    {
        "latent": pa.int32(),
        "rank": pa.int16(),
        "child": pa.int32(),
        "together": pa.int64(),
        "firings": pa.int64(),
        "own": pa.int64(),
        "share": pa.float64(),
        "low": pa.float64(),
        "high": pa.float64(),
    }
)
_CLUSTERS = pa.schema(
    {
        "level": pa.int8(),
        "cluster": pa.int32(),
        "parent": pa.int32(),
        "size": pa.int32(),
        "tokens": pa.list_(pa.string()),
    }
)


def _write_contained(folder: Path, index: Index, wider: Index, config: StructureConfig) -> dict[str, int]:
    """The table contained; returns how many tokens were compared, and how many latents have several parts."""
    found, tokens = contained(
        index, wider, bar=config.contained, support=config.support, dense=config.kinds.dense
    )
    rows = [
        {"latent": latent, "rank": rank, **vars(part)}
        for latent in sorted(found)
        for rank, part in enumerate(found[latent][: config.children])
    ]
    pq.write_table(pa.Table.from_pylist(rows, _CONTAINED), folder / "contained.parquet")
    return {
        "tokens": tokens,
        "parts": sum(map(len, found.values())),
        "split": sum(len(parts) > 1 for parts in found.values()),
    }


def _clusters(index: Index, found: Clustering, config: StructureConfig) -> Any:
    """A row for each cluster of two and more, with the tokens that most of its latents fire on most."""
    first = {
        row["latent"]: row["token"]
        for row in index.query("SELECT latent, arg_max(token, firings) AS token FROM tokens GROUP BY latent")
    }
    rows: list[Mapping[str, Any]] = []
    for level in range(len(config.levels)):
        for name, members in found.members(level).items():
            tokens: dict[str, int] = {}
            for latent in members:
                if latent in first:
                    word = index.vocabulary[first[latent]][0]
                    tokens[word] = tokens.get(word, 0) + 1
            most = sorted(tokens, key=lambda word: (-tokens[word], word))[:5]
            parent = int(found.of[members[0], level - 1]) if level else None
            rows.append(
                {"level": level, "cluster": name, "parent": parent, "size": len(members), "tokens": most}
            )
    return pa.Table.from_pylist(rows, _CLUSTERS)


@dataclass(frozen=True)
class Place:
    """What the structure says of one latent."""

    latent: int
    """Its number."""
    kinds: tuple[str, ...]
    """Which of dead, dense, position-bound and single-token it is."""
    x: float | None
    """Where it is on the map; None for a dead latent."""
    y: float | None
    """The same."""
    clusters: tuple[int, ...]
    """Its cluster at each level, named by the lowest latent in it; itself where it is alone."""
    antonyms: tuple[tuple[int, float], ...]
    """Latents with the opposite decoder direction, and the cosine."""
    children: tuple[tuple[int, float], ...]
    """Latents of the wider autoencoder that point the same way, and the cosine."""
    contained: tuple[Part, ...] = ()
    """Latents of the wider autoencoder that fire almost only where this one does."""


class Structure:
    """A structure folder.  Raises UserError when the folder holds none, and IntegrityError when one of its
    files is missing or not as long as it was."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.manifest: Manifest = read_manifest(self.folder, kind="structure")
        check_sizes(self.folder, self.manifest)

    def table(self, name: str) -> Any:
        """One of the tables latents, clusters, antonyms, children and, with a wider index, contained."""
        return pq.read_table(self.folder / f"{name}.parquet")

    @cached_property
    def latents(self) -> list[dict[str, Any]]:
        """A row for each latent: latent, kinds, x, y, clusters."""
        return self.table("latents").to_pylist()

    @cached_property
    def _pairs(self) -> dict[str, dict[int, list[tuple[int, float]]]]:
        found: dict[str, dict[int, list[tuple[int, float]]]] = {"antonyms": {}, "children": {}}
        for row in self.table("antonyms").to_pylist():
            for a, b in ((row["a"], row["b"]), (row["b"], row["a"])):
                found["antonyms"].setdefault(a, []).append((b, row["cosine"]))
        for row in self.table("children").to_pylist():
            found["children"].setdefault(row["latent"], []).append((row["child"], row["cosine"]))
        return found

    @cached_property
    def _contained(self) -> dict[int, list[Part]]:
        found: dict[int, list[Part]] = {}
        if WIDER_INDEX in self.manifest.inputs:
            for row in self.table("contained").to_pylist():
                latent, _ = row.pop("latent"), row.pop("rank")
                found.setdefault(latent, []).append(Part(**row))
        return found

    def of(self, latent: int) -> Place:
        """What is known of one latent; raises UserError when there is no such latent."""
        if not 0 <= latent < len(self.latents):
            raise UserError(f"latent {latent} does not exist; there are latents 0 to {len(self.latents) - 1}")
        row = self.latents[latent]
        return Place(
            latent,
            tuple(row["kinds"]),
            row["x"],
            row["y"],
            tuple(row["clusters"]),
            tuple(self._pairs["antonyms"].get(latent, ())),
            tuple(self._pairs["children"].get(latent, ())),
            tuple(self._contained.get(latent, ())),
        )

    def kind(self, name: str) -> list[int]:
        """The latents of a kind; raises UserError for a kind that there is not."""
        if name not in KINDS:
            raise UserError(f"there is no kind {name!r}; kinds are {', '.join(KINDS)}")
        return [row["latent"] for row in self.latents if name in row["kinds"]]
