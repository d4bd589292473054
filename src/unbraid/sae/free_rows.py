"""Decoder rows of any length while an autoencoder trains, for architectures with the option `free_rows`.

They begin short, ‖W_dec[j]‖ = 0.1, with an encoder as short, so that latents which find something grow and
come to the fore. Latents are then better detectors of planted features, and explain less of real activations
(benchmarks/RESULTS.md, "synthetic"). What comes out is the same autoencoder written with rows of unit length:

    W_dec[j] / n_j,   n_j · (W_enc[:, j], b_enc[j], θ_j)   with n_j = ‖W_dec[j]‖
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.options import EDGE
from unbraid.sae.scaling import Scaling

ROW_START = 0.1
"""Length of free decoder rows to begin with."""


@dataclass(frozen=True)
class FreeRowsOptions:
    """What an architecture needs to declare."""

    __pydantic_config__ = EDGE

    free_rows: bool = False
    """Whether decoder rows may have any length while it trains."""


class FreeRows(SAE):
    """An autoencoder whose options have `free_rows`."""

    Options = FreeRowsOptions

    def __init__(self, config: SAEConfig) -> None:
        super().__init__(config)
        self.unit_rows = not self.options.free_rows

    @torch.no_grad()
    def initialise(self, x: Tensor, target: Tensor, generator: torch.Generator) -> None:
        """As every autoencoder, but free rows begin short."""
        super().initialise(x, target, generator)
        if not self.unit_rows:
            self.W_dec *= ROW_START / self.row_norms()[:, None]
            self.W_enc.copy_(self.reading_directions(x, target))

    @torch.no_grad()
    def fold(self, source: Scaling, target: Scaling) -> None:
        """Free rows come to unit length."""
        if not self.unit_rows:
            length = self.row_norms().clamp(min=1e-12)
            self.W_dec /= length[:, None]
            for weight in (self.W_enc, self.b_enc, self.threshold):
                if weight is not None:
                    weight *= length
        super().fold(source, target)

    def calibrated(self, batches: Sequence[Tensor]) -> Self:
        """Its rows are not free any more."""
        return self.with_fixed_rows()

    def with_fixed_rows(self) -> Self:
        """The folded autoencoder without the option."""
        if self.unit_rows:
            return self
        sae = type(self)(replace(self.config, options={**self.config.options, "free_rows": False}))
        sae.load_state_dict(self.state_dict())
        return sae

    @torch.no_grad()
    def revive(self, latents: Tensor, x: Tensor, target: Tensor) -> None:
        """Give revived latents rows of a usual length."""
        usual = self.row_norms().median()
        super().revive(latents, x, target)
        if not self.unit_rows:
            self.W_dec[latents] *= usual
