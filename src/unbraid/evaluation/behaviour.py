"""What the model loses when an activation is replaced: cross-entropy and KL divergence of its next tokens.

CE is the mean over scored tokens of −log p(next token), in nats; KL that of KL(clean ‖ replaced). Tokens are
scored where neither the token nor the next is BOS, EOS or PAD. The replacements are `sae` (x̂), `zero` (0) and
`mean` (E x, the ablation that keeps what all tokens share); `DEFINITIONS` has the formulas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from unbraid.activations.corpus import BLOCKS
from unbraid.evaluation.definitions import Definition, Undefined
from unbraid.manifest.errors import UserError
from unbraid.stats.bootstrap import Interval, bootstrap_ratio

_CE = "CE = E[−log p(next)] over tokens where neither it nor the next is special"
_KL = "KL = E[KL(clean‖replaced)] over tokens where neither it nor the next is special"
_ABLATED = "at all tokens that are reconstructed"

DEFINITIONS: Mapping[str, Definition] = {
    "delta_ce": Definition(
        "cross-entropy it costs the model, nats a token", f"CE_sae−CE_clean; {_CE}", "lower"
    ),
    "recovered_zero": Definition(
        "loss recovered against zeroing the site; flatters, as zeroing breaks a model",
        f"(CE_zero−CE_sae)/(CE_zero−CE_clean); {_CE}; zero {_ABLATED}",
        "higher",
    ),
    "recovered_mean": Definition(
        "loss recovered against putting the mean there, the stricter of the two",
        f"(CE_mean−CE_sae)/(CE_mean−CE_clean); {_CE}; E x {_ABLATED}",
        "higher",
    ),
    "kl_sae": Definition("divergence of the next-token distribution, nats", f"KL_sae; {_KL}", "lower"),
    "kl_score_zero": Definition(
        "divergence avoided, against zeroing the site", f"(KL_zero−KL_sae)/KL_zero; {_KL}", "higher"
    ),
    "kl_score_mean": Definition(
        "divergence avoided, against putting the mean there", f"(KL_mean−KL_sae)/KL_mean; {_KL}", "higher"
    ),
    "ce_clean": Definition("cross-entropy of the model as it is", f"CE_clean; {_CE}"),
    "ce_sae": Definition("with the reconstruction in place", f"CE_sae; {_CE}", "lower"),
    "ce_zero": Definition("with zeros in place", f"CE_zero; {_CE}"),
    "ce_mean": Definition("with the mean in place", f"CE_mean; {_CE}"),
    "kl_zero": Definition("divergence with zeros in place", f"KL_zero; {_KL}"),
    "kl_mean": Definition("divergence with the mean in place", f"KL_mean; {_KL}"),
}


class Behaviour:
    """Running sums over scored tokens, kept apart by block of documents."""

    def __init__(self, replacements: Sequence[str]) -> None:
        """`replacements` are zero and mean, and a name for every autoencoder."""
        names = ["tokens", "ce_clean", *(f"{k}_{name}" for name in replacements for k in ("ce", "kl"))]
        self.sums = {name: torch.zeros(BLOCKS, dtype=torch.float64) for name in names}

    def add(self, values: Mapping[str, Tensor], blocks: Tensor) -> None:
        """Add what `scoring.score` gives, each (n,), with the block (n,) of each token."""
        self.sums["tokens"].index_add_(0, blocks, torch.ones(len(blocks), dtype=torch.float64))
        for name, value in values.items():
            self.sums[name].index_add_(0, blocks, value)

    def metrics(self, sae: str, seed: int, resamples: int = 2000) -> dict[str, Interval | Undefined]:
        """The metrics of `DEFINITIONS` by name, for the autoencoder that `replacements` calls `sae`.

        Raises UserError when no token could be scored.
        """
        used = self.sums["tokens"] > 0
        if not used.any():
            raise UserError("the text has no two ordinary tokens in a row to score; give another --text")
        sums = {name: value[used].numpy() for name, value in self.sums.items()}
        units = np.arange(int(used.sum()))

        def ratio(
            above: str, below: str = "tokens", *, less: str | None = None, base: str | None = None
        ) -> Interval | Undefined:
            """(above − less) / (below − base), each a sum over the units."""
            top = sums[above] - (sums[less] if less else 0)
            bottom = sums[below] - (sums[base] if base else 0)
            if bottom.sum() == 0:
                return Undefined("the ablation changes nothing, so there is nothing to recover")
            found = bootstrap_ratio(top, bottom, units, seed, resamples)
            return found if less or base else found.within(0)

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
            "kl_zero": ratio("kl_zero"),
            "kl_mean": ratio("kl_mean"),
        }
