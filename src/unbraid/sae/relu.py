"""ReLU with an L1 penalty: the classic sparse autoencoder.

    f = ReLU((x − b_dec) W_enc + b_enc),   x̂ = f W_dec + b_dec,   loss = ‖x − x̂‖² + λ Σ_j f_j ‖W_dec[j]‖

x: (n, d_in), f: (n, d_sae). Cunningham et al. 2023, arXiv 2309.08600; Bricken et al. 2023, "Towards
monosemanticity". The penalty shrinks what it does not silence; `evaluation` reports by how much. SAELens
calls it `standard`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from unbraid.sae.elementwise import ElementwiseSAE, Entries
from unbraid.sae.options import EDGE, Weight


@dataclass(frozen=True)
class ReLUOptions:
    """How ReLU is trained."""

    __pydantic_config__ = EDGE

    l1: Weight = 2.0
    """Weight λ of the penalty."""


class ReLUSAE(ElementwiseSAE):
    """Sparse because firing costs: the number of active latents differs from token to token."""

    Options = ReLUOptions
    options: ReLUOptions
    against_death = "a smaller --set l1"

    def activate(self, entries: Entries) -> Tensor:
        """ReLU."""
        return entries.pre.relu()

    def loss(self, entries: Entries, codes: Tensor, target: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """λ Σ f ‖W_dec[j]‖."""
        return self.options.l1 * (codes * entries.of(self.row_norms())).sum(), 0.0
