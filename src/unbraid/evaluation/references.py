"""What a number is compared with: reconstructions that took no training, with the autoencoder's L0 as k.

`untrained` has its architecture and width, as training would start, and the L0 that this gives; `pca` keeps
the k principal components of the very activations that are measured, so no linear map of that rank does
better; `neurons` keeps the k coordinates that are farthest from their mean; `directions` projects on k random
directions; `mean` says E x of everything, which is to predict nothing. The last four add E x, and count as
L0 = k, `mean` as 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from unbraid.sae.base import SAE, SAEOutput
from unbraid.sae.codes import SparseCodes
from unbraid.sae.registry import build
from unbraid.training.run import first_weights

Reference = Literal["untrained", "pca", "neurons", "directions", "mean"]
REFERENCES: tuple[Reference, ...] = get_args(Reference)
Reconstruct = Callable[[Tensor], SAEOutput]


def projection(mean: Tensor, basis: Tensor) -> Reconstruct:
    """Reconstruct x as mean + (x − mean) BᵀB, for orthonormal rows B (k, d)."""

    def reconstruct(x: Tensor) -> SAEOutput:
        values = (x - mean) @ basis.T
        indices = torch.arange(len(basis), device=x.device).expand(values.shape)
        return SAEOutput(mean + values @ basis, SparseCodes(indices, values.abs()))

    return reconstruct


def coordinates(mean: Tensor, k: int) -> Reconstruct:
    """Reconstruct x as its mean but for the k coordinates that are farthest from it."""

    def reconstruct(x: Tensor) -> SAEOutput:
        far, indices = (x - mean).abs().topk(k, dim=1)
        x_hat = mean.expand(x.shape).scatter(1, indices, x.gather(1, indices))
        return SAEOutput(x_hat, SparseCodes(indices, far))

    return reconstruct


def random_basis(d: int, k: int, seed: int) -> Tensor:
    """k random orthonormal rows, (k, d)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, k, generator=generator, dtype=torch.float64)).Q.T.float()


@torch.no_grad()
def untrained(sae: SAE, sample: Tensor, seed: int) -> SAE:
    """An autoencoder of the same configuration, as training starts; sample (n, d_in) sets its scale."""
    fresh = build(sae.config)
    fresh.initialise(sample, sample, first_weights(seed))
    return fresh.requires_grad_(False)
