"""Reconstruction and sparsity, summed up in float64 as activations stream by, with intervals by document.

With x an activation, x̂ its reconstruction, f its code, and E the mean over tokens:

================ =====================================================================================
l0               E[number of latents that fire]
mse              E‖x − x̂‖², summed over dimensions
fvu              E‖x − x̂‖² / (E‖x‖² − ‖E x‖²): the variance is about the mean, over all tokens
ev_legacy        E[1 − ‖x − x̂‖² / ‖x − x̄‖²], x̄ the mean of the token's own batch; for old tables alone
l2_ratio         E[‖x̂‖ / ‖x‖]; below 1 where the autoencoder shrinks
bias             E‖x̂‖² / E[x·x̂]; 1 where reconstructions are unbiased in size
dead             share of the latents that never fired over all tokens
dense_1, _10     share of the latents that fire on more than 1 % and 10 % of the tokens
================ =====================================================================================
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unbraid.activations.corpus import BLOCKS
from unbraid.sae.base import SAEOutput
from unbraid.stats.bootstrap import Interval, bootstrap_ratio, rate

NAMES = ("tokens", "l0", "error", "square", "square_hat", "product", "ratio", "legacy")


class Reconstruction:
    """Running sums over tokens, kept apart by block of documents."""

    def __init__(self, d_in: int, d_sae: int) -> None:
        self.sums = {name: torch.zeros(BLOCKS, dtype=torch.float64) for name in NAMES}
        self.sum_x = torch.zeros(BLOCKS, d_in, dtype=torch.float64)
        self.fired = torch.zeros(d_sae, dtype=torch.int64)

    @torch.no_grad()
    def add(self, x: Tensor, output: SAEOutput, blocks: Tensor) -> None:
        """Add activations x (n, d_in), their codes and reconstructions, and the block (n,) of each."""
        x, x_hat, blocks = x.double().cpu(), output.x_hat.double().cpu(), blocks.cpu()
        error = (x - x_hat).square().sum(dim=1)
        square, square_hat = x.square().sum(dim=1), x_hat.square().sum(dim=1)
        spread = (x - x.mean(dim=0)).square().sum(dim=1)
        values = {
            "tokens": torch.ones_like(error),
            "l0": output.codes.l0().double().cpu(),
            "error": error,
            "square": square,
            "square_hat": square_hat,
            "product": (x * x_hat).sum(dim=1),
            # A zero activation has no direction to shrink along; it counts as reconstructed in size.
            "ratio": torch.where(square > 0, (square_hat / square.clamp(min=1e-300)).sqrt(), 1.0),
            "legacy": 1 - error / spread.clamp(min=1e-300),
        }
        for name, value in values.items():
            self.sums[name].index_add_(0, blocks, value)
        self.sum_x.index_add_(0, blocks, x)
        indices = output.codes.indices[output.codes.values > 0]
        self.fired += torch.bincount(indices, minlength=len(self.fired)).cpu()

    @property
    def mean(self) -> Tensor:
        """E x, shape (d_in,), float64."""
        return self.sum_x.sum(dim=0) / self.sums["tokens"].sum()

    def metrics(self, seed: int, resamples: int = 2000) -> dict[str, Interval]:
        """The table at the top of the file, by name."""
        used = self.sums["tokens"] > 0
        sums = {name: value[used].numpy() for name, value in self.sums.items()}
        units = np.arange(int(used.sum()))

        def mean(above: str, below: str = "tokens") -> Interval:
            return bootstrap_ratio(sums[above], sums[below], units, seed, resamples)

        share = self.fired.numpy() / sums["tokens"].sum()
        return {
            "l0": mean("l0"),
            "mse": mean("error"),
            "fvu": _fvu(sums, self.sum_x[used].numpy(), seed, resamples),
            "ev_legacy": mean("legacy"),
            "l2_ratio": mean("ratio"),
            "bias": mean("square_hat", "product") if sums["product"].sum() != 0 else _nothing(len(units)),
            "dead": rate(share == 0),
            "dense_1": rate(share > 0.01),
            "dense_10": rate(share > 0.10),
        }


def _nothing(n: int) -> Interval:
    """The bias of an autoencoder that puts out nothing along x: no size at all."""
    return Interval(0.0, 0.0, 0.0, n)


def _fvu(
    sums: dict[str, NDArray[np.float64]], sum_x: NDArray[np.float64], seed: int, resamples: int
) -> Interval:
    """The ratio of error to variance; each resample has a mean of its own, so it is no ratio of sums."""

    def value(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """For weights (r, blocks) of the blocks, the ratio of each resample (r,)."""
        n = weights @ sums["tokens"]
        mean = (weights @ sum_x) / n[:, None]
        variance = weights @ sums["square"] / n - (mean**2).sum(axis=1)
        return (weights @ sums["error"] / n) / np.maximum(variance, 1e-300)

    blocks = len(sums["tokens"])
    drawn = np.random.default_rng(seed).multinomial(blocks, np.full(blocks, 1 / blocks), size=resamples)
    low, high = np.quantile(value(drawn.astype(np.float64)), [0.025, 0.975])
    return Interval(float(value(np.ones((1, blocks)))[0]), float(low), float(high), blocks)
