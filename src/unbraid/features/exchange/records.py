"""What Neuronpedia and SAEDashboard both say of a feature, from an index; what is not known is null.

Lists that these tools compute from neurons, which an index has no part in, are empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unbraid.features.page import Example, LatentPage
from unbraid.sae.base import SAE

TOP_GROUP = -1.0
"""Stands for the group of the strongest examples where others have their interval."""
NEURONS = (
    "neuron_alignment_indices",
    "neuron_alignment_values",
    "neuron_alignment_l1",
    "correlated_neurons_indices",
    "correlated_neurons_pearson",
    "correlated_neurons_l1",
)


@dataclass(frozen=True)
class Shown:
    """An example with the group that it stands in."""

    example: Example
    """Its tokens and activations."""
    low: float
    """Least activation of the group; TOP_GROUP for the strongest."""
    high: float
    """Where it ends; the largest activation of all for the strongest."""
    contains: float
    """Share of the firings that are in the group; TOP_GROUP for the strongest."""

    @property
    def at(self) -> int:
        """Where among its tokens the firing is that put it there."""
        return self.example.position - self.example.start


def shown(page: LatentPage) -> list[Shown]:
    """The examples of a page: the strongest, then those of each interval of equal width, strongest first."""
    found = [Shown(example, TOP_GROUP, page.max, TOP_GROUP) for example in page.top]
    for group in reversed(page.intervals):
        found += [Shown(example, group.low, group.high, group.share) for example in group.examples]
    return found


def feature(page: LatentPage) -> dict[str, Any]:
    """Statistics of a latent under the names that both formats use."""
    heights, values = _bars(page.histogram, 0.0, page.histogram_top)
    logits = page.logits
    logit_heights, logit_values = _bars(logits.counts, logits.low, logits.high) if logits else ([], [])
    return {
        **{name: [] for name in NEURONS},
        "neg_str": [effect.token for effect in page.suppressed],
        "neg_values": [effect.logit for effect in page.suppressed],
        "pos_str": [effect.token for effect in page.promoted],
        "pos_values": [effect.logit for effect in page.promoted],
        "frac_nonzero": page.density,
        "freq_hist_data_bar_heights": heights,
        "freq_hist_data_bar_values": values,
        "logits_hist_data_bar_heights": logit_heights,
        "logits_hist_data_bar_values": logit_values,
        "decoder_weights_dist": [],
    }


def _bars(counts: tuple[int, ...], low: float, high: float) -> tuple[list[int], list[float]]:
    """Heights and middles of a histogram's bars; none where nothing was counted."""
    if not sum(counts):
        return [], []
    edges = np.linspace(low, high, len(counts) + 1).tolist()
    return list(counts), [(a + b) / 2 for a, b in pairwise(edges)]


def vector(sae: SAE, latent: int) -> list[float]:
    """The decoder row of a latent."""
    row: NDArray[np.float32] = sae.W_dec[latent].detach().float().cpu().numpy()
    return row.tolist()
