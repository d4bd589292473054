"""Adam, written out: four tensors need no framework, and its state is plain tensors for a checkpoint.

(`torch.optim` imports torch's compiler at its first step, which takes longer than many a training run here.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

BETA_MEAN, BETA_SQUARE, EPSILON = 0.9, 0.99, 1e-8
"""β₂ is 0.99, not the usual 0.999: a latent that was silent for long has a faded second moment, and its next
step is lr · (1 − β₁) / √(1 − β₂), 3.2 lr with 0.999 and 1.0 lr with 0.99. FVU and ΔCE at equal L0 are lower
in all six architectures that were tried with both (benchmarks/RESULTS.md, "sweep: Adam's β₂")."""


class Adam:
    """Kingma and Ba 2015, arXiv 1412.6980, without weight decay, on all parameters of a module."""

    def __init__(self, module: nn.Module) -> None:
        self.parameters = dict(module.named_parameters())
        self.mean = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.square = {name: torch.zeros_like(p) for name, p in self.parameters.items()}

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self, number: int, lr: float, only: Sequence[str] | None = None) -> None:
        """Move every parameter (or those named) by its gradient; `number` counts steps from 1."""
        unbias_mean, unbias_square = 1 - BETA_MEAN**number, 1 - BETA_SQUARE**number
        for name in self.parameters if only is None else only:
            parameter = self.parameters[name]
            grad = parameter.grad
            if grad is None:
                continue
            mean = self.mean[name].lerp_(grad, 1 - BETA_MEAN)
            square = self.square[name].mul_(BETA_SQUARE).addcmul_(grad, grad, value=1 - BETA_SQUARE)
            size = (square / unbias_square).sqrt_().add_(EPSILON)
            parameter.addcdiv_(mean, size, value=-lr / unbias_mean)

    def tensors(self) -> dict[str, Tensor]:
        """The moments by name."""
        moments = {"mean": self.mean, "square": self.square}
        return {f"adam.{kind}.{name}": t for kind, named in moments.items() for name, t in named.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` gave."""
        for key, moment in self.tensors().items():
            moment.copy_(tensors[key])
