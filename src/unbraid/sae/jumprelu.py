"""JumpReLU: a latent fires where its pre-activation exceeds its own threshold, and then with the full value.

    p = (x − b_dec) W_enc + b_enc,   f = p · [p > θ],   x̂ = f W_dec + b_dec

θ: (d_sae,), not negative. Rajamanoharan et al. 2024, "Jumping ahead", arXiv 2407.14435. Here it is the
form in which a trained BatchTopK autoencoder is used, and what is read from other tools; x − b_dec is x
where the configuration says so.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from unbraid.sae.base import SAE, SAEConfig, encode_in_chunks
from unbraid.sae.codes import SparseCodes


class JumpReLUSAE(SAE):
    """Sparse by threshold, one for each latent."""

    def __init__(self, config: SAEConfig) -> None:
        super().__init__(config)
        self.register_buffer("threshold", torch.zeros(config.d_sae))

    def encode(self, x: Tensor) -> SparseCodes:
        """Codes of activations x, shape (n, d_in); k is the most latents that fire at one of them."""
        return encode_in_chunks(self, x, _JumpReLU(cast(Tensor, self.threshold)))


class _JumpReLU(nn.Module):
    def __init__(self, threshold: Tensor) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, p: Tensor) -> Tensor:
        return p.relu() * (p > self.threshold)
