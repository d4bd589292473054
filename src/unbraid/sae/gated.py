"""Gated: one path decides which latents fire, another, with the same directions, how strongly.

    π = (x − b_dec) W_enc + b_gate,   m = exp(r_mag) · (π − b_gate) + b_mag
    f = ReLU(m) · [π > 0],   x̂ = f W_dec + b_dec
    loss = ‖x − x̂‖² + λ Σ_j ReLU(π_j) + ‖x − (ReLU(π) sg(W_dec) + sg(b_dec))‖²

x: (n, d_in), π, m and f: (n, d_sae), r_mag, b_gate, b_mag: (d_sae,), sg: no gradient. Rajamanoharan et al.
2024, "Improving dictionary learning with gated sparse autoencoders", arXiv 2404.16014. The penalty and the
last term train the gate, which has no gradient through [π > 0]; magnitudes are left unshrunk. `b_enc` is
b_gate here, as π is the pre-activation. As the paper shows, it is a JumpReLU autoencoder with encoder
exp(r_mag) W_enc, bias b_mag and threshold max(0, b_mag − exp(r_mag) b_gate), which is how an Edit reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.elementwise import ElementwiseSAE, Entries
from unbraid.sae.options import EDGE, Weight
from unbraid.sae.scaling import Scaling


@dataclass(frozen=True)
class GatedOptions:
    """How Gated is trained."""

    __pydantic_config__ = EDGE

    l1: Weight = 2.0
    """Weight λ of the penalty on gates."""


class GatedSAE(ElementwiseSAE):
    """Sparse because opening a gate costs, without shrinking what passes it."""

    Options = GatedOptions
    options: GatedOptions
    against_death = "a smaller --set l1"
    latent_axes: ClassVar[Mapping[str, int]] = {**SAE.latent_axes, "r_mag": 0, "b_mag": 0}

    def __init__(self, config: SAEConfig) -> None:
        super().__init__(config)
        self.r_mag = nn.Parameter(torch.zeros(config.d_sae))
        self.b_mag = nn.Parameter(torch.zeros(config.d_sae))

    def activate(self, entries: Entries) -> Tensor:
        """ReLU(m) · [π > 0]."""
        centred = entries.pre - entries.of(self.b_enc)
        magnitude = centred * entries.of(self.r_mag.exp()) + entries.of(self.b_mag)
        return magnitude.relu() * (entries.pre > 0)

    def loss(self, entries: Entries, codes: Tensor, target: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """The penalty, and the error of what the gates alone reconstruct."""
        gates = entries.only_real(entries.pre.relu())
        alone = entries.decode(gates, self.W_dec.detach()) + self.b_dec.detach()
        return self.options.l1 * gates.sum(), (target - alone).square().sum()

    def probe(self, latents: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """The magnitude's direction and bias, and the magnitude above which both paths agree to fire."""
        chosen = list(latents)
        gain = self.r_mag[chosen].double().exp()
        direction, gate, _ = super().probe(latents)  # b_gate and the decoder's bias are in `gate`
        offset = gain * self.b_enc[chosen].double()
        bias = gain * gate - offset + self.b_mag[chosen].double()
        threshold = (self.b_mag[chosen].double() - offset).clamp(min=0)
        return direction * gain[:, None], bias, threshold

    @torch.no_grad()
    def fold(self, source: Scaling, target: Scaling) -> None:
        """Both biases are in the units of the latents, and see the mean where it is not subtracted."""
        if not self.config.apply_b_dec_to_input:
            self.b_mag.sub_(self.r_mag.exp() * ((source.mean * source.scale) @ self.W_enc))
        super().fold(source, target)
        self.b_mag.div_(target.unit)

    @torch.no_grad()
    def revive(self, latents: Tensor, x: Tensor, target: Tensor) -> None:
        """Also start the magnitudes of revived latents anew."""
        super().revive(latents, x, target)
        self.r_mag[latents], self.b_mag[latents] = 0.0, 0.0
