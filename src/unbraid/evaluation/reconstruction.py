"""Reconstruction and sparsity, summed up in float64 as activations stream by, with intervals by document.

x is an activation, x̂ its reconstruction, f its code, and E the mean over tokens; `DEFINITIONS` has the
formulas.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unbraid.activations.corpus import BLOCKS
from unbraid.evaluation.definitions import Definition, Undefined
from unbraid.sae.base import SAEOutput
from unbraid.stats.bootstrap import Interval, bootstrap_ratio, bootstrap_unexplained

RUN = 2048
"""Tokens that follow each other, in the documents' order, whose mean `ev_legacy` takes for x̄."""

DEFINITIONS: Mapping[str, Definition] = {
    "l0": Definition("latents that fire at a token", "E[#f≠0]"),
    "l1": Definition("sum of a token's latents", "E[Σ|f|]"),
    "mse": Definition("squared error, summed over dimensions", "E‖x−x̂‖²", "lower"),
    "fvu": Definition(
        "share of the variance (about the mean) left unexplained",
        "E‖x−x̂‖² / (E‖x‖²−‖E x‖²) over all tokens",
        "lower",
    ),
    "ev_legacy": Definition(
        "explained variance as older tables have it, for comparison with these alone",
        f"E[1−‖x−x̂‖²/‖x−x̄‖²], x̄ the mean of each {RUN} tokens that follow each other in the documents' order",
        "higher",
    ),
    "cosine": Definition(
        "cosine of activation and reconstruction",
        "E[x·x̂/(‖x‖‖x̂‖)], 0 where one of the two is 0 and the other not, 1 where both are",
        "higher",
    ),
    "norm_in": Definition("length of the activation", "E‖x‖"),
    "norm_out": Definition("length of the reconstruction", "E‖x̂‖"),
    "l2_ratio": Definition(
        "length of the reconstruction over that of the activation; below 1 where it shrinks",
        "E[‖x̂‖/‖x‖], tokens with x = 0 left out",
    ),
    "bias": Definition("1 where the reconstruction's size is unbiased", "E‖x̂‖² / E[x·x̂]"),
}

_BOUNDS = {"cosine": (-1.0, 1.0), "legacy": (-np.inf, 1.0), "square_hat": (-np.inf, np.inf)}
"""Between which numbers a metric over these sums has to lie; the others cannot be negative."""
_SUMS = ("tokens", "l0", "l1", "error", "square", "square_hat", "product", "cosine", "norm_in", "norm_out",
         "sized", "ratio", "legacy_tokens", "legacy")  # fmt: skip


class Reconstruction:
    """Running sums over tokens, kept apart by block of documents."""

    def __init__(self, d_in: int) -> None:
        self.sums = {name: torch.zeros(BLOCKS, dtype=torch.float64) for name in _SUMS}
        self.sum_x = torch.zeros(BLOCKS, d_in, dtype=torch.float64)

    @torch.no_grad()
    def add(self, x: Tensor, output: SAEOutput, blocks: Tensor, spread: Tensor) -> None:
        """Add activations x (n, d_in), their codes and reconstructions, the block (n,) of each, and its
        squared distance from the mean of its run (n,)."""
        x, x_hat, blocks = x.double().cpu(), output.x_hat.double().cpu(), blocks.cpu()
        square, square_hat = (x * x).sum(dim=1), (x_hat * x_hat).sum(dim=1)
        product = (x * x_hat).sum(dim=1)
        norm_in, norm_out = square.sqrt(), square_hat.sqrt()
        both, rest = norm_in * norm_out, (x - x_hat)
        error = (rest * rest).sum(dim=1)
        neither = ((square == 0) & (square_hat == 0)).double()
        sized, spreads = square > 0, spread > 0
        values = {
            "tokens": torch.ones_like(error),
            "l0": output.codes.l0().double().cpu(),
            "l1": output.codes.values.abs().double().sum(dim=1).cpu(),
            "error": error,
            "square": square,
            "square_hat": square_hat,
            "product": product,
            "cosine": torch.where(both > 0, product / both.clamp(min=1e-300), neither),
            "norm_in": norm_in,
            "norm_out": norm_out,
            "sized": sized.double(),
            "ratio": torch.where(sized, norm_out / norm_in.clamp(min=1e-300), 0.0),
            "legacy_tokens": spreads.double(),
            "legacy": torch.where(spreads, 1 - error / spread.clamp(min=1e-300), 0.0),
        }
        for name, value in values.items():
            self.sums[name].index_add_(0, blocks, value)
        self.sum_x.index_add_(0, blocks, x)

    @property
    def mean(self) -> Tensor:
        """E x, shape (d_in,), float64."""
        return self.sum_x.sum(dim=0) / self.sums["tokens"].sum()

    def metrics(self, seed: int, resamples: int = 2000) -> dict[str, Interval | Undefined]:
        """The metrics of `DEFINITIONS`, by name."""
        used = self.sums["tokens"] > 0
        sums = {name: value[used].numpy() for name, value in self.sums.items()}
        units = np.arange(int(used.sum()))

        def mean(above: str, below: str = "tokens", why: str = "") -> Interval | Undefined:
            if sums[below].sum() == 0:
                return Undefined(why)
            found = bootstrap_ratio(sums[above], sums[below], units, seed, resamples)
            return found.within(*_BOUNDS.get(above, (0.0, np.inf)))

        return {
            "l0": mean("l0"),
            "l1": mean("l1"),
            "mse": mean("error"),
            "fvu": _fvu(sums, self.sum_x[used].numpy(), seed, resamples),
            "ev_legacy": mean("legacy", "legacy_tokens", "the activations do not vary"),
            "cosine": mean("cosine"),
            "norm_in": mean("norm_in"),
            "norm_out": mean("norm_out"),
            "l2_ratio": mean("ratio", "sized", "all activations are 0"),
            "bias": mean("square_hat", "product", "the reconstructions have no part along the activations"),
        }


def _fvu(
    sums: dict[str, NDArray[np.float64]], sum_x: NDArray[np.float64], seed: int, resamples: int
) -> Interval | Undefined:
    n, square = sums["tokens"].sum(), sums["square"].sum()
    if square - (sum_x.sum(axis=0) ** 2).sum() / n <= 1e-12 * square:  # rounding is all that is left
        return Undefined("the activations do not vary")
    found = bootstrap_unexplained(sums["error"], sums["square"], sum_x, sums["tokens"], seed, resamples)
    return found.within(0)
