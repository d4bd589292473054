"""What the model loses when an activation is replaced: cross-entropy and KL divergence of its next tokens.

CE is the mean over scored tokens of −log p(next token), in nats; KL that of KL(clean ‖ replaced). For the
replacements `sae` (x̂), `zero` (0) and `mean` (E x, the ablation that keeps what all tokens share):

================== ===================================================================================
delta_ce           CE_sae − CE_clean, in nats; the number to look at
recovered_zero     (CE_zero − CE_sae) / (CE_zero − CE_clean); flatters, as zeroing breaks a model
recovered_mean     the same with the mean ablation, the stricter of the two
kl_sae             KL_sae, in nats
kl_score_zero      (KL_zero − KL_sae) / KL_zero, and kl_score_mean
ce_clean, _sae …   the cross-entropies themselves
================== ===================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from unbraid.activations.corpus import BLOCKS, Batch
from unbraid.manifest.errors import UserError
from unbraid.model.load import LanguageModel
from unbraid.model.read import logits_and_sites
from unbraid.model.replace import replaced
from unbraid.model.sites import Site
from unbraid.stats.bootstrap import Interval, bootstrap_ratio

Replacement = Callable[[Tensor], Tensor]


class Behaviour:
    """Running sums over scored tokens, kept apart by block of documents."""

    def __init__(self, lm: LanguageModel, site: Site, replacements: Mapping[str, Replacement]) -> None:
        """`replacements` maps the names zero and mean, and that of every autoencoder, to functions of the
        chosen activations (n, d)."""
        self.lm, self.site, self.replacements = lm, site, replacements
        names = ["tokens", "ce_clean", *(f"{k}_{name}" for name in replacements for k in ("ce", "kl"))]
        self.sums = {name: torch.zeros(BLOCKS, dtype=torch.float64) for name in names}

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """Run a batch clean and under each replacement."""
        if not batch.scored.any():
            return
        blocks = batch.blocks[:, None].expand(batch.scored.shape)[batch.scored]
        targets = batch.input_ids[:, 1:][batch.scored]
        clean = self._log_probabilities(batch)
        self._sum("tokens", torch.ones(len(targets)), blocks)
        self._sum("ce_clean", _cross_entropy(clean, targets), blocks)
        for name, function in self.replacements.items():
            with replaced(self.lm, self.site, function, batch.chosen):
                new = self._log_probabilities(batch)
            self._sum(f"ce_{name}", _cross_entropy(new, targets), blocks)
            self._sum(f"kl_{name}", _divergence(clean, new), blocks)

    def _log_probabilities(self, batch: Batch) -> Tensor:
        """Log-probabilities of the next token at the scored tokens, (n, vocabulary)."""
        logits, _ = logits_and_sites(self.lm, batch.input_ids, batch.attention_mask)
        return logits[:, :-1][batch.scored.to(logits.device)].float().log_softmax(dim=-1)

    def _sum(self, name: str, values: Tensor, blocks: Tensor) -> None:
        self.sums[name].index_add_(0, blocks, values.double().cpu())

    def metrics(self, sae: str, seed: int, resamples: int = 2000) -> dict[str, Interval]:
        """The table at the top of the file, by name, for the autoencoder that `replacements` calls `sae`.

        Raises UserError when no token could be scored.
        """
        used = self.sums["tokens"] > 0
        if not used.any():
            raise UserError("the text has no two ordinary tokens in a row to score; give another --text")
        sums = {name: value[used].numpy() for name, value in self.sums.items()}
        units = np.arange(int(used.sum()))

        def ratio(above: str, below: str = "tokens", *, less: str | None = None, base: str | None = None):
            """(above − less) / (below − base), each a sum over the units."""
            top = sums[above] - (sums[less] if less else 0)
            bottom = sums[below] - (sums[base] if base else 0)
            if bottom.sum() == 0:  # the ablation changes nothing, so there is nothing to recover
                return Interval(1.0, 1.0, 1.0, len(units))
            return bootstrap_ratio(top, bottom, units, seed, resamples)

        ce, kl = f"ce_{sae}", f"kl_{sae}"
        return {
            "delta_ce": ratio(ce, less="ce_clean"),
            "recovered_zero": ratio("ce_zero", "ce_zero", less=ce, base="ce_clean"),
            "recovered_mean": ratio("ce_mean", "ce_mean", less=ce, base="ce_clean"),
            "kl_sae": ratio(kl),
            "kl_score_zero": ratio("kl_zero", "kl_zero", less=kl),
            "kl_score_mean": ratio("kl_mean", "kl_mean", less=kl),
            "ce_clean": ratio("ce_clean"),
            "ce_sae": ratio(ce),
            "ce_zero": ratio("ce_zero"),
            "ce_mean": ratio("ce_mean"),
        }


def _cross_entropy(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    """−log p of each target, (n,)."""
    return -log_probabilities.gather(1, targets.to(log_probabilities.device)[:, None]).squeeze(1)


def _divergence(clean: Tensor, new: Tensor) -> Tensor:
    """KL(clean ‖ new) of each row of log-probabilities, (n,), not below 0 by rounding."""
    p = clean.exp()
    # A token that is impossible in both contributes 0, not ∞ − ∞.
    return torch.where(p > 0, p * (clean - new), 0.0).sum(dim=1).clamp(min=0)
