"""The rows of a shard while they are collected, before there is a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from unbraid.activations.rows import Rows, Stored

COLUMNS = ("tokens", "documents", "positions")
"""What every row says of itself, int32."""
SCALE = ".scale"
"""What is added to a site's name for the scales of its rows, (n,) float32."""
PIECE = 512
"""Rows that are taken back from int8 at a time."""


class Filling:
    """A shard that is being filled, or written; its memory is used again for the next but one."""

    def __init__(self, capacity: int, widths: dict[str, int], stored: Stored) -> None:
        self.capacity, self.rounded = capacity, stored == "int8"
        self._sites = {site: Rows.empty(capacity, width, stored) for site, width in widths.items()}
        self._columns = {name: torch.empty(capacity, dtype=torch.int32) for name in COLUMNS}
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.filled = 0
        # By site sums of squares: of what rounding changed, and of the activations, whose sums come third.
        sites = self._sites if self.rounded else {}
        self._lost, self._squares = dict.fromkeys(sites, 0.0), dict.fromkeys(sites, 0.0)
        self._sums = {
            site: torch.zeros(rows.values.shape[1], dtype=torch.float64) for site, rows in sites.items()
        }

    def take(self, values: dict[str, Tensor], columns: dict[str, Tensor], start: int) -> int:
        """Copy as many rows as there is room for, from row `start` on; returns how many."""
        n = min(self.capacity - self.filled, len(columns["tokens"]) - start)
        for name, column in self._columns.items():
            column[self.filled : self.filled + n] = columns[name][start : start + n]
        for site, rows in self._sites.items():
            lost, squares = rows.put(self.filled, values[site][start : start + n], self._sums.get(site))
            if self.rounded:
                self._lost[site] += lost
                self._squares[site] += squares
        self.filled += n
        return n

    def restore(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Begin with the rows of a shorter shard that was written, whose record this is."""
        self.filled = record["rows"]
        for name, buffer in self._all().items():
            buffer[: self.filled] = tensors[name]
        for site, (lost, _) in (record["error"] or {}).items():
            self._lost[site] = lost
            for places in torch.arange(self.filled).split(PIECE):
                x = self._sites[site].take(places)
                self._squares[site] += float(x.norm()) ** 2
                self._sums[site] += x.sum(dim=0).double()

    def tensors(self) -> dict[str, Tensor]:
        """What was taken, by name."""
        return {name: buffer[: self.filled] for name, buffer in self._all().items()}

    def error(self) -> dict[str, tuple[float, float]] | None:
        """By site the sums of squares of what rounding changed, and of the distances from the mean."""
        if not self.rounded:
            return None
        of_mean = {site: float(sums.square().sum()) / self.filled for site, sums in self._sums.items()}
        return {site: (lost, self._squares[site] - of_mean[site]) for site, lost in self._lost.items()}

    def _all(self) -> dict[str, Tensor]:
        scales = {site + SCALE: rows.scale for site, rows in self._sites.items() if rows.scale is not None}
        return {site: rows.values for site, rows in self._sites.items()} | scales | self._columns
