"""What kind of latent each is: dead, dense, bound to a position or to a single token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq

from unbraid.features.page import Index
from unbraid.manifest.errors import UserError


@dataclass(frozen=True)
class Kinds:
    """Thresholds; a latent with fewer than `fewest` firings is neither position-bound nor single-token."""

    dense: float = 0.1
    """Dense: fires on more than this share of tokens."""
    token: float = 0.9
    """Single-token: so large a share of its firings is on one token of the vocabulary."""
    position: float = 0.9
    """Position-bound: so large a share of its firings is on positions 0 to 3 of a window …"""
    odds: float = 10.0
    """… with so many times the odds that firings of all latents have to be there, for texts may be short."""
    fewest: int = 20
    """Firings from which on shares say something."""

    def __post_init__(self) -> None:
        for name in ("dense", "token", "position"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1")


OCTAVES = 3
"""Of positions: 0, 1 and 2–3 count as early."""


def kinds_of(index: Index, thresholds: Kinds) -> list[list[str]]:
    """The kinds of each latent, often none."""
    columns = ["count", "density", "position_octaves"]
    table = pq.read_table(index.folder / "latents.parquet", columns=columns)
    count, density = table["count"].to_numpy(), table["density"].to_numpy()
    early = np.zeros(index.d_sae)
    for row, octaves in enumerate(table["position_octaves"].to_pylist()):
        early[row] = sum(octaves[:OCTAVES])
    enough = count >= thresholds.fewest
    share = early / np.maximum(count, 1)
    usual = early.sum() / max(count.sum(), 1)
    rather = share * (1 - usual) > thresholds.odds * usual * (1 - share)  # a ratio of odds, without division
    bound = enough & (share >= thresholds.position) & rather
    most = np.zeros(index.d_sae)
    for row in index.query("SELECT latent, max(firings) AS most FROM tokens GROUP BY latent"):
        most[row["latent"]] = row["most"]
    single = enough & (most >= thresholds.token * count)
    marks = {
        "dead": count == 0,
        "dense": density > thresholds.dense,
        "position-bound": bound,
        "single-token": single,
    }
    return [[name for name, of in marks.items() if of[j]] for j in range(index.d_sae)]
