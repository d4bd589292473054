"""Activations in memory as they are stored: float32, float16, or int8 with one float32 scale a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from unbraid.activations.loops import halve, round_rows

Stored = Literal["float16", "float32", "int8"]
"""How activations are stored. int8: every row divided by its own largest absolute value / 127 and rounded."""
LEAST = np.float32(1e-30)
"""The least scale: a row of zeros has one, too."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Memory for activations, filled again and again: fresh memory's pages cost as much as filling them."""

    values: Tensor
    """(n, d) in the stored type."""
    scale: Tensor | None
    """Of int8, what each row was divided by, (n,) float32."""

    @classmethod
    def empty(cls, n: int, d: int, stored: str) -> Rows:
        """Room for n activations of d numbers."""
        # NumPy asks the system for large pages, of which fewer have to be made.
        values = torch.from_numpy(np.empty((n, d), stored))
        return cls(values, torch.empty(n) if stored == "int8" else None)

    def __len__(self) -> int:
        return len(self.values)

    def put(self, start: int, x: Tensor, sums: Tensor | None = None) -> tuple[float, float]:
        """Store x (m, d), floats that the stored type can hold, from row `start` on.

        Returns Σ of squares of what rounding to int8 changed and of x, both 0 for floats; adds Σ x to sums
        (d,) float64, where given and rounded.
        """
        here, x = slice(start, start + len(x)), x.cpu()
        values = self.values[here].numpy()
        # Copied and rounded by one thread: torch's others would wait for more by spinning, on the processors
        # that hash and write.
        if x.dtype == self.values.dtype:
            np.copyto(values, x.numpy())
            return 0.0, 0.0
        numbers = x.float().contiguous().numpy()
        if self.scale is not None:
            total = torch.zeros(x.shape[1], dtype=torch.float64) if sums is None else sums
            return round_rows(numbers, LEAST, values, self.scale[here].numpy(), total.numpy())
        if self.values.dtype == torch.float16:
            halve(numbers, values)
        else:
            np.copyto(values, numbers)
        return 0.0, 0.0

    def take(self, order: Tensor | None = None) -> Tensor:
        """Rows of these numbers, or all: (m, d) in the stored type, in float32 where that is int8."""
        values = self.values if order is None else self.values.index_select(0, order)
        if self.scale is None:
            return values
        return values * (self.scale if order is None else self.scale.index_select(0, order))[:, None]


def limit(dtype: str) -> float:
    """The largest number that can be stored; int8 rows have a float32 scale."""
    return torch.finfo(torch.float16 if dtype == "float16" else torch.float32).max


def misfit(rows: Tensor, dtype: str) -> tuple[int, float] | None:
    """The row and the size of the largest of the values (n, d) where `dtype` cannot hold it; infinity stands
    for what is no number too. None when all fit: a silent infinity would poison all that follows.
    """
    if not rows.numel():
        return None
    largest = rows.abs().amax(dim=1).cpu().double().nan_to_num(nan=torch.inf, posinf=torch.inf)
    worst = int(largest.argmax())
    value = float(largest[worst])
    return None if value <= limit(dtype) else (worst, value)
