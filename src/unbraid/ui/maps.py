"""What a structure artifact says, as the overview and a latent's page show it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from unbraid.ui.library import Source

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
    table = structure.table("latents")
    x, y = (table[name].to_numpy().astype(np.float64) for name in ("x", "y"))
    clusters = table["clusters"].to_pylist()
    groups = _groups(source)
    colour = {group["latent"]: number + 1 for number, group in enumerate(groups[:COLOURS])}
    placed = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    drawn = placed
    if len(placed) > MOST_POINTS:
        drawn = np.sort(np.random.default_rng(0).choice(placed, MOST_POINTS, replace=False))
    labels = source.labels.current(drawn.tolist())
    points = [
        {
            "latent": j,
            "x": float(x[j]),
            "y": float(y[j]),
            "group": colour.get(clusters[j][0], 0) if clusters[j] else 0,
            "name": f"{j}: {labels[j].text}" if j in labels else f"latent {j}",
        }
        for j in drawn.tolist()
    ]
    some = (
        f"{len(points):,} of {len(placed):,} latents, drawn at random" if len(points) < len(placed) else "All"
    )
    return {
        "id": structure.manifest.id,
        "kinds": structure.manifest.facts["kinds"],
        "how": structure.manifest.facts["map"],
        "note": f"{some} by {structure.manifest.facts['map']}; colours are the largest groups.",
        "groups": groups,
        "points": points,
    }


def _groups(source: Source) -> list[dict[str, Any]]:
    assert source.structure is not None
    rows = [row for row in source.structure.table("clusters").to_pylist() if row["level"] == 0]
    rows.sort(key=lambda row: (-row["size"], row["cluster"]))
    return [
        {"latent": row["cluster"], "size": row["size"], "tokens": row["tokens"]} for row in rows[:MOST_GROUPS]
    ]


def place(source: Source, latent: int) -> dict[str, Any] | None:
    """A latent's kinds, clusters, opposites and what it was split into; None without a structure."""
    if source.structure is None:
        return None
    found = asdict(source.structure.of(latent))
    found["antonyms"] = [{"latent": j, "cosine": cosine} for j, cosine in found["antonyms"]]
    found["children"] = [{"latent": j, "cosine": cosine} for j, cosine in found["children"]]
    return found
