"""Matryoshka: BatchTopK whose first latents have to reconstruct on their own, at several nested widths.

    loss = 1/M Σ_m ‖x − (f_{<w_m} W_dec_{<w_m} + b_dec)‖²,   w_1 < … < w_M = d_sae

x: (n, d_in), f: (n, d_sae) as BatchTopK's. Bussmann et al. 2025, "Learning multi-level features with
Matryoshka sparse autoencoders", arXiv 2503.17547 (who add the errors up; the mean keeps the loss in units
of FVU and AuxK's weight comparable). Early latents stay general because the later ones, which would
specialise them, are not there to fill the holes. Used and saved as JumpReLU, like BatchTopK.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from unbraid.manifest.errors import UserError
from unbraid.sae.base import SAEConfig
from unbraid.sae.batchtopk import BatchTopKSAE
from unbraid.sae.codes import SparseCodes, decode
from unbraid.sae.jumprelu import JumpReLUSAE
from unbraid.sae.options import EDGE, Count


@dataclass(frozen=True)
class MatryoshkaOptions:
    """How the latents are nested."""

    __pydantic_config__ = EDGE

    widths: tuple[Count, ...] = ()
    """Widths below d_sae at which the first latents reconstruct on their own, rising; when left out, d_sae
    divided by 16, 8, 4 and 2."""


class MatryoshkaSAE(BatchTopKSAE):
    """Latents in an order, from general to special."""

    Options = MatryoshkaOptions
    options: MatryoshkaOptions
    beta2 = 0.999
    """With 0.99 twice as many latents die in longer runs (benchmarks/RESULTS.md, "sweep: Adam's β₂")."""

    def __init__(self, config: SAEConfig) -> None:
        super().__init__(config)
        self.widths = nested_widths(self.options.widths or halved_widths(config.d_sae), config.d_sae)

    def reconstruction_loss(self, codes: SparseCodes, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The mean over widths, and the error of all latents together."""
        return nested_loss(codes, self.W_dec, target - self.b_dec - self.bypass(x), self.widths)

    def ready_form(self, config: SAEConfig) -> JumpReLUSAE:
        """JumpReLU, with the widths on record."""
        return super().ready_form(
            replace(config, metadata={**config.metadata, "matryoshka_widths": list(self.widths)})
        )


def halved_widths(d_sae: int) -> tuple[int, ...]:
    """d_sae divided by 16, 8, 4 and 2, as far as that is 1 or more."""
    return tuple(width for part in (16, 8, 4, 2) if (width := d_sae // part))


def nested_widths(widths: Sequence[int], d_sae: int) -> tuple[int, ...]:
    """The widths at which the first latents reconstruct, all of them last. Raises UserError where they do
    not rise."""
    if any(low >= high for low, high in pairwise((*widths, d_sae))):
        raise UserError(
            f"the nested widths {', '.join(map(str, widths))} must rise and stay below the width {d_sae}; "
            "change --set widths"
        )
    return (*widths, d_sae)


def nested_loss(
    codes: SparseCodes, W_dec: Tensor, wanted: Tensor, widths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The mean loss over nested widths, a scalar, and what all latents together leave of `wanted`,
    (n, d_out): the target without bias and bypass."""
    parts = (decode(_within(codes, low, high), W_dec) for low, high in pairwise((0, *widths)))
    loss, left = nested_error(parts, wanted)
    return loss / wanted.numel(), left


def nested_error(parts: Iterable[Tensor], wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The squared error after each part, (n, d_out), the mean over parts of the sums, and what they all leave
    of `wanted`; a part is what a width adds to the one before."""
    errors: list[Tensor] = []
    for part in parts:
        wanted = wanted - part
        errors.append(wanted.square().sum())
    return torch.stack(errors).mean(), wanted


def _within(codes: SparseCodes, low: int, high: int) -> SparseCodes:
    """The entries of latents low to high − 1, in as many columns as the busiest row needs."""
    kept = (codes.indices >= low) & (codes.indices < high) & (codes.values > 0)
    width = max(int(kept.sum(dim=1).max()), 1)
    order = kept.int().argsort(dim=1, descending=True, stable=True)[:, :width]
    return SparseCodes(codes.indices.gather(1, order), codes.values.gather(1, order) * kept.gather(1, order))
