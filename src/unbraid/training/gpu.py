"""A whole TopK training step on a GPU, in Triton kernels that touch only entries that are not 0.

The same three parts as `compiled`: candidates from a low-precision product and an exact choice among them;
reconstruction, error and gradients of the codes; and then, latent by latent, both gradients, projection,
Adam, unit length and the low-precision copy in one pass over the rows of every matrix. It does what
`PlainStep` does, which is the form to read; the kernels are `sae.kernels.gpu`.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from unbraid.sae.base import SAE
from unbraid.sae.objective import StepContext, StepReport
from unbraid.sae.topk import TopKSAE
from unbraid.training.adam import BETA1, EPSILON, Adam
from unbraid.training.compiled import auxk_gradients

WIDEST = 16_384
"""Largest d_in whose rows fit into a program's registers."""


def fits(sae: SAE) -> bool:
    """Whether this step serves an autoencoder: TopK, in float32, on a GPU with Triton."""
    return (
        type(sae) is TopKSAE
        and sae.unit_rows
        and all(p.is_cuda and p.dtype == torch.float32 for p in sae.parameters())
        and sae.config.d_in <= WIDEST
        and importlib.util.find_spec("triton") is not None
    )


class GPUTopKStep:
    """Steps of one TopK autoencoder; weights and moments are the SAE's and Adam's own, changed in place."""

    own_threads = False

    def __init__(self, sae: SAE, optimizer: Adam, *, low: torch.dtype = torch.bfloat16) -> None:
        self.sae, self.optimizer, self.low = sae, optimizer, low
        self.W_enc, self.W_dec = sae.W_enc.detach().T, sae.W_dec.detach()  # (F, d)
        assert self.W_enc.is_contiguous() and self.W_dec.is_contiguous()
        mean, square = optimizer.mean, optimizer.square
        self.moments = (mean["W_enc"].T, square["W_enc"].T, mean["W_dec"], square["W_dec"])
        assert all(m.is_contiguous() for m in self.moments)
        self.refresh()

    @property
    def name(self) -> str:
        """What it computes with, in a few words."""
        return f"Triton kernels after {str(self.low).removeprefix('torch.')} screening"

    def refresh(self) -> None:
        """Take notice of weights that were changed from outside."""
        self.shadow = self.W_enc.to(self.low)

    @torch.no_grad()
    def step(self, x: Tensor, target: Tensor, context: StepContext, number: int, lr: float) -> StepReport:
        """One optimiser step on activations x and targets, both (n, d_in); `number` counts from 1."""
        from unbraid.sae.kernels import gpu

        sae, F, scale = self.sae, self.sae.config.d_sae, 2 / target.numel()
        x = sae.centred(x).contiguous()
        b_enc, b_dec = sae.b_enc.detach(), sae.b_dec.detach()
        latents, codes = gpu.top_k(x, self.W_enc, b_enc, self.shadow, sae.config.k)
        codes = codes.relu()
        error, gradient, squared = gpu.decode_and_compare(
            latents, codes, self.W_dec, b_dec, target.contiguous(), scale
        )
        first, entries = gpu.by_latent(latents, codes, F)
        d_b_enc = gpu.bias_gradient(first, entries, gradient)
        d_b_dec = scale * error.sum(dim=0)
        if sae.config.apply_b_dec_to_input:
            d_b_dec -= d_b_enc @ self.W_enc
        extra = self._auxiliary(x, error, context, d_b_enc, d_b_dec)
        beta2 = self.optimizer.beta2
        gpu.update(
            first, entries, codes, gradient, x, error, extra, (self.W_enc, self.W_dec), self.moments,
            self.shadow, scale, lr / (1 - BETA1**number), 1 / (1 - beta2**number),
            (BETA1, beta2), EPSILON,
        )  # fmt: skip
        sae.b_enc.grad, sae.b_dec.grad = d_b_enc, d_b_dec
        self.optimizer.step(number, lr, only=("b_enc", "b_dec"))
        counts = first.diff()
        return StepReport(squared_error=squared.double().sum(), fired=counts > 0, active=first[-1])

    def _auxiliary(
        self, x: Tensor, error: Tensor, context: StepContext, d_b_enc: Tensor, d_b_dec: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """AuxK's gradients of dead latents' rows, for `gpu.update`; those of the biases are added here."""
        rows = torch.full((len(self.W_enc),), -1, dtype=torch.int32, device=x.device)
        dead = context.dead.to(x.device).nonzero().squeeze(1)
        if not context.auxk_alpha or not len(dead):
            nothing = x.new_zeros(1, x.shape[1])
            return rows, nothing, nothing
        enc, dec, bias = (w[dead].requires_grad_() for w in (self.W_enc, self.W_dec, self.sae.b_enc.detach()))
        shift = torch.zeros_like(d_b_dec).requires_grad_()  # stands for a change of b_dec in the input
        with torch.enable_grad():
            auxk_gradients(x - shift, error, enc, dec, bias, context.auxk_alpha)
        assert not (enc.grad is None or dec.grad is None or bias.grad is None or shift.grad is None)
        rows[dead] = torch.arange(len(dead), dtype=torch.int32, device=x.device)
        d_b_enc[dead] += bias.grad
        if self.sae.config.apply_b_dec_to_input:
            d_b_dec += shift.grad
        return rows, enc.grad.contiguous(), dec.grad.contiguous()
