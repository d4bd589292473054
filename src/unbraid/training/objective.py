"""The losses: reconstruction, the auxiliary loss that revives dead latents, and ReLU's penalty.

All are means per token and dimension of centred activations whose mean square is 1, so the reconstruction
loss is the fraction of variance unexplained, whatever the model's scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unbraid.sae.base import SAE
from unbraid.sae.codes import CHUNK_ROWS, SparseCodes, decode, top_k_pre_activations


@dataclass(frozen=True, eq=False)
class StepReport:
    """What one batch showed."""

    squared_error: Tensor
    """Σ ‖x − x̂‖² over the batch, a scalar."""
    fired: Tensor
    """Whether each latent fired in the batch, (d_sae,) booleans."""
    active: Tensor
    """Latents fired, summed over the batch's tokens, a scalar."""


def backward_sparse(sae: SAE, x: Tensor, dead: Tensor, auxk_alpha: float) -> StepReport:
    """Add the gradients of reconstruction and auxiliary loss on a batch x (n, d_in), for TopK and BatchTopK.

    dead: (d_sae,) booleans. AuxK (Gao et al. 2024, arXiv 2406.04093, section A.2): the d_in / 2 dead
    latents that come closest to firing are to reconstruct what the live ones left over.
    """
    codes = sae.encode(x)
    error = x - sae.decode(codes)
    squared_error = error.square().sum()
    loss = squared_error / x.numel()
    latents = dead.nonzero().squeeze(1)
    if auxk_alpha and len(latents):
        loss = loss + auxk_alpha * _auxiliary(sae, x, error.detach(), latents)
    loss.backward()
    return _report(squared_error, codes, sae.config.d_sae)


def _auxiliary(sae: SAE, x: Tensor, error: Tensor, latents: Tensor) -> Tensor:
    """Unexplained share of the error when `latents` describe it; weighs less where they are few."""
    k = max(1, sae.config.d_in // 2)
    weight = min(1.0, len(latents) / k)
    centred = sae.centred(x)
    values, indices = top_k_pre_activations(
        centred, sae.W_enc, sae.b_enc, min(k, len(latents)), among=latents
    )
    left = error - decode(SparseCodes(indices, values.relu()), sae.W_dec)
    return weight * left.square().sum() / error.square().sum().clamp(min=1e-12)


def backward_dense(sae: SAE, x: Tensor, penalty: float) -> StepReport:
    """Add the gradients of reconstruction and L1 penalty on a batch x (n, d_in), for ReLU.

    Most latents have a gradient at most tokens early on, so this is dense, but for few rows at a time.
    """
    fired = torch.zeros(sae.config.d_sae, dtype=torch.bool, device=x.device)
    squared_error, active = x.new_zeros(()), x.new_zeros((), dtype=torch.int64)
    for rows in x.split(CHUNK_ROWS):
        codes = sae.pre_activations(rows).relu()
        error = (rows - (codes @ sae.W_dec + sae.b_dec)).square().sum()
        loss = (error + penalty * (codes @ sae.W_dec.norm(dim=1)).sum()) / x.numel()
        loss.backward()
        with torch.no_grad():
            squared_error = squared_error + error
            fired |= (codes > 0).any(dim=0)
            active = active + (codes > 0).sum()
    return StepReport(squared_error, fired, active)


def _report(squared_error: Tensor, codes: SparseCodes, d_sae: int) -> StepReport:
    on = codes.values.detach() > 0
    fired = torch.zeros(d_sae, dtype=torch.bool, device=on.device)
    fired[codes.indices[on]] = True
    return StepReport(squared_error.detach(), fired, on.sum())
