"""ReLU with an L1 penalty: the classic sparse autoencoder.

    f = ReLU((x − b_dec) W_enc + b_enc),   x̂ = f W_dec + b_dec,   loss = ‖x − x̂‖² + λ Σ_j f_j ‖W_dec[j]‖

x: (n, d_in), f: (n, d_sae). Cunningham et al. 2023, arXiv 2309.08600; Bricken et al. 2023, "Towards
monosemanticity". The penalty shrinks what it does not silence; `evaluation` reports by how much. SAELens
calls it `standard`.
"""

from __future__ import annotations

from torch import Tensor, nn

from unbraid.sae.base import SAE, encode_in_chunks
from unbraid.sae.codes import SparseCodes


class ReLUSAE(SAE):
    """Sparse because firing costs: the number of active latents differs from token to token."""

    def encode(self, x: Tensor) -> SparseCodes:
        """Codes of activations x, shape (n, d_in); k is the most latents that fire at one of them."""
        return encode_in_chunks(self, x, nn.ReLU())
