"""Matching pursuit: latents are chosen one after the other, each for what those before it left over.

    r_0 = x − b_dec;   at step t:  j = argmax_j r_t · W_dec[j],  v = ReLU(r_t · W_dec[j]),
    f_j += v,  r_{t+1} = r_t − v W_dec[j];   x̂ = f W_dec + b_dec

x: (n, d_in), W_dec: (d_sae, d_in) with rows of unit length at most; there is no encoder. Mallat and Zhang
1993; as an autoencoder Costa et al. 2025, "From flat to hierarchical: extracting sparse representations with
matching pursuit", arXiv 2506.03093, with rows of unit length. A row stops after k steps, when its residual
is shorter than `residual_threshold`, or, with `stop_on_duplicate_support`, once it takes a latent a second
time.

Given which latents were taken, D: (k, d_in), their values solve a triangular system: v_t = r_0 · D_t −
Σ_{s<t} v_s (D_s · D_t). So the choice is made without gradients, a few rows at a time, and gradients take
this one product and solution instead of k steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unbraid.manifest.errors import UserError
from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.codes import CHUNK_ROWS, SparseCodes, decode
from unbraid.sae.options import EDGE, Weight, plain
from unbraid.sae.scaling import Scaling


@dataclass(frozen=True)
class MatchingPursuitOptions:
    """When to stop before k steps."""

    __pydantic_config__ = EDGE

    residual_threshold: Weight = 0.0
    """Length of the residual below which a row is done; in training that of scaled activations."""
    stop_on_duplicate_support: bool = True
    """Whether a row is done once it takes a latent again."""
    short_rows: bool = True
    """Whether decoder rows may become shorter than 1, so that a step takes a part of what it could: less
    error and fewer latents (benchmarks/RESULTS.md, "sweep"); false keeps them at unit length."""


class MatchingPursuitSAE(SAE):
    """Sparse by greed: at most k latents, chosen with regard to each other."""

    Options = MatchingPursuitOptions
    options: MatchingPursuitOptions
    uses_k = True

    def __init__(self, config: SAEConfig) -> None:
        super().__init__(config)
        del self.W_enc, self.b_enc
        self.unit_rows = not self.options.short_rows

    def encoder_rows(self) -> None:
        """None."""
        return

    def encode(self, x: Tensor) -> SparseCodes:
        """Codes of activations x, shape (n, d_in), at most k entries a row."""
        return SparseCodes.concatenate([self._encode(rows) for rows in self.centred(x).split(CHUNK_ROWS)])

    def _encode(self, centred: Tensor) -> SparseCodes:
        taken, going = self._choose(centred.detach())
        rows = self.W_dec[taken] * going[:, :, None]  # (n, k, d_in)
        gram = (rows @ rows.transpose(1, 2)).to(rows.dtype).tril(-1)
        steps = gram + torch.eye(taken.shape[1], dtype=gram.dtype, device=gram.device)
        product = (rows @ centred[:, :, None]).to(rows.dtype).squeeze(2)
        values = torch.linalg.solve_triangular(steps, product[:, :, None], upper=False).squeeze(2)
        # A latent taken twice: all it got goes to its first place.
        same = (taken[:, :, None] == taken[:, None, :]) & going[:, :, None] & going[:, None, :]
        first = same.int().argmax(dim=2)
        values = torch.zeros_like(values).scatter_add(1, first, values * going)
        return SparseCodes(taken * (values > 0), values.relu())

    @torch.no_grad()
    def _choose(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The latents taken step by step and whether the row was still going, both (n, k)."""
        options, n = self.options, len(residual)
        going = residual.new_ones(n, dtype=torch.bool)
        taken: list[Tensor] = []
        alive: list[Tensor] = []
        for _ in range(self.config.k):
            value, latent = (residual @ self.W_dec.T).max(dim=1)
            going = going & (value > 0)
            if not bool(going.any()):
                break
            again = torch.stack([old == latent for old in taken]).any(dim=0) if taken else ~going & going
            taken.append(latent)
            alive.append(going)
            residual = residual - (value * going)[:, None] * self.W_dec[latent]
            if options.stop_on_duplicate_support:
                going = going & ~again
            if options.residual_threshold:
                going = going & (residual.norm(dim=1) >= options.residual_threshold)
        if not taken:
            return torch.zeros(n, 1, dtype=torch.int64, device=residual.device), going[:, None] & False
        return torch.stack(taken, dim=1), torch.stack(alive, dim=1)

    def decode(self, codes: SparseCodes) -> Tensor:
        """Reconstructions (n, d_in); the bias goes in only where it was taken out."""
        x_hat = decode(codes, self.W_dec)
        return x_hat + self.b_dec if self.config.apply_b_dec_to_input else x_hat

    def pre_activations(self, x: Tensor) -> Tensor:
        """The products of the first step, (n, d_sae)."""
        return self.centred(x) @ self.W_dec.T

    def auxiliary(self, x: Tensor, error: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Dead latents are ranked by what they would take next."""
        return error, self.W_dec.T, self.W_dec.new_zeros(self.config.d_sae)

    @torch.no_grad()
    def initialise(self, x: Tensor, target: Tensor, generator: torch.Generator) -> None:
        """Random directions; nothing has to be scaled."""
        self.W_dec.copy_(torch.randn(self.W_dec.shape, generator=generator))
        self.W_dec.div_(self.row_norms()[:, None])

    @torch.no_grad()
    def constrain(self) -> None:
        """Rows of unit length at most: a longer one is chosen for its length and drives out the others."""
        super().constrain()
        if not self.unit_rows:
            self.W_dec.div_(self.row_norms().clamp(min=1)[:, None])

    @torch.no_grad()
    def fold(self, source: Scaling, target: Scaling) -> None:
        """Directions stay; the residual's length is measured in raw units from now on."""
        self.b_dec.div_(target.unit).add_(target.mean)
        self.options = replace(self.options, residual_threshold=self.options.residual_threshold / target.unit)
        self.config = replace(self.config, options=plain(self.options))

    @torch.no_grad()
    def revive(self, latents: Tensor, x: Tensor, target: Tensor) -> None:
        """The direction of the activation."""
        write = target - self.b_dec
        self.W_dec[latents] = write / write.norm(dim=1, keepdim=True).clamp(min=1e-12)

    def probe(self, latents: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Raises UserError: whether a latent is taken depends on those before it."""
        raise UserError(
            "a latent of matching pursuit has no direction of its own that decides whether it fires, so it "
            "cannot be edited; train topk or jumprelu on the site"
        )
