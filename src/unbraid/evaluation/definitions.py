"""What a metric is, in words that are hashed, so that numbers which were computed differently are never put
into one table."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from unbraid.manifest.errors import UserError


@dataclass(frozen=True)
class Definition:
    """How a number is computed."""

    meaning: str
    """A few words for a table."""
    formula: str
    """Exactly what is computed, and over what; a change of the computation changes these words."""
    better: Literal["lower", "higher", "neither"] = "neither"
    """Which way is good."""

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits that stand for the formula."""
        return hashlib.sha256(self.formula.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Undefined:
    """A metric that has no value here. It is named, and never a number."""

    why: str
    """A few words on the reason."""


def require_same(results: Sequence[tuple[str, Mapping[str, str]]]) -> None:
    """Raise UserError when two results, a name and the definitions' ids by metric, differ in a definition
    that both have."""
    known: dict[str, tuple[str, str]] = {}
    for result, definitions in results:
        for metric, one in definitions.items():
            first, other = known.setdefault(metric, (result, one))
            if one != other:
                raise UserError(
                    f"{first} and {result} cannot stand in one table: {metric} is defined in two ways "
                    f"({other} and {one}); evaluate both with the same version of unbraid"
                )
