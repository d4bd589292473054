"""How often and how strongly each latent fires: exact counts, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unbraid.evaluation.definitions import Definition, Undefined
from unbraid.sae.codes import SparseCodes
from unbraid.stats.bootstrap import Interval, bootstrap_ratio, rate


def _dense(percent: int, of: str) -> str:
    return f"share of {of}: of latents that fire at more than {percent} % of the tokens"


DEFINITIONS: Mapping[str, Definition] = {
    "dead": Definition(
        "share of the latents that never fired here", "share of latents with f = 0 at all tokens", "lower"
    ),
    "dense_1": Definition(
        "share of the latents that fire on more than 1 % of the tokens", _dense(1, "latents"), "lower"
    ),
    "dense_10": Definition(
        "share of the latents that fire on more than 10 % of the tokens", _dense(10, "latents"), "lower"
    ),
    "dense_share_1": Definition(
        "share of all firings that latents on more than 1 % of the tokens have", _dense(1, "firings"), "lower"
    ),
    "dense_share_10": Definition(
        "share of all firings that latents on more than 10 % of the tokens have",
        _dense(10, "firings"),
        "lower",
    ),
}
LOWEST, HIGHEST, A_DOUBLING = -24, 24, 4
"""Exponents of two between which activations are counted, and bins for each; what lies beyond is in the
first or last bin."""


class Latents:
    """Counts over tokens, one for each latent."""

    def __init__(self, d_sae: int) -> None:
        self.tokens = 0
        self.fired = torch.zeros(d_sae, dtype=torch.int64)
        """Tokens at which each latent fires, (d_sae,)."""
        self.windows = torch.zeros(d_sae, dtype=torch.int64)
        """Windows in which each fires at least once, (d_sae,)."""
        self.total = torch.zeros(d_sae, dtype=torch.float64)
        """Sum of each latent's activations, (d_sae,)."""
        self.largest = torch.zeros(d_sae)
        """Each latent's highest activation, (d_sae,)."""
        self.histogram = torch.zeros((HIGHEST - LOWEST) * A_DOUBLING, dtype=torch.int64)
        """Firings by strength: bin i holds activations from `edges()[i]` up to the next edge."""

    @staticmethod
    def edges() -> NDArray[np.float64]:
        """The bins' edges, one more than there are bins."""
        return 2.0 ** (LOWEST + np.arange((HIGHEST - LOWEST) * A_DOUBLING + 1) / A_DOUBLING)

    @torch.no_grad()
    def add(self, codes: SparseCodes, rows: Tensor) -> None:
        """Add the codes of n tokens; rows (n,) numbers the window of each, from 0."""
        indices, values = codes.indices.cpu(), codes.values.float().cpu()
        self.tokens += len(indices)
        firing = values != 0
        latents, values = indices[firing], values[firing]
        d_sae = len(self.fired)
        self.fired += torch.bincount(latents, minlength=d_sae)
        self.total.index_add_(0, latents, values.double())
        self.largest.scatter_reduce_(0, latents, values, "amax")
        seen = torch.zeros(int(rows.max()) + 1 if len(rows) else 0, d_sae, dtype=torch.bool)
        seen[rows[:, None].expand(firing.shape)[firing], latents] = True
        self.windows += seen.sum(dim=0)
        bins = ((values.abs().log2() - LOWEST) * A_DOUBLING).floor().long()
        bins = bins.clamp(0, len(self.histogram) - 1)
        self.histogram += torch.bincount(bins, minlength=len(self.histogram))

    @property
    def density(self) -> NDArray[np.float64]:
        """Share of the tokens at which each latent fires, (d_sae,)."""
        return self.fired.numpy() / self.tokens

    def metrics(self, seed: int, resamples: int = 2000) -> dict[str, Interval | Undefined]:
        """The metrics of `DEFINITIONS`, by name; shares of firings are drawn again by latent."""
        density, fired = self.density, self.fired.double().numpy()
        found: dict[str, Interval | Undefined] = {
            "dead": rate(density == 0),
            "dense_1": rate(density > 0.01),
            "dense_10": rate(density > 0.10),
        }
        for name, bar in (("dense_share_1", 0.01), ("dense_share_10", 0.10)):
            found[name] = Undefined("no latent fires")
            if fired.any():
                dense = np.where(density > bar, fired, 0.0)
                share = bootstrap_ratio(dense, fired, np.arange(len(fired)), seed, resamples)
                found[name] = share.within(0, 1)
        return found
