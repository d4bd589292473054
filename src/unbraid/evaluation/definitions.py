"""What a metric is, in words that are hashed, so that numbers which were computed differently are never put
into one table."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal


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
