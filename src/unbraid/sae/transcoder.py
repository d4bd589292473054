"""Transcoder: reads the activation at one site and predicts that at another, such as an MLP's output.

    f = activation(x W_enc + b_enc),   ŷ = f W_dec + b_dec (+ x W_skipᵀ)

x: (n, d_in) at the site, y: (n, d_out) at the target site, W_enc: (d_in, d_sae), W_dec: (d_sae, d_out),
W_skip: (d_out, d_in). Dunefsky et al. 2024, "Transcoders find interpretable LLM feature circuits", arXiv
2406.11944; the linear skip connection is Paulo et al. 2025, "Transcoders beat sparse autoencoders for
interpretability", arXiv 2501.18823. The activation is BatchTopK's in training and so JumpReLU's in use,
JumpReLU's from the beginning, or TopK's. The encoder starts from the linear map that predicts y from x best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from unbraid.manifest.errors import UserError
from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.batchtopk import BatchTopKSAE
from unbraid.sae.jumprelu import JumpReLUSAE
from unbraid.sae.scaling import Scaling
from unbraid.sae.topk import TopKSAE

RIDGE = 1e-3
"""Weight on the squared norm of the linear map, in units of the inputs' mean square."""


class _AcrossSites(SAE):
    """What any architecture needs to read one site and write another."""

    reads = "pair"
    skip: ClassVar[bool] = False
    """Whether a linear map goes past the latents."""

    def __init__(self, config: SAEConfig) -> None:
        super().__init__(replace(config, apply_b_dec_to_input=False))
        if self.skip:
            self.W_skip = nn.Parameter(torch.zeros(self.b_dec.numel(), config.d_in))

    def bypass(self, x: Tensor) -> Tensor | float:
        """x W_skipᵀ, (n, d_out)."""
        return x.to(self.W_dec.dtype) @ self.W_skip.T if self.skip else 0.0

    def reading_directions(self, x: Tensor, target: Tensor) -> Tensor:
        """For each latent the direction that predicts what it writes, (d_in, d_sae)."""
        return linear_map(x, target) @ self.W_dec.T

    @torch.no_grad()
    def fold(self, source: Scaling, target: Scaling) -> None:
        """The skip connection maps raw activations too."""
        super().fold(source, target)
        if self.skip:
            self.W_skip.mul_(source.scale).div_(target.scale[:, None])
            self.b_dec.sub_(self.W_skip @ source.mean)

    def probe(self, latents: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Raises UserError: an Edit reads and writes one site."""
        raise UserError(
            f"a transcoder's latent reads {self.config.site or 'one site'} and writes "
            f"{self.config.target_site or 'another'} but an edit acts at one site; edit a latent of an "
            "autoencoder trained on the site to be changed"
        )


class JumpReLUTranscoder(_AcrossSites, JumpReLUSAE):
    """A transcoder with a threshold for each latent."""


class JumpReLUSkipTranscoder(JumpReLUTranscoder):
    """The same with a linear skip connection."""

    skip = True


class TopKTranscoder(_AcrossSites, TopKSAE):
    """A transcoder with k latents at every token."""

    def calibrated(self, batches: Sequence[Tensor]) -> Self:
        """Without measured thresholds: they are for edits, which it cannot have."""
        return self.with_fixed_rows()


class TopKSkipTranscoder(TopKTranscoder):
    """The same with a linear skip connection."""

    skip = True


class Transcoder(_AcrossSites, BatchTopKSAE):
    """A transcoder with k latents on average; exists during training alone."""

    def ready_form(self, config: SAEConfig) -> JumpReLUSAE:
        """The same transcoder by threshold."""
        kind = JumpReLUSkipTranscoder if self.skip else JumpReLUTranscoder
        return kind(replace(config, architecture=f"jumprelu_{config.architecture}"))


class SkipTranscoder(Transcoder):
    """The same with a linear skip connection."""

    skip = True


def linear_map(x: Tensor, y: Tensor) -> Tensor:
    """The matrix (d_in, d_out) that predicts y (n, d_out) from x (n, d_in) with the least squared error."""
    x, y = x.double(), y.double()
    square = x.T @ x
    ridge = RIDGE * square.diagonal().mean() * torch.eye(len(square), dtype=x.dtype)
    return torch.linalg.solve(square + ridge, x.T @ y).float()
