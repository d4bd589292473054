"""The practice world's own prompts for an audit of the practice assistant."""

from __future__ import annotations

from collections.abc import Mapping

from unbraid.practice.corpus import benign, red_team
from unbraid.recipes.prompts import Records, Source, Split

SIZES: Mapping[str, tuple[int, int]] = {"fit": (900, 900), "select": (300, 300), "test": (800, 520)}
"""Red-team probes and benign prompts that the practice world gives to each split."""


def practice_prompts(seed: int, sizes: Mapping[str, tuple[int, int]] = SIZES) -> Source:
    """Prompts of the practice world, in its own held-out splits; `sizes` of either kind in each."""

    def source(split: Split) -> tuple[Records, Records]:
        red, harmless = sizes[split]
        return [c.probe() for c in red_team(split, red, seed=seed)], [
            c.probe() for c in benign(split, harmless, seed=seed)
        ]

    return source
