"""TopK: the k largest latents of each activation fire.

    f = ReLU(TopK_k((x − b_dec) W_enc + b_enc)),   x̂ = f W_dec + b_dec

x: (n, d_in), W_enc: (d_in, d_sae), f: (n, d_sae) with at most k entries a row, W_dec: (d_sae, d_in). Gao
et al. 2024, "Scaling and evaluating sparse autoencoders", arXiv 2406.04093; its auxiliary loss for dead
latents is in `training.objective`.
"""

from __future__ import annotations

from torch import Tensor

from unbraid.manifest.errors import UserError
from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.codes import SparseCodes, top_k_pre_activations


class TopKSAE(SAE):
    """Sparse by count: k latents describe an activation (fewer where pre-activations are negative)."""

    def __init__(self, config: SAEConfig) -> None:
        super().__init__(config)
        if config.k < 1:
            raise UserError(f"architecture topk needs k of 1 or more, not {config.k}; change --k")

    def encode(self, x: Tensor) -> SparseCodes:
        """Codes of activations x, shape (n, d_in), k entries a row, some perhaps 0."""
        values, indices = top_k_pre_activations(self.centred(x), self.W_enc, self.b_enc, self.config.k)
        return SparseCodes(indices, values.relu())
