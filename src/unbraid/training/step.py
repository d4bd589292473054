"""One optimiser step, in the form to read; `compiled` has the same one in compiled loops."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from unbraid.sae.base import SAE
from unbraid.sae.objective import StepContext, StepReport
from unbraid.training.adam import Adam

Products = Literal["float32", "bf16"]
"""What matrices are multiplied in."""


class Stepper(Protocol):
    """Moves an autoencoder by one batch after the other."""

    @property
    def name(self) -> str:
        """What it computes with, in a few words."""
        ...

    @property
    def own_threads(self) -> bool:
        """Whether it starts threads of its own. Torch should then have one between the steps: after every
        operation its others wait for the next by spinning, on the processors that the step's threads need.
        """
        ...

    def step(self, x: Tensor, target: Tensor, context: StepContext, number: int, lr: float) -> StepReport:
        """Learn from activations x (n, d_in) and targets (n, d_out); `number` counts from 1."""
        ...

    def refresh(self) -> None:
        """Take notice of weights that were changed from outside."""
        ...


class PlainStep:
    """PyTorch's own operations, for every architecture and device."""

    own_threads = False

    def __init__(
        self, sae: SAE, optimizer: Adam, precision: Products = "float32", max_grad_norm: float = 0.0
    ) -> None:
        self.sae, self.optimizer, self.low = sae, optimizer, precision == "bf16"
        self.max_grad_norm = max_grad_norm

    @property
    def name(self) -> str:
        """What it computes with, in a few words."""
        return (
            "plain PyTorch"
            + ", products of bfloat16" * self.low
            + ", gradients clipped" * (self.max_grad_norm > 0)
        )

    def step(self, x: Tensor, target: Tensor, context: StepContext, number: int, lr: float) -> StepReport:
        """Gradients, without what only changes lengths, clipped; Adam; unit decoder rows again."""
        self.optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.low):
            report = self.sae.backward(x, target, context)
        self.sae.constrain_gradient()
        if self.max_grad_norm:  # of errors summed over dimensions, of which the loss is the mean
            nn.utils.clip_grad_norm_(self.sae.parameters(), self.max_grad_norm / target.shape[1])
        self.optimizer.step(number, lr)
        self.sae.constrain()
        return report

    def refresh(self) -> None:
        """Nothing is kept that could be out of date."""
