"""Choosing documents so that rare strata are not drowned by frequent ones.

The first N documents of a stratum are all taken, and after them its n-th with probability √(N / n). Of n ≫ N
documents about 2√(N n) remain, so strata count by the root of their size (as in the sampling of languages at
temperature 2). The rule looks at one stratum's own count alone: it needs no second pass, and a stratum that
turns up late changes nothing for the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from unbraid.activations.documents import Document
from unbraid.manifest.errors import UserError

MOST_STRATA = 1000
"""More than that are no strata, and would make a manifest that nobody can read."""


@dataclass
class Strata:
    """Iterate over `sample` once; then the counts describe what was read."""

    full: int
    """N: documents that each stratum gives in full."""
    seed: int
    """Seed of the choice; it depends on nothing but this, the stratum and n."""
    read: dict[str, int] = field(default_factory=dict[str, int])
    """Documents read so far, by stratum."""
    kept: dict[str, int] = field(default_factory=dict[str, int])
    """Documents passed on so far, by stratum."""

    def sample(self, documents: Iterable[Document]) -> Iterator[Document]:
        """The chosen documents. Raises UserError for one without a stratum, and for too many strata."""
        for document in documents:
            name = document.stratum
            if name is None:
                raise UserError(
                    f"document {document.id} has no field stratum; give every document one or leave out"
                    " --per-stratum"
                )
            n = self.read[name] = self.read.get(name, 0) + 1
            if len(self.read) > MOST_STRATA:
                raise UserError(
                    f"the corpus has more than {MOST_STRATA} strata; is the field stratum what you mean?"
                )
            if n <= self.full or draw(self.seed, name, n).random() ** 2 < self.full / n:
                self.kept[name] = self.kept.get(name, 0) + 1
                yield document

    def facts(self) -> dict[str, dict[str, int]]:
        """For the manifest: documents read and kept, by stratum."""
        return {name: {"read": n, "kept": self.kept[name]} for name, n in sorted(self.read.items())}


def draw(*key: object) -> np.random.Generator:
    """Random numbers that depend on `key` alone, so that a resumed run draws them again."""
    digest = hashlib.sha256("\n".join(map(repr, key)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))
