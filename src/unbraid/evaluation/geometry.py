"""How an autoencoder's weights lie to each other; no activation is needed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from unbraid.evaluation.definitions import Definition, Undefined
from unbraid.sae.base import SAE
from unbraid.stats.bootstrap import Interval, mean_of_runs

DEFINITIONS: Mapping[str, Definition] = {
    "encoder_norm": Definition("length of a latent's encoder row", "mean over latents of ‖W_enc[:,j]‖"),
    "decoder_norm": Definition("length of a latent's decoder row", "mean over latents of ‖W_dec[j]‖"),
    "encoder_bias": Definition("encoder bias", "mean over latents of b_enc[j]"),
    "encoder_decoder_cosine": Definition(
        "cosine of a latent's encoder and decoder",
        "mean over latents of cos(W_enc[:,j], W_dec[j]), 0 for zeros",
    ),
    "max_decoder_cosine": Definition(
        "cosine of a decoder row with the one nearest to it",
        "mean over latents of max over i≠j of cos(W_dec[i], W_dec[j]), 0 for zeros",
        "lower",
    ),
    "max_encoder_cosine": Definition(
        "cosine of an encoder row with the one nearest to it",
        "mean over latents of max over i≠j of cos(W_enc[:,i], W_enc[:,j]), 0 for zeros",
        "lower",
    ),
}
SIDE = 512
"""Rows and columns of the cosines that exist at the same time: 1 MB stays near a processor."""


@torch.no_grad()
def geometry(sae: SAE) -> dict[str, Tensor]:
    """What `DEFINITIONS` takes the means of, each (d_sae,) float32 on the processor, by the same names.

    Empty for architectures whose weights are not one decoder row a latent; what is about encoder rows is left
    out where there are none, and the cosine of the two where they live in spaces of different size.
    """
    decoder, encoder = sae.W_dec.detach().float(), sae.encoder_rows()
    if decoder.shape[0] != sae.config.d_sae or decoder.ndim != 2:
        return {}
    write = _unit(decoder)
    found = {"decoder_norm": decoder.norm(dim=1), "max_decoder_cosine": nearest(write)}
    if encoder is not None:
        encoder = encoder.detach().float()
        read = _unit(encoder)
        found |= {
            "encoder_norm": encoder.norm(dim=1),
            "encoder_bias": sae.b_enc.detach().float(),
            "max_encoder_cosine": nearest(read),
        }
        if read.shape == write.shape:
            found["encoder_decoder_cosine"] = (read * write).sum(dim=1)
    return {name: value.cpu() for name, value in found.items()}


def metrics(found: Mapping[str, Tensor]) -> dict[str, Interval | Undefined]:
    """Means over latents, with Student's intervals."""
    why = "its latents have no encoder and decoder rows that could be compared"
    return {
        name: mean_of_runs(found[name].numpy()) if name in found else Undefined(why) for name in DEFINITIONS
    }


def nearest(unit: Tensor) -> Tensor:
    """For each row of unit (n, d), rows of length 1 or 0, the largest product with another row: (n,).

    Every pair of rows is multiplied once, in squares of SIDE. A single row has no other: 0.
    """
    n = len(unit)
    best = unit.new_full((n,), float("-inf"))
    for i in range(0, n, SIDE):
        for j in range(i, n, SIDE):
            cosines = unit[i : i + SIDE] @ unit[j : j + SIDE].T
            if i == j:
                cosines.fill_diagonal_(float("-inf"))
            best[i : i + SIDE] = torch.maximum(best[i : i + SIDE], cosines.amax(dim=1))
            best[j : j + SIDE] = torch.maximum(best[j : j + SIDE], cosines.amax(dim=0))
    return best if n > 1 else torch.zeros_like(best)


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)
