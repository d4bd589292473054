"""What a direction in the residual stream says to the vocabulary, read through the final norm's scale."""

from __future__ import annotations

import torch
from torch import Tensor

from unbraid.model.load import LanguageModel


@torch.no_grad()
def norm_weight(final_norm: torch.nn.Module | None, d_in: int) -> tuple[Tensor, bool]:
    """Scale (d_in,) that a final norm multiplies by, and whether it also subtracts the mean.

    The norm is asked rather than looked into, so a LayerNorm, an RMSNorm and an RMSNorm that stores its
    weight minus one are all read right: an input of mean zero and mean square one passes a norm unscaled.
    """
    if final_norm is None:
        return torch.ones(d_in), False
    reference = next(final_norm.parameters(), torch.zeros(1))
    probe = torch.ones(d_in, dtype=torch.float64)
    probe[1::2] = -1.0
    if d_in % 2:
        angles = torch.tensor([0.2, 0.2 + 2 * torch.pi / 3, 0.2 + 4 * torch.pi / 3], dtype=torch.float64)
        probe[-3:] = 2**0.5 * torch.cos(angles)
    inputs = torch.stack([probe, -probe, torch.ones_like(probe)]).to(reference.device, reference.dtype)
    plus, minus, constant = final_norm(inputs[None])[0].double().cpu()
    scale = (plus - minus) / 2 / probe
    bias = (plus + minus) / 2
    centred = bool((constant - bias).abs().max() < 0.5 * scale.abs().max())
    return scale.float(), centred


@torch.no_grad()
def direct_effects(lm: LanguageModel, directions: Tensor) -> Tensor:
    """Effect of each direction (n, d) on the logit of each output token, (n, vocab), float32 on the CPU.

    directions · diag(final norm weight) · W_U, with the mean taken out first where the norm does so (logit
    lens; nostalgebraist, 2020).
    """
    weight, centred = norm_weight(lm.layout.final_norm, lm.d_in)
    directions = directions.float().cpu()
    if centred:
        directions = directions - directions.mean(dim=1, keepdim=True)
    return (directions * weight) @ lm.unembedding.float().cpu()
