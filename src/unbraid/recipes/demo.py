"""The practice world's own prompts for an audit of the practice assistant."""

from __future__ import annotations

from collections.abc import Mapping

from unbraid.practice.corpus import benign, red_team
from unbraid.recipes.prompts import Records, Source, Split

SIZES: Mapping[str, int] = {"fit": 900, "select": 300, "test": 800}
"""Red-team probes, and as many benign prompts, that the practice world gives to each split."""


def practice_prompts(seed: int, sizes: Mapping[str, int] = SIZES) -> Source:
    """Prompts of the practice world, in its own held-out splits; `sizes` of them in each, of either kind."""

    def source(split: Split) -> tuple[Records, Records]:
        n = sizes[split]
        return [c.probe() for c in red_team(split, n, seed=seed)], [
            c.probe() for c in benign(split, n, seed=seed)
        ]

    return source
