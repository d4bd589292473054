"""What a structure artifact says, as the overview and a latent's page show it."""

from __future__ import annotations

import os
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from unbraid.features.structure import WIDER_INDEX, Structure
from unbraid.ui.shelf import Shelf, Source

MOST_POINTS = 3000
"""Latents drawn on a map; of more, so many at random."""
MOST_GROUPS = 40
"""Clusters that are listed, the largest first."""
COLOURS = 5
"""Clusters that have a colour of their own on the map."""


def overview(source: Source) -> dict[str, Any] | None:
    """Kinds, the largest clusters of the coarsest level, and the map; None without a structure."""
    structure = source.structure
    if structure is None:
        return None
    groups, points, alive = _drawn(structure.folder)
    labels = source.labels.current([point["latent"] for point in points])
    named = [
        point | {"name": f"{j}: {labels[j].text}" if (j := point["latent"]) in labels else f"latent {j}"}
        for point in points
    ]
    some = (
        "All latents that fire"
        if len(points) == alive
        else f"{len(points):,} of {alive:,} latents, at random"
    )
    return {
        "id": structure.manifest.id,
        "kinds": structure.manifest.facts["kinds"],
        "how": structure.manifest.facts["map"],
        "note": f"{some}, placed by {structure.manifest.facts['map']}; the largest groups have colours.",
        "groups": groups,
        "points": named,
    }


@lru_cache(maxsize=8)
def _drawn(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """The largest groups, the points of the map, and how many latents have a place; it never changes."""
    structure = Structure(folder)
    rows = [row for row in structure.table("clusters").to_pylist() if row["level"] == 0]
    rows.sort(key=lambda row: (-row["size"], row["cluster"]))
    groups = [
        {"latent": row["cluster"], "size": row["size"], "tokens": row["tokens"]} for row in rows[:MOST_GROUPS]
    ]
    colour = {group["latent"]: number + 1 for number, group in enumerate(groups[:COLOURS])}
    table = structure.table("latents")
    placed = np.flatnonzero(np.isfinite(table["x"].to_numpy().astype(np.float64)))
    drawn = placed
    if len(placed) > MOST_POINTS:
        drawn = np.sort(np.random.default_rng(0).choice(placed, MOST_POINTS, replace=False))
    points = [
        {
            "latent": row["latent"],
            "x": row["x"],
            "y": row["y"],
            "group": colour.get(row["clusters"][0], 0) if row["clusters"] else 0,
        }
        for row in table.take(drawn).to_pylist()
    ]
    return groups, points, len(placed)


def place(shelf: Shelf, source: Source, latent: int) -> dict[str, Any] | None:
    """A latent's kinds, clusters, opposites and what it was split into; None without a structure.

    `wider` says of which index or autoencoder the parts are, and where it is.
    """
    structure = source.structure
    if structure is None:
        return None
    found = asdict(structure.of(latent))
    found["antonyms"] = [{"latent": j, "cosine": cosine} for j, cosine in found["antonyms"]]
    found["children"] = [{"latent": j, "cosine": cosine} for j, cosine in found["children"]]
    inputs, paths = structure.manifest.inputs, structure.manifest.paths or {}
    found["wider"] = {}
    for parts, name, what, number in (
        ("children", "wider", "sae", "latent"),
        ("contained", WIDER_INDEX, "index", "child"),
    ):
        if name in inputs:
            other = shelf.of(what, inputs[name])
            found["wider"][parts] = {
                "id": inputs[name],
                "name": other.name if other else None,
                "url": f"/i/{other.key}" if other else None,
                "path": os.path.normpath(structure.folder / paths[name]) if name in paths else None,
            }
            for part in found[parts]:
                part["url"] = f"/i/{other.key}/latents/{part[number]}" if other else None
    return found
