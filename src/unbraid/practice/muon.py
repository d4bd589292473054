"""Muon: momentum whose update is orthogonalised, so that every direction of a weight matrix learns at the
same rate.

Jordan et al. 2024 ("Muon: an optimizer for hidden layers in neural networks").  `torch.optim.Muon` computes
the orthogonalisation in bfloat16, one matrix at a time; on a processor without bfloat16 units that costs more
than half a training step of the practice assistant.  Here it runs in float32 on all matrices of one shape
together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrices of g (batch, rows, columns) by the paper's quintic Newton–Schulz
    iteration.
    """
    tall = g.shape[1] > g.shape[2]
    x = g.mT if tall else g
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; for 2-D weights only."""

    def __init__(
        self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every weight that has a gradient."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape[weight.shape].append((weight, weight.grad))
            for shape, weights in by_shape.items():
                directions: list[Tensor] = []
                for weight, gradient in weights:
                    if not self.state[weight]:
                        self.state[weight]["momentum"] = torch.zeros_like(weight)
                    buffer = self.state[weight]["momentum"]
                    buffer.lerp_(gradient, 1 - momentum)
                    directions.append(gradient.lerp(buffer, momentum))
                scale = lr * max(1.0, shape[0] / shape[1]) ** 0.5
                for (weight, _), update in zip(weights, orthogonalise(torch.stack(directions)), strict=True):
                    weight.mul_(1 - lr * group["weight_decay"]).add_(update, alpha=-scale)
