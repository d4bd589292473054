"""After training: how often each latent fires, and above which pre-activation.

Measured with the final weights on activations drawn again from the training set. TopK decides by rank, so
its latents have no thresholds of their own; an Edit needs one for each. Ours makes the latent fire by
threshold exactly as often, over these tokens, as it was among the top k. BatchTopK's single threshold is
the mean over batches of the value that had to be exceeded, so that k latents fire on average.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from unbraid.sae.base import SAE
from unbraid.sae.batchtopk import BatchTopKSAE
from unbraid.sae.codes import top_k_pre_activations
from unbraid.sae.topk import TopKSAE

CANDIDATES = 4
"""Latents looked at per token, in units of k: those just below the top k are needed to count how often a
threshold would let one through."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """What a pass over some activations measured."""

    sae: SAE
    """The autoencoder for use: BatchTopK turned into JumpReLU, TopK with its thresholds, ReLU as it was."""
    frequency: Tensor
    """Share of the tokens at which each latent fired, (d_sae,) float64."""
    l0: float
    """Mean number of latents that fired."""
    tokens: int
    """Tokens it was measured on."""


@torch.no_grad()
def calibrate(sae: SAE, batches: Iterable[Tensor]) -> Calibration:
    """Measure a trained autoencoder on batches (n, d_in) of the activations it was trained on."""
    given = list(batches)
    ready = sae
    if isinstance(sae, BatchTopKSAE):
        ready = sae.with_threshold(sum(sae.batch_threshold(x) for x in given) / len(given))
    elif isinstance(sae, TopKSAE):
        sae.register_buffer("threshold", rate_matched_thresholds(sae, given))
    counts = torch.zeros(sae.config.d_sae, dtype=torch.float64)
    tokens = 0
    for x in given:
        codes = ready.encode(x)
        counts += torch.bincount(codes.indices[codes.values > 0].flatten(), minlength=len(counts)).cpu()
        tokens += len(x)
    return Calibration(ready, counts / tokens, float(counts.sum()) / tokens, tokens)


def rate_matched_thresholds(sae: TopKSAE, batches: Iterable[Tensor]) -> Tensor:
    """For each latent the pre-activation that it exceeds as often as it is in the top k: (d_sae,).

    A latent that never came into the top k gets its largest value seen, so that it would have to do
    better; one that was not even near gets the typical value of the last place in the top k. Not below 0,
    as the codes are not.
    """
    k, d_sae = sae.config.k, sae.config.d_sae
    width = min(CANDIDATES * k, d_sae)
    latents: list[Tensor] = []
    values: list[Tensor] = []
    selected = torch.zeros(d_sae, dtype=torch.int64)
    last_place: list[Tensor] = []
    for x in batches:
        v, i = top_k_pre_activations(sae.centred(x), sae.W_enc, sae.b_enc, width)
        ranked, order = v.sort(dim=1, descending=True)
        top, place = i.gather(1, order)[:, :k], ranked[:, :k]
        selected += torch.bincount(top[place > 0], minlength=d_sae).cpu()
        last_place.append(place[:, -1].mean().cpu())
        near = v > 0
        latents.append(i[near].cpu())
        values.append(v[near].cpu())
    latent, value = torch.cat(latents), torch.cat(values)
    # Sorted by latent, then downwards by value: j's threshold stands `selected[j]` places after its first.
    order = value.argsort(descending=True, stable=True)
    order = order[latent[order].argsort(stable=True)]
    value = value[order]
    counts = torch.bincount(latent, minlength=d_sae)
    first = counts.cumsum(0) - counts
    typical = torch.stack(last_place).mean().clamp(min=0)
    if not len(value):
        return typical.expand(d_sae).clone()
    all_selected = selected == counts
    at = (first + torch.where(all_selected, counts - 1, selected)).clamp(min=0, max=len(value) - 1)
    # Above its own smallest value a latent would not fire once more: go just below it.
    threshold = torch.where(all_selected, value[at].nextafter(torch.zeros(())), value[at])
    return torch.where(counts == 0, typical, threshold).to(sae.b_enc.device, sae.b_enc.dtype)
