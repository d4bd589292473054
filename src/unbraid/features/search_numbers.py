"""Filters and orders over the numbers of latents.parquet, as SQL with bound values."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from unbraid.features.page import Index
from unbraid.manifest.errors import UserError

COMPARISONS = {"<": "<", "<=": "<=", ">": ">", ">=": ">=", "=": "=", "==": "=", "!=": "<>"}
_FORM = re.compile(r"\s*(\w+)\s*(<=|>=|==|!=|<|>|=)\s*(\S+)\s*")
_NUMBERS = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "UTINYINT", "USMALLINT", "UINTEGER",
            "UBIGINT", "FLOAT", "DOUBLE", "BOOLEAN")  # fmt: skip


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


def columns(index: Index) -> list[str]:
    """The columns that can be compared and ordered by: latents.parquet's numbers."""
    found = index.query("DESCRIBE SELECT * FROM latents")
    return [row["column_name"] for row in found if row["column_type"] in _NUMBERS]


def matching(
    index: Index, where: Sequence[str | Condition], order: str, limit: int
) -> Iterator[tuple[int, float, str]]:
    """(latent, value of the column ordered by, why) of the first `limit` latents that fulfil `where`.

    `order` is a column, with "-" before it for the largest first; equal ones come by their number.  Raises
    UserError naming a column or a condition that does not exist.
    """
    known = columns(index)

    def column(name: str) -> str:
        if name not in known:
            raise UserError(f"latents have no number {name!r}; there are {', '.join(known)}")
        return f'"{name}"'  # stands in the table, so it can stand in the query

    conditions = [c if isinstance(c, Condition) else Condition.parse(c) for c in where]
    for condition in conditions:
        if condition.comparison not in COMPARISONS:
            raise UserError(f"{condition.comparison!r} compares nothing; use {' '.join(COMPARISONS)}")
    by = column(order.removeprefix("-"))
    tests = [f"{column(c.column)} {COMPARISONS[c.comparison]} ?" for c in conditions]
    values: list[Any] = [c.value for c in conditions]
    rows = index.query(
        f"SELECT latent, {by} AS value FROM latents WHERE {' AND '.join([f'{by} IS NOT NULL', *tests])} "
        f"ORDER BY value {'DESC' if order.startswith('-') else 'ASC'}, latent LIMIT ?",
        [*values, max(limit, 0)],
    )
    for row in rows:
        yield row["latent"], float(row["value"]), f"{order.removeprefix('-')} {row['value']:.4g}"
