"""Matryoshka JumpReLU: JumpReLU whose first latents reconstruct on their own too, at several nested widths.

    loss = 1/M Σ_m ‖x − (f_{<w_m} W_dec_{<w_m} + b_dec)‖² + λ S(p, θ) + …,   w_1 < … < w_M = d_sae

f, p: (n, d_sae) and the terms of sparsity and of dead latents are `jumprelu`'s, the nested widths
`matryoshka`'s. Both together: McDougall et al. 2025, "Gemma Scope 2", technical paper. A threshold of its own
for every latent is worth more here than one for all: general latents fire at other strengths than special
ones (benchmarks/RESULTS.md, "synthetic"). Used and saved as JumpReLU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from torch import Tensor

from unbraid.sae.base import SAEConfig
from unbraid.sae.codes import SparseCodes, decode
from unbraid.sae.elementwise import Entries
from unbraid.sae.jumprelu import JumpReLUOptions, JumpReLUSAE
from unbraid.sae.matryoshka import MatryoshkaOptions, halved_widths, nested_error, nested_widths
from unbraid.sae.options import EDGE


@dataclass(frozen=True)
class MatryoshkaJumpReLUOptions(MatryoshkaOptions, JumpReLUOptions):
    """JumpReLU's options and Matryoshka's."""

    __pydantic_config__ = EDGE


class MatryoshkaJumpReLUSAE(JumpReLUSAE):
    """Sparse by threshold, with latents in an order, from general to special."""

    Options = MatryoshkaJumpReLUOptions
    options: MatryoshkaJumpReLUOptions  # pyright: ignore[reportIncompatibleVariableOverride]
    training_only = True

    def __init__(self, config: SAEConfig) -> None:
        super().__init__(config)
        self.widths = nested_widths(self.options.widths or halved_widths(config.d_sae), config.d_sae)

    def squared_error(
        self, entries: Entries, codes: Tensor, x: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The mean over widths, and the error of all latents together."""

        def part(low: int, high: int) -> Tensor:
            if entries.latents is None:
                return codes[:, low:high] @ self.W_dec[low:high]
            # Entries below their threshold stay, though they add nothing: their gradient moves it.
            within = (entries.latents >= low) & (entries.latents < high)
            return decode(SparseCodes(entries.latents, codes * within), self.W_dec)

        parts = (part(low, high) for low, high in pairwise((0, *self.widths)))
        return nested_error(parts, target - self.b_dec - self.bypass(x))

    def calibrated(self, batches: Sequence[Tensor]) -> JumpReLUSAE:
        """JumpReLU, with the widths on record."""
        metadata = {**self.config.metadata, "matryoshka_widths": list(self.widths)}
        sae = JumpReLUSAE(replace(self.config, architecture="jumprelu", options={}, metadata=metadata))
        sae.load_state_dict(self.state_dict())
        return sae
