"""Crosscoder: one set of latents for several sites, or for the same site of two models.

    f = ReLU(Σ_s (x_s − b_dec_s) W_enc_s + b_enc),   x̂_s = f W_dec_s + b_dec_s
    loss = Σ_s ‖x_s − x̂_s‖² + λ Σ_j f_j Σ_s ‖W_dec_s[j]‖

x_s: (n, d_s); side by side they are x: (n, d_in), and so the matrices W_enc: (d_in, d_sae), W_dec: (d_sae,
d_in) of one ReLU autoencoder. `config.blocks` holds the d_s. Lindsey et al. 2024, "Sparse crosscoders for
cross-layer features and model diffing". What makes it a crosscoder is the penalty: a latent pays for each
site by itself, so one that only some sites need has no reason to write to the others, and
`site_norms` tells latents that two models share from those that one has alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unbraid.manifest.errors import UserError
from unbraid.sae.base import SAEConfig
from unbraid.sae.relu import ReLUSAE


class CrosscoderSAE(ReLUSAE):
    """Latents that several sites share."""

    reads = "sites"

    def __init__(self, config: SAEConfig) -> None:
        super().__init__(config)
        if sum(config.blocks) != config.d_in or len(config.blocks) < 2:
            raise UserError(
                "a crosscoder reads two sites or more; blocks of "
                f"{', '.join(map(str, config.blocks)) or 'no'} dimensions do not make up {config.d_in}"
            )

    def site_norms(self) -> Tensor:
        """How strongly each latent writes to each site, (sites, d_sae)."""
        return torch.stack([part.norm(dim=1) for part in self.W_dec.split(list(self.config.blocks), dim=1)])

    def row_norms(self) -> Tensor:
        """Σ_s ‖W_dec_s[j]‖, (d_sae,)."""
        return self.site_norms().sum(dim=0)

    def probe(self, latents: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Raises UserError: an Edit reads one site."""
        raise UserError(
            "a crosscoder's latent reads several sites at once but an edit only one, so it cannot be edited; "
            "steer with its decoder row at one site, or train an autoencoder there"
        )
