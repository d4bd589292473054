"""What a decoder direction says to the vocabulary: the output tokens that it promotes and suppresses."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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


def strongest(
    lm: LanguageModel, effects: Tensor, tokens: int, sign: int
) -> tuple[list[list[str]], list[list[float]]]:
    """For each row of effects (n, vocab) its `tokens` highest, or lowest where sign is −1: as text, and how
    high."""
    found = (effects * sign).topk(min(tokens, effects.shape[1]), dim=1)
    words = [[piece(lm, token) for token in row] for row in found.indices.tolist()]
    return words, (found.values * sign).tolist()


def promoted_and_suppressed(
    sae: SAE, lm: LanguageModel, latents: Sequence[int], *, tokens: int = 10
) -> list[tuple[tuple[TokenEffect, ...], tuple[TokenEffect, ...]]]:
    """For each latent its `tokens` most promoted and most suppressed output tokens, strongest first."""
    effects = logit_effects(sae, lm, latents)
    both = [
        [tuple(map(TokenEffect, *row)) for row in zip(*strongest(lm, effects, tokens, sign), strict=True)]
        for sign in (1, -1)
    ]
    return list(zip(*both, strict=True))


_pieces: weakref.WeakKeyDictionary[Any, dict[int, str]] = weakref.WeakKeyDictionary()


def piece(lm: LanguageModel, token: int) -> str:
    """One token as text; a lone byte of a longer character shows as the replacement sign."""
    known = _pieces.setdefault(lm.tokenizer, {})
    if token not in known:
        known[token] = str(lm.tokenizer.decode([token]))
    return known[token]
