"""Filters and orders over the numbers of latents.parquet."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyarrow import types

from unbraid.features.page import Index
from unbraid.features.tables import SCHEMAS, Table
from unbraid.manifest.errors import UserError

COMPARISONS: Mapping[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "=": operator.eq,
    "==": operator.eq, "!=": operator.ne,
}  # fmt: skip
COLUMNS = tuple(
    field.name
    for field in SCHEMAS["latents"]
    if types.is_integer(field.type) or types.is_floating(field.type)
)
"""The columns that can be compared and ordered by: latents.parquet's numbers."""
_FORM = re.compile(r"\s*(\w+)\s*(<=|>=|==|!=|<|>|=)\s*(\S+)\s*")


@dataclass(frozen=True)
class Condition:
    """A column of latents.parquet compared with a number."""

    column: str
    """The column."""
    comparison: str
    """One of < <= > >= = !=."""
    value: float
    """The number."""

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Read a condition such as density<0.01; raises UserError for anything else."""
        form = _FORM.fullmatch(text)
        try:
            value = float(form[3]) if form else math.nan
        except ValueError:
            value = math.nan
        if form is None or not math.isfinite(value):
            raise UserError(f"{text!r} is no condition; write one such as density<0.01 or count>=10")
        return cls(form[1], form[2], value)


class Numbers:
    """The numbers of latents.parquet; each column is read when first asked for, and kept: 8 MB a million."""

    def __init__(self, index: Index) -> None:
        self._table = Table(index.folder, "latents")
        self._kept: dict[str, NDArray[np.float64]] = {}

    def column(self, name: str) -> NDArray[np.float64]:
        """A number of every latent (d_sae,), NaN where it has none; raises UserError if there is no such."""
        if name not in COLUMNS:
            raise UserError(f"latents have no number {name!r}; there are {', '.join(COLUMNS)}")
        if name not in self._kept:
            self._kept[name] = self._table.column(name).to_numpy().astype(np.float64)
        return self._kept[name]

    def matching(
        self, where: Sequence[str | Condition], order: str, limit: int
    ) -> Iterator[tuple[int, float, str]]:
        """(latent, value of the column ordered by, why) of the first `limit` latents that fulfil `where`.

        `order` is a column, with "-" before it for the largest first; equal ones come by their number.  A
        latent without a number fulfils no condition on it.  Raises UserError naming a column or a condition
        that does not exist.
        """
        conditions = [c if isinstance(c, Condition) else Condition.parse(c) for c in where]
        for condition in conditions:
            if condition.comparison not in COMPARISONS:
                raise UserError(f"{condition.comparison!r} compares nothing; use {' '.join(COMPARISONS)}")
        by = order.removeprefix("-")
        values = self.column(by)
        fulfil = ~np.isnan(values)
        for condition in conditions:
            given = self.column(condition.column)
            fulfil &= COMPARISONS[condition.comparison](given, condition.value) & ~np.isnan(given)
        latents = np.flatnonzero(fulfil)
        first = smallest(-values[latents] if order.startswith("-") else values[latents], limit)
        for latent in latents[first].tolist():
            yield latent, float(values[latent]), f"{by} {values[latent]:.4g}"


def smallest(values: NDArray[Any], limit: int) -> NDArray[np.int64]:
    """Places of the `limit` smallest values, smallest first, the lower place first among equal ones."""
    limit = min(limit, len(values))
    if limit <= 0:
        return np.empty(0, dtype=np.int64)
    bar = np.partition(values, limit - 1)[limit - 1]
    near = np.flatnonzero(values <= bar)
    return near[np.argsort(values[near], kind="stable")][:limit]
