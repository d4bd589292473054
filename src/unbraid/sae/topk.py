"""TopK: the k largest latents of each activation fire.

    f = ReLU(TopK_k((x − b_dec) W_enc + b_enc)),   x̂ = f W_dec + b_dec

x: (n, d_in), W_enc: (d_in, d_sae), f: (n, d_sae) with at most k entries a row, W_dec: (d_sae, d_in). Gao
et al. 2024, "Scaling and evaluating sparse autoencoders", arXiv 2406.04093; its auxiliary loss for dead
latents is in `objective`.

Rows of W_dec have unit length, or, with `free_rows`, any length n_j while it trains (`sae.free_rows`); the k
that fire are then those with the largest n_j p_j, as they are when it is written with rows of unit length.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Self

import torch
from torch import Tensor

from unbraid.sae.codes import SparseCodes, selected, top_k_pre_activations
from unbraid.sae.free_rows import FreeRows

CANDIDATES = 4
"""Latents looked at per token, in units of k: those just below the top k are needed to count how often a
threshold would let one through."""


class TopKSAE(FreeRows):
    """Sparse by count: k latents describe an activation (fewer where pre-activations are negative)."""

    uses_k = True

    def encode(self, x: Tensor) -> SparseCodes:
        """Codes of activations x, shape (n, d_in), k entries a row, some perhaps 0."""
        centred, k = self.centred(x), self.config.k
        if self.unit_rows:
            values, indices = top_k_pre_activations(centred, self.W_enc, self.b_enc, k)
        else:
            with torch.no_grad():
                n = self.row_norms()
                scaled, indices = top_k_pre_activations(centred, self.W_enc * n, self.b_enc * n, k)
                values = scaled / n.clamp(min=1e-12)[indices]
            values = selected(centred, self.W_enc, self.b_enc, indices, values)
        return SparseCodes(indices, values.relu())

    def calibrated(self, batches: Sequence[Tensor]) -> Self:
        """With a threshold for each latent, which Edits need as it has none of its own."""
        ready = super().calibrated(batches)
        ready.register_buffer("threshold", rate_matched_thresholds(ready, batches))
        return ready


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
