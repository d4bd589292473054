"""The fastest step that there is for an autoencoder."""

from __future__ import annotations

from typing import Literal

from unbraid.sae.base import SAE
from unbraid.sae.batchtopk import BatchTopKSAE
from unbraid.sae.jumprelu import JumpReLUSAE
from unbraid.sae.kernels import cpu
from unbraid.sae.kernels.cpu import Precision
from unbraid.sae.matryoshka import MatryoshkaSAE
from unbraid.sae.matryoshka_jumprelu import MatryoshkaJumpReLUSAE
from unbraid.sae.relu import ReLUSAE
from unbraid.sae.topk import TopKSAE
from unbraid.training import gpu
from unbraid.training.adam import Adam
from unbraid.training.compiled import CompiledStep, TopKStep
from unbraid.training.compiled_threshold import BatchTopKStep, JumpReLUStep, ReLUStep
from unbraid.training.step import PlainStep, Products, Stepper

Kernels = Literal["auto", "plain"]


def stepper(
    sae: SAE, optimizer: Adam, kernels: Kernels = "auto", precision: Products = "float32",
    max_grad_norm: float = 0.0,
) -> Stepper:  # fmt: skip
    """Compiled loops or a GPU's kernels for what they serve; PyTorch's operations, with products of that
    precision, otherwise, as where gradients are clipped: loops never have them all at once."""
    fast = kernels == "auto" and not max_grad_norm
    if fast and gpu.fits(sae):
        return gpu.GPUTopKStep(sae, optimizer)
    plain = PlainStep(sae, optimizer, precision, max_grad_norm)
    return (compiled(sae, optimizer) if fast else None) or plain


def compiled(sae: SAE, optimizer: Adam, *, precision: Precision | None = None) -> CompiledStep | None:
    """Steps in compiled loops, for float32 on the processor; None where there are none."""
    if not cpu.fits(*sae.parameters()):
        return None
    # A subclass may have another objective, so the type has to be exactly this.
    if type(sae) is TopKSAE:
        # The screen ranks by pre-activations alone, not by what a row's length makes of them.
        return TopKStep(sae, optimizer, precision=precision) if sae.unit_rows else None
    if type(sae) is BatchTopKSAE or type(sae) is MatryoshkaSAE:
        return BatchTopKStep(sae, optimizer, precision=precision)
    if type(sae) is ReLUSAE:
        return ReLUStep(sae, optimizer, precision=precision)
    if type(sae) is JumpReLUSAE or type(sae) is MatryoshkaJumpReLUSAE:
        # Loops have neither the window's gradient for the encoder nor the tanh term's for a row's length.
        plain = sae.options.through_encoder or (sae.options.penalty == "tanh" and not sae.unit_rows)
        return None if plain else JumpReLUStep(sae, optimizer, precision=precision)
    return None
