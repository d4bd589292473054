"""Dead latents: start them anew where the autoencoder does worst, and notice when they become more."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unbraid.sae.base import SAE
from unbraid.training.adam import Adam

RISE = 0.05
"""By how much the dead share has to rise over its lowest for a run to speak up."""


@torch.no_grad()
def resample(
    sae: SAE, optimizer: Adam, x: Tensor, target: Tensor, dead: Tensor, generator: torch.Generator
) -> None:
    """Point dead latents, (d_sae,) booleans, at activations of the batch x (n, d_in), target (n, d_out).

    Bricken et al. 2023, "Towards monosemanticity": an activation is drawn with a probability proportional
    to the square of its loss; the optimiser forgets what it knew of these latents.
    """
    latents = dead.nonzero().squeeze(1)
    loss = (target - sae(x).x_hat).square().sum(dim=1)
    if not len(latents) or not bool((loss > 0).any()):
        return
    weights = (loss / loss.max()).square().cpu()
    drawn = torch.multinomial(weights, len(latents), replacement=True, generator=generator)
    sae.revive(latents, x[drawn], target[drawn])
    for name, axis in sae.latent_axes.items():
        if name in optimizer.parameters:
            for moment in (optimizer.mean[name], optimizer.square[name]):
                moment.index_fill_(axis, sae.places(name, latents), 0.0)


@dataclass(frozen=True)
class DeadWatch:
    """How the dead share has developed; immutable, so that a checkpoint can hold it."""

    lowest: float | None = None
    """The lowest dead share since latents could first be dead."""
    warned: bool = False
    """Whether the run has said that it rose."""

    def look(self, share: float) -> DeadWatch:
        """After a dead share was measured; `warned` turns true when it has risen by more than RISE."""
        lowest = share if self.lowest is None else min(share, self.lowest)
        return DeadWatch(lowest, self.warned or share > lowest + RISE)
