"""JumpReLU: a latent fires where its pre-activation exceeds its own threshold, and then with the full value.

    p = (x − b_dec) W_enc + b_enc,   f = p · [p > θ],   x̂ = f W_dec + b_dec

θ: (d_sae,), not negative. Rajamanoharan et al. 2024, "Jumping ahead", arXiv 2407.14435. It is also the
form in which a trained BatchTopK autoencoder is used, and what is read from other tools; x − b_dec is x
where the configuration says so.

Training: loss = ‖x − x̂‖² + λ S(p, θ) + μ Σ_{j dead} ReLU(θ_j − p_j) ‖W_dec[j]‖ with one of

    step   S = Σ_j [p_j > θ_j], the L0 (Rajamanoharan et al.)
    tanh   S = Σ_j tanh(c f_j ‖W_dec[j]‖) (Anthropic, "Circuits updates", January 2025)

The step function has no gradient, so one is put in its place: with a window K(u) = [|u| < ½] of width ε,

    ∂[p > θ]/∂θ = −K((p − θ)/ε)/ε,   ∂f/∂θ = −θ K((p − θ)/ε)/ε

and, with `through_encoder` (Anthropic's way), the negative of these for p. The last term reaches latents
that never fire; it counts only those here. θ itself is trained, not its logarithm, and kept from falling
below 0, so that Adam can move it from a small start.

Rows of W_dec have unit length, or, with `free_rows`, any length while it trains (`sae.free_rows`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.codes import CHUNK_ROWS
from unbraid.sae.elementwise import ElementwiseSAE, Entries
from unbraid.sae.free_rows import FreeRows, FreeRowsOptions
from unbraid.sae.objective import StepContext, StepReport
from unbraid.sae.options import EDGE, Positive, Weight
from unbraid.sae.scaling import Scaling


@dataclass(frozen=True)
class JumpReLUOptions(FreeRowsOptions):
    """How JumpReLU is trained, on activations with a mean square of 1 per dimension."""

    __pydantic_config__ = EDGE

    l0: Weight = 1.0
    """Weight λ of the sparsity term, the price in squared error of one latent that fires."""
    penalty: Literal["step", "tanh"] = "step"
    """The sparsity term S."""
    tanh_scale: Positive = 4.0
    """c in the tanh term."""
    bandwidth: Positive = 0.05
    """ε, the width of the window in which a pre-activation moves its threshold. The paper's 0.001, which is
    for activations of length 1, is 0.06 in these units where d_in is 3,584 as there."""
    start: Weight = 0.1
    """Threshold of every latent to begin with."""
    through_encoder: bool = False
    """Whether the window's gradient also reaches pre-activations, and so encoder and biases."""
    pre_act: Weight = 0.001
    """Weight μ of the term that pulls dead latents towards their thresholds."""


class JumpReLUSAE(FreeRows, ElementwiseSAE):
    """Sparse by threshold, one for each latent."""

    Options = JumpReLUOptions
    options: JumpReLUOptions
    against_death = "a larger --set pre_act"
    latent_axes: ClassVar[Mapping[str, int]] = {**SAE.latent_axes, "threshold": 0}

    threshold: Tensor  # here there always is one

    def __init__(self, config: SAEConfig) -> None:
        super().__init__(config)
        self.threshold = nn.Parameter(torch.zeros(config.d_sae))  # pyright: ignore[reportIncompatibleVariableOverride]

    def activate(self, entries: Entries) -> Tensor:
        """p where it exceeds the threshold."""
        options = self.options
        return _jump(
            entries.pre, entries.of(self.threshold), True, options.bandwidth, options.through_encoder
        )

    def firing_threshold(self) -> Tensor:
        """θ, (d_sae,)."""
        return self.threshold.detach()

    def edge(self) -> Tensor:
        """Half a window below the threshold, but not below 0, where no latent fires."""
        return (self.threshold.detach() - self.options.bandwidth / 2).clamp(min=0)

    def loss(self, entries: Entries, codes: Tensor, target: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """λ S."""
        options = self.options
        if options.penalty == "step":
            theta = entries.of(self.threshold)
            cost = _jump(entries.pre, theta, False, options.bandwidth, options.through_encoder)
        else:
            cost = (options.tanh_scale * codes * entries.of(self.row_norms())).tanh()
        return options.l0 * entries.only_real(cost).sum(), 0.0

    def backward(self, x: Tensor, target: Tensor, context: StepContext) -> StepReport:
        """The objective above."""
        report = super().backward(x, target, context)
        if self.options.pre_act and bool(context.dead.any()):
            factor = context.ramp * self.options.pre_act / target.numel()
            for rows in x.split(CHUNK_ROWS):
                short = (self.threshold - self.pre_activations(rows)).relu()[:, context.dead]
                (factor * (short * self.row_norms()[context.dead]).sum()).backward()
        return report

    @torch.no_grad()
    def initialise(self, x: Tensor, target: Tensor, generator: torch.Generator) -> None:
        """As every autoencoder, with all thresholds where the options say."""
        self.threshold.fill_(self.options.start)
        super().initialise(x, target, generator)

    @torch.no_grad()
    def constrain(self) -> None:
        """Decoder rows of unit length where they are not free, thresholds of 0 or more."""
        super().constrain()
        self.threshold.clamp_(min=0)

    @torch.no_grad()
    def fold(self, source: Scaling, target: Scaling) -> None:
        """Thresholds are in the units of the latents."""
        super().fold(source, target)
        self.threshold.div_(target.unit)

    @torch.no_grad()
    def revive(self, latents: Tensor, x: Tensor, target: Tensor) -> None:
        """Also give revived latents a usual threshold."""
        super().revive(latents, x, target)
        self.threshold[latents] = self.threshold.median()


class _Jump(torch.autograd.Function):
    """[p > θ], or p · [p > θ] with `keep`, and the window's gradients; all tensors of one shape."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, theta: Tensor, keep: bool, width: float, through: bool) -> Tensor:
        ctx.save_for_backward(p, theta)
        ctx.options = keep, width, through
        on = ((p > theta) & (p > 0)).to(p.dtype)
        return p * on if keep else on

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        p, theta = cast("tuple[Tensor, Tensor]", ctx.saved_tensors)
        keep, width, through = ctx.options
        # p > 0: a latent below 0 does not fire, whatever its threshold, and belongs to no entry.
        window = (((p - theta).abs() < width / 2) & (p > 0)) * grads[0] / width
        if keep:
            window = window * theta
        d_p = window if through else torch.zeros_like(window)
        if keep:
            d_p = d_p + grads[0] * ((p > theta) & (p > 0))
        return d_p, -window, None, None, None


def _jump(p: Tensor, theta: Tensor, keep: bool, width: float, through: bool) -> Tensor:
    return cast(Tensor, _Jump.apply(p, theta, keep, width, through))
