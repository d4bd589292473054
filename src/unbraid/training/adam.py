"""Adam, written out: four tensors need no framework, and its state is plain tensors for a checkpoint.

(`torch.optim` imports torch's compiler at its first step, which takes longer than many a training run here.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from unbraid.sae.base import SAE

BETA1, EPSILON = 0.9, 1e-8


class Adam:
    """Kingma and Ba 2015, arXiv 1412.6980, without weight decay; β₂ is by default the architecture's."""

    def __init__(self, sae: SAE, beta2: float | None = None) -> None:
        self.parameters = dict(sae.named_parameters())
        self.beta2 = sae.beta2 if beta2 is None else beta2
        self.mean = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.square = {name: torch.zeros_like(p) for name, p in self.parameters.items()}

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self, number: int, lr: float, only: Sequence[str] | None = None) -> None:
        """Move every parameter (or those named) by its gradient; `number` counts steps from 1."""
        unbias_mean, unbias_square = 1 - BETA1**number, 1 - self.beta2**number
        for name in self.parameters if only is None else only:
            parameter = self.parameters[name]
            grad = parameter.grad
            if grad is None:
                continue
            mean = self.mean[name].lerp_(grad, 1 - BETA1)
            square = self.square[name].mul_(self.beta2).addcmul_(grad, grad, value=1 - self.beta2)
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
