"""LISTA: the encoder looks again at what its first answer left over, and corrects it, a few times.

    f_0 = 0,   f_{t+1} = ReLU(TopK_k(f_t + η_t (x − b_dec − f_t W_dec) W_enc + b_enc))
    x̂ = f_T W_dec + b_dec

x: (n, d_in), f: (n, d_sae), η: (T,) learned step sizes. Gregor and LeCun 2010, "Learning fast
approximations of sparse coding"; with the k largest in place of shrinkage it is iterative hard thresholding
(Blumensath and Davies 2009) with a learned encoder. All iterations share W_enc. With T = 1 and η = 1 it is
TopK. Later iterations see the residual, so one latent can explain away another. With `widths` the loss is
Matryoshka's: the first latents have to reconstruct on their own as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unbraid.manifest.errors import UserError
from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.codes import CHUNK_ROWS, SparseCodes, decode, selected, top_k
from unbraid.sae.matryoshka import nested_loss, nested_widths
from unbraid.sae.options import EDGE, Count


@dataclass(frozen=True)
class LISTAOptions:
    """How long the encoder thinks, and what for."""

    __pydantic_config__ = EDGE

    iterations: Count = 3
    """Number of iterations T."""
    widths: tuple[Count, ...] = ()
    """Nested widths below d_sae, rising, for Matryoshka's loss; none for the plain one."""


class LISTASAE(SAE):
    """Sparse by count, with latents chosen with regard to each other."""

    Options = LISTAOptions
    options: LISTAOptions
    uses_k = True

    def __init__(self, config: SAEConfig) -> None:
        super().__init__(config)
        self.widths = nested_widths(self.options.widths, config.d_sae)
        self.step_size = nn.Parameter(torch.ones(self.options.iterations))

    def encode(self, x: Tensor) -> SparseCodes:
        """Codes of activations x, shape (n, d_in), k entries a row, some perhaps 0."""
        parts: list[SparseCodes] = []
        for rows in self.centred(x).split(CHUNK_ROWS):
            codes = SparseCodes(rows.new_zeros(len(rows), 0, dtype=torch.int64), rows.new_zeros(len(rows), 0))
            for size in self.step_size:
                codes = self._again(rows, codes, size)
            parts.append(codes)
        return SparseCodes.concatenate(parts)

    def reconstruction_loss(self, codes: SparseCodes, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The mean over nested widths, and the error of all latents together."""
        return nested_loss(codes, self.W_dec, target - self.b_dec, self.widths)

    def _again(self, rows: Tensor, codes: SparseCodes, size: Tensor) -> SparseCodes:
        """One iteration on centred rows (n, d_in)."""
        left = rows - decode(codes, self.W_dec)
        with torch.no_grad():
            product = left @ self.W_enc
            proposed = product * size + self.b_enc + codes.dense(self.config.d_sae)
            _, latents = top_k(proposed, self.config.k)
            product = product.gather(1, latents)
        nothing = torch.zeros_like(self.b_enc)
        change = selected(left, self.W_enc, nothing, latents, product) * size + self.b_enc[latents]
        held = ((latents[:, :, None] == codes.indices[:, None, :]) * codes.values[:, None, :]).sum(dim=2)
        return SparseCodes(latents, (held + change).relu())

    def probe(self, latents: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Raises UserError: whether a latent fires depends on what the others explain."""
        raise UserError(
            "a latent of lista has no direction of its own that decides whether it fires, so it cannot be "
            "edited; train topk or jumprelu on the site"
        )
