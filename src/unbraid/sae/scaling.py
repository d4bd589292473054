"""How activations are centred and scaled for training; the autoencoder folds both into its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Scaling:
    """(x − mean) · scale, with a mean square of 1 per dimension, for each of the sites in x by itself."""

    mean: Tensor
    """Mean activation, or 0 where it is left in, (d,)."""
    scale: Tensor
    """1 / root mean square of a centred activation's entries, constant over a site's dimensions, (d,)."""
    unit: float
    """The mean of the sites' scales, in which latents are measured."""

    def __call__(self, x: Tensor) -> Tensor:
        """Scaled activations of x, shape (n, d)."""
        return (x - self.mean) * self.scale

    def to(self, device: torch.device) -> Scaling:
        """The same on a device."""
        return Scaling(self.mean.to(device), self.scale.to(device), self.unit)

    def uncentred(self) -> Scaling:
        """The same scale alone."""
        return replace(self, mean=torch.zeros_like(self.mean))

    @classmethod
    def of(cls, x: Tensor, blocks: Sequence[int]) -> Scaling | None:
        """Measured on activations x (n, d) in float64, sites of `blocks` dimensions side by side; None where
        all activations of a site are the same.
        """
        x = x.double()
        mean = x.mean(dim=0)
        spreads = [float(part.square().mean()) for part in (x - mean).split(list(blocks), dim=1)]
        if 0 in spreads:
            return None
        scales = [spread**-0.5 for spread in spreads]
        scale = torch.cat([torch.full((d,), s) for d, s in zip(blocks, scales, strict=True)])
        return cls(mean.float(), scale, sum(scales) / len(scales))
