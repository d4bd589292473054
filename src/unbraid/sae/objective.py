"""What every objective shares: what it is told about the step, what it reports, AuxK for dead latents.

All losses are means per token and dimension of centred targets whose mean square is 1, so the
reconstruction loss is the fraction of variance unexplained (FVU), whatever the model's scale. An
architecture's own terms are added by its file: see `base.SAE.backward` and `elementwise.ElementwiseSAE`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unbraid.sae.codes import SparseCodes, decode, top_k_pre_activations


@dataclass(frozen=True, eq=False)
class StepContext:
    """What an objective needs to know besides the batch and its own options."""

    dead: Tensor
    """Latents that have not fired for long, (d_sae,) booleans."""
    ramp: float = 1.0
    """Factor on sparsity penalties, rising from 0 to 1 over the warm-up."""
    auxk_alpha: float = 0.0
    """Weight of AuxK, for the architectures that fix how many latents fire."""


@dataclass(frozen=True, eq=False)
class StepReport:
    """What one batch showed."""

    squared_error: Tensor
    """Σ ‖target − reconstruction‖² over the batch, a scalar."""
    fired: Tensor
    """Whether each latent fired in the batch, (d_sae,) booleans."""
    active: Tensor
    """Latents fired, summed over the batch's tokens, a scalar."""

    @classmethod
    def of(cls, error: Tensor, codes: SparseCodes, d_sae: int) -> StepReport:
        """The report of sparse codes and what they left unexplained, error (n, d_out)."""
        on = codes.values.detach() > 0
        fired = torch.zeros(d_sae, dtype=torch.bool, device=on.device)
        fired[codes.indices[on]] = True
        return cls(error.detach().square().sum(), fired, on.sum())


def auxk(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, error: Tensor, latents: Tensor) -> Tensor:
    """Share of the error that the dead latents do not explain, a scalar; weighs less where they are few.

    Gao et al. 2024, arXiv 2406.04093, section A.2: the d_out / 2 dead latents that come closest to firing
    are to reconstruct what the live ones left over. x: (n, d_in), what W_enc multiplies; error: (n,
    d_out), a constant; latents: indices of the dead ones.
    """
    k = max(1, error.shape[1] // 2)
    weight = min(1.0, len(latents) / k)
    values, indices = top_k_pre_activations(x, W_enc, b_enc, min(k, len(latents)), among=latents)
    left = error - decode(SparseCodes(indices, values.relu()), W_dec)
    return weight * left.square().sum() / error.square().sum().clamp(min=1e-12)
