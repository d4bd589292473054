"""Adam against torch's, with each architecture's own β₂ or one that is given."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from unbraid.sae.base import SAEConfig
from unbraid.sae.registry import build
from unbraid.training.adam import Adam


@pytest.mark.parametrize(
    ("kind", "given", "beta2"),
    [("topk", None, 0.99), ("topk", 0.9, 0.9), ("jumprelu", None, 0.99), ("matryoshka", None, 0.999)],
)
def test_steps_are_those_of_torch(kind: str, given: float | None, beta2: float) -> None:
    ours = build(SAEConfig(kind, 5, 32, 0 if kind == "jumprelu" else 3))
    theirs = deepcopy(ours)
    adam, other = Adam(ours, given), torch.optim.Adam(theirs.parameters(), lr=0.01, betas=(0.9, beta2))
    generator = torch.Generator().manual_seed(0)
    for number in range(1, 31):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator) * (number % 5 == 1)  # fires, and is silent
            q.grad = p.grad.clone()
        adam.step(number, 0.01)
        other.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
