"""After training: how often each latent fires, and what the architecture itself wants to measure.

Measured with the final weights on activations drawn again from the training set.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from unbraid.sae.base import SAE


@dataclass(frozen=True, eq=False)
class Calibration:
    """What a pass over some activations measured."""

    sae: SAE
    """The autoencoder for use: BatchTopK turned into JumpReLU, TopK with its thresholds, others as they
    were."""
    frequency: Tensor
    """Share of the tokens at which each latent fired, (d_sae,) float64."""
    l0: float
    """Mean number of latents that fired."""
    tokens: int
    """Tokens it was measured on."""


@torch.no_grad()
def calibrate(sae: SAE, batches: Iterable[Tensor]) -> Calibration:
    """Measure a trained autoencoder on batches (n, d_in) of the activations it was trained on."""
    given = list(batches)
    ready = sae.calibrated(given)
    counts = torch.zeros(sae.config.d_sae, dtype=torch.float64)
    tokens = 0
    for x in given:
        codes = ready.encode(x)
        counts += torch.bincount(codes.indices[codes.values > 0].flatten(), minlength=len(counts)).cpu()
        tokens += len(x)
    return Calibration(ready, counts / tokens, float(counts.sum()) / tokens, tokens)
