"""One edit's arithmetic in torch: tensors prepared once a device, an activation changed in O(n·d)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from unbraid.model.edits import Edit


@dataclass(frozen=True)
class _Prepared:
    probe: Tensor  # (n, d)
    bias: Tensor  # (n,)
    threshold: Tensor  # (n,)
    value: Tensor  # (n,)
    directions: Tensor  # (n, d), unit vectors for project_out and clip


class EditKernel:
    """Computes what `edits.apply_reference` defines, in float32 (float64 for float64 activations)."""

    def __init__(self, edit: Edit) -> None:
        self.edit = edit
        self._prepared: dict[tuple[torch.device, torch.dtype], _Prepared] = {}

    def change(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What to add to x (..., d), in x's dtype, and where at least one latent fires, shape (...)."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        at = self._on(x.device, dtype)
        h = x.to(dtype)
        p = functional.linear(h, at.probe, at.bias)  # (..., n)
        on = p > at.threshold
        match self.edit.operation:
            case "clamp":
                amount = at.value - p
            case "scale":
                amount = (at.value - 1) * p
            case "ablate":
                amount = -p
            case "add":
                amount = at.value.expand_as(p)
            case "project_out":
                amount = -functional.linear(h, at.directions)
            case "clip":
                amount = at.value - functional.linear(h, at.directions)
                on = on & (amount < 0)
        delta = torch.where(on, amount, 0.0) @ at.directions
        return delta.to(x.dtype), on.any(dim=-1)

    def _on(self, device: torch.device, dtype: torch.dtype) -> _Prepared:
        key = (device, dtype)
        if key not in self._prepared:
            edit = self.edit
            directions = torch.tensor(edit.directions, device=device, dtype=dtype)
            self._prepared[key] = _Prepared(
                probe=torch.tensor(edit.probe, device=device, dtype=dtype),
                bias=torch.tensor(edit.bias, device=device, dtype=dtype),
                threshold=torch.tensor(edit.threshold, device=device, dtype=dtype),
                value=torch.tensor(edit.values.copy(), device=device, dtype=dtype),
                directions=directions,
            )
        return self._prepared[key]
