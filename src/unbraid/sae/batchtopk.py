"""BatchTopK: the n·k largest latents of a batch of n activations fire, so that hard tokens may use more.

    f = ReLU(p) · [p among the n·k largest of the batch],   p = (x − b_dec) W_enc + b_enc,   x̂ = f W_dec
    + b_dec

x: (n, d_in), p and f: (n, d_sae). Bussmann et al. 2024, "BatchTopK sparse autoencoders", arXiv
2412.06410. A batch is needed to train it; to use it, one threshold θ takes the batch's place, which makes
it a JumpReLU autoencoder, and as one it is saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.codes import SparseCodes, selected, top_k_pre_activations
from unbraid.sae.jumprelu import JumpReLUSAE

START_WIDTH = 4
"""Each row first offers this many times k candidates."""


class BatchTopKSAE(SAE):
    """Sparse by count over a batch; exists during training alone, see `with_threshold`."""

    uses_k = True
    training_only = True

    def encode(self, x: Tensor) -> SparseCodes:
        """Codes of the batch x, shape (n, d_in): n·k entries in all (fewer where too few are positive)."""
        centred = self.centred(x)
        values, indices, cut = self._candidates(centred.detach())
        # What is left of each row stands first, so the codes are as wide as the busiest row.
        order = values.argsort(dim=1, descending=True)
        kept = values > cut
        width = max(int(kept.sum(dim=1).max()), 1)
        order = order[:, :width]
        values, indices, kept = values.gather(1, order), indices.gather(1, order), kept.gather(1, order)
        values = selected(centred, self.W_enc, self.b_enc, indices, values)
        return SparseCodes(indices, values * kept)

    @torch.no_grad()
    def _candidates(self, centred: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each row's largest pre-activations, (n, m) each, and the value that those of the batch's n·k
        must exceed.

        m grows until no row could have more to offer, so the result is exact whatever m started from.
        """
        n, d_sae = len(centred), self.config.d_sae
        width = min(START_WIDTH * self.config.k, d_sae)
        while True:
            values, indices = top_k_pre_activations(centred, self.W_enc, self.b_enc, width)
            flat = values.flatten()
            wanted = n * self.config.k
            if flat.numel() > wanted:
                cut = flat.kthvalue(flat.numel() - wanted).values.clamp(min=0)
            else:
                cut = flat.new_zeros(())
            if width == d_sae or not bool((values.amin(dim=1) > cut).any()):
                return values, indices, cut
            width = min(2 * width, d_sae)

    def batch_threshold(self, x: Tensor) -> float:
        """The pre-activation that a latent had to exceed to fire in this batch, x of shape (n, d_in)."""
        return float(self._candidates(self.centred(x))[2])

    def calibrated(self, batches: Sequence[Tensor]) -> JumpReLUSAE:
        """With the mean over batches of the value to be exceeded, so that k latents fire on average."""
        return self.with_threshold(sum(self.batch_threshold(x) for x in batches) / len(batches))

    def with_threshold(self, threshold: float) -> JumpReLUSAE:
        """The autoencoder for use: the same weights, and one threshold on pre-activations for all."""
        sae = self.ready_form(replace(self.config, k=0, options={}))
        weights = {name: value.detach().clone() for name, value in self.named_parameters()}
        sae.load_state_dict({**weights, "threshold": torch.full_like(self.b_enc, threshold).detach()})
        return sae

    def ready_form(self, config: SAEConfig) -> JumpReLUSAE:
        """The autoencoder for use, without weights."""
        return JumpReLUSAE(replace(config, architecture="jumprelu"))
