"""What a decoder direction says to the vocabulary: the output tokens that it promotes and suppresses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unbraid.model.load import LanguageModel
from unbraid.sae.base import SAE


@dataclass(frozen=True)
class TokenEffect:
    """An output token and how far one unit of a latent moves its logit, up to the final norm's scale."""

    token: str
    """The token as text."""
    logit: float
    """Direct effect on the logit, in logits a unit of activation at norm scale one."""


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
def logit_effects(sae: SAE, lm: LanguageModel, latents: Sequence[int]) -> Tensor:
    """Direct effect of each latent on each output token: (n,) -> (n, vocab), float32 on the CPU.

    W_dec[j] · diag(final norm weight) · W_U, with the mean taken out first where the norm does so (logit
    lens; nostalgebraist, 2020).
    """
    weight, centred = norm_weight(lm.layout.final_norm, lm.d_in)
    directions = sae.W_dec.detach()[list(latents)].float().cpu()  # (n, d_in)
    if centred:
        directions = directions - directions.mean(dim=1, keepdim=True)
    return (directions * weight) @ lm.unembedding.float().cpu()


def promoted_and_suppressed(
    sae: SAE, lm: LanguageModel, latents: Sequence[int], *, tokens: int = 10
) -> list[tuple[tuple[TokenEffect, ...], tuple[TokenEffect, ...]]]:
    """For each latent its `tokens` most promoted and most suppressed output tokens, strongest first."""
    effects = logit_effects(sae, lm, latents)
    tokens = min(tokens, effects.shape[1])
    highest, lowest = effects.topk(tokens, dim=1), (-effects).topk(tokens, dim=1)
    result: list[tuple[tuple[TokenEffect, ...], tuple[TokenEffect, ...]]] = []
    for row in range(len(effects)):
        up = zip(highest.indices[row].tolist(), highest.values[row].tolist(), strict=True)
        down = zip(lowest.indices[row].tolist(), lowest.values[row].tolist(), strict=True)
        result.append(
            (
                tuple(TokenEffect(piece(lm, token), float(logit)) for token, logit in up),
                tuple(TokenEffect(piece(lm, token), -float(logit)) for token, logit in down),
            )
        )
    return result


def piece(lm: LanguageModel, token: int) -> str:
    """One token as text; a lone byte of a longer character shows as the replacement sign."""
    return str(lm.tokenizer.decode([token]))
