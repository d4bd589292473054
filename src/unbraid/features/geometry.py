"""What a decoder direction says to the vocabulary: the output tokens that it promotes and suppresses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from unbraid.model.load import LanguageModel
from unbraid.model.unembed import direct_effects
from unbraid.sae.base import SAE


@dataclass(frozen=True)
class TokenEffect:
    """An output token and how far one unit of a latent moves its logit, up to the final norm's scale."""

    token: str
    """The token as text."""
    logit: float
    """Direct effect on the logit, in logits a unit of activation at norm scale one."""


def logit_effects(sae: SAE, lm: LanguageModel, latents: Sequence[int]) -> Tensor:
    """Direct effect of each latent on each output token: (n,) -> (n, vocab), float32 on the CPU."""
    return direct_effects(lm, sae.W_dec.detach()[list(latents)])


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
