"""What a pass over a corpus knows of every latent: counted, merged, saved and gone on with.

Memory depends on the number of latents alone.  A state is a function of the documents that it has seen: not
of the batches or parts in which they came, nor of the order in which parts were merged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unbraid.features import hashes, loops
from unbraid.features.around import closed, even, nowhere, opened
from unbraid.features.coactive import TokenSample
from unbraid.features.groups import HISTOGRAM_BINS, INTERVALS, LEVELS, OCTAVES
from unbraid.features.hashes import F32, I32, I64, U64
from unbraid.features.loops import Counts, Rows, Slots
from unbraid.features.pairs import Pairs, TokenCounts
from unbraid.manifest.errors import UserError
from unbraid.manifest.files import writing
from unbraid.sae.kernels.cpu import Lists, side_by_side

POSITION_OCTAVES = 20
"""Positions 0, 1, 2–3, 4–7, … and everything from 2^18 on."""
MOST_STRATA = 1000
SLOTS = ("best", "sample", "spread")
VERSION = 2
"""Of what `State.save` writes."""


@dataclass(frozen=True)
class Sizes:
    """How much a state holds of every latent."""

    best: int
    """Candidates for its strongest examples."""
    sample: int
    """A uniform sample of its firings."""
    per_interval: int
    """A uniform sample of those in each interval of equal width."""
    reach: int
    """Tokens of activations on either side of each."""
    coactive: int
    """Entries of the sample of tokens."""


@dataclass
class Seen:
    """What was seen of the corpus."""

    tokens: int = 0
    """Counted tokens."""
    documents: int = 0
    windows: int = 0
    strata: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    """By name: its number in this state, documents and counted tokens."""
    octaves: list[int] = field(default_factory=lambda: [0] * POSITION_OCTAVES)
    """Counted tokens by position in their window: 0, 1, 2–3, …"""
    parts: dict[str, str] = field(default_factory=dict[str, str])
    """By number: SHA-256 of a part's document ids and tokens."""


class State:
    """Everything that is known so far; `folder` takes what does not fit into memory."""

    def __init__(self, d_sae: int, sizes: Sizes, folder: Path) -> None:
        self.d_sae, self.sizes, self.folder = d_sae, sizes, folder
        self.counts = _no_counts(d_sae)
        self.best = _no_slots(d_sae, sizes.best)
        self.sample = _no_slots(d_sae, sizes.sample)
        self.spread = _no_slots(d_sae, INTERVALS * sizes.per_interval)
        self.tokens = TokenCounts(folder, d_sae)
        self.together = TokenSample(d_sae, sizes.coactive)
        self.occurrences: I64 = np.zeros(0, np.int64)
        """Counted tokens by number in the vocabulary; as long as the largest number seen asks for."""
        self.seen = Seen()

    def add(self, starts: I64, latents: I32, values: F32, rows: Rows) -> None:
        """Take in a stretch of text: the codes of row i are latents, values[starts[i]:starts[i + 1]], without
        zeros; rows in reading order, stretches in the order of their documents.
        """
        lists = Lists.of(starts, latents, values, self.d_sae)
        by_latent = values[lists.entries]
        cuts = lists.cuts()
        best, sample, spread = (opened(getattr(self, name)) for name in SLOTS)

        def some(part: int) -> None:
            loops.take_in(
                int(cuts[part]), int(cuts[part + 1]), lists.first, lists.rows, by_latent, rows, self.counts,
                best, sample, spread,
            )  # fmt: skip

        side_by_side(some, range(len(cuts) - 1))
        for name, slots in zip(SLOTS, (best, sample, spread), strict=True):
            of = lists.first, lists.rows, by_latent, rows
            setattr(self, name, closed(slots, _no_slots(0, 0), *of, self.sizes.reach))
        self.tokens.add(lists.first, rows["token"][lists.rows])
        self.together.add(_apart(rows["key"]), starts, latents)
        self._count_occurrences(np.bincount(rows["token"]))
        self.seen.tokens += len(rows)
        octave = np.frexp(rows["position"].astype(np.float64))[1].clip(max=POSITION_OCTAVES - 1)
        for number, n in enumerate(np.bincount(octave, minlength=POSITION_OCTAVES).tolist()):
            self.seen.octaves[number] += n

    def _count_occurrences(self, found: NDArray[np.int64]) -> None:
        total = np.zeros(max(len(found), len(self.occurrences)), np.int64)
        total[: len(self.occurrences)] += self.occurrences
        total[: len(found)] += found
        self.occurrences = total

    def stratum(self, name: str) -> int:
        """The number of a stratum; a new one gets the next."""
        if name not in self.seen.strata:
            if len(self.seen.strata) == MOST_STRATA:
                raise UserError(
                    f"the corpus has more than {MOST_STRATA} strata; is the field stratum what you mean?"
                )
            self.seen.strata[name] = [len(self.seen.strata), 0, 0]
            wider = np.zeros((self.d_sae, len(self.seen.strata)), np.int64)
            wider[:, : self.counts.strata.shape[1]] = self.counts.strata
            self.counts = self.counts._replace(strata=wider)
        return self.seen.strata[name][0]

    def strata(self) -> list[str]:
        """The strata's names, sorted; none where no document has one."""
        return sorted(self.seen.strata) if set(self.seen.strata) != {""} else []

    def merge(self, more: State) -> None:
        """Add what another state has seen, of other documents and with the same sizes; it is used up."""
        order = [self.stratum(name) for name in more.seen.strata]
        strata = np.zeros_like(self.counts.strata)
        strata[:, order] = more.counts.strata
        counts = more.counts._replace(strata=strata)
        cuts = even(self.d_sae)
        best, sample, spread = mine = [opened(getattr(self, name)) for name in SLOTS]
        more_best, more_sample, more_spread = theirs = [opened(getattr(more, name)) for name in SLOTS]

        def some(part: int) -> None:
            loops.merge(
                int(cuts[part]), int(cuts[part + 1]), self.counts, best, sample, spread,
                counts, more_best, more_sample, more_spread,
            )  # fmt: skip

        side_by_side(some, range(len(cuts) - 1))
        for name, slots, other in zip(SLOTS, mine, theirs, strict=True):
            none = np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32)
            setattr(self, name, closed(slots, other, *none, np.zeros(0, loops.ROW), self.sizes.reach))
        for block, begin in zip(more.tokens.blocks(), range(0, self.d_sae, 512), strict=True):
            first = np.zeros(self.d_sae + 1, np.int64)
            first[begin : begin + len(block.first)] = block.first
            first[begin + len(block.first) :] = block.first[-1]
            self.tokens.add(first, block.token, block.times)
        self.together.add(
            more.together.keys, more.together.starts, more.together.latents, more.together.level
        )
        self._count_occurrences(more.occurrences)
        for name, (_, documents, tokens) in more.seen.strata.items():
            self.seen.strata[name][1] += documents
            self.seen.strata[name][2] += tokens
        self.seen.tokens += more.seen.tokens
        self.seen.documents += more.seen.documents
        self.seen.windows += more.seen.windows
        self.seen.octaves = [a + b for a, b in zip(self.seen.octaves, more.seen.octaves, strict=True)]
        self.seen.parts |= more.seen.parts

    def drop_examples(self) -> None:
        """Forget all examples, and free most of the memory."""
        self.best = self.sample = self.spread = _no_slots(self.d_sae, 0)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All arrays by name."""
        together, held = self.together, self.tokens.held
        return {
            **{f"counts.{name}": array for name, array in self.counts._asdict().items()},
            **{f"{s}.{name}": getattr(getattr(self, s), name) for s in SLOTS for name in _SAVED},
            "tokens.first": held.first,
            "tokens.token": held.token,
            "tokens.times": held.times,
            "together.keys": together.keys,
            "together.sizes": together.sizes,
            "together.latents": together.latents,
            "occurrences": self.occurrences,
        }

    def save(self, path: Path) -> dict[str, Any]:
        """Write all arrays to a file; returns the rest of the state as JSON values."""
        with writing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **self.arrays())
        return {
            "seen": self.seen.__dict__,
            "level": self.together.level,
            "runs": [self.tokens.oldest, self.tokens.runs, self.tokens.firings],
        }

    def load(self, path: Path, rest: Mapping[str, Any]) -> None:
        """Become what was saved."""
        found = dict(np.load(path, allow_pickle=False))
        self.counts = Counts(*(found[f"counts.{name}"] for name in Counts._fields))
        for slots in SLOTS:
            held = {name: found[f"{slots}.{name}"] for name in _SAVED}
            setattr(self, slots, Slots(**held, source=nowhere()))
        self.tokens.held = Pairs(*(found[f"tokens.{name}"] for name in ("first", "token", "times")))
        self.tokens.oldest, self.tokens.runs, self.tokens.firings = rest["runs"]
        self.tokens.tidy()
        # Copies, for what grows where it is must own its memory.
        together = (found[f"together.{name}"].copy() for name in ("keys", "sizes", "latents"))
        self.together.keys, self.together.sizes, self.together.latents = together
        self.together.level = rest["level"]
        self.occurrences = found["occurrences"]
        self.seen = Seen(**rest["seen"])


def _apart(keys: U64) -> U64:
    """Other keys for the sample of tokens, which has nothing to do with the samples of firings."""
    with np.errstate(over="ignore"):
        return keys * np.uint64(0x9E3779B97F4A7C15) + np.uint64(1)


def row_keys(seed: int, document: I64, place: Sequence[int] | I64) -> U64:
    """A random number for each place in each document, (n,)."""
    out = np.empty(len(document), np.uint64)
    hashes.keys_of(np.uint64(seed & 0xFFFFFFFFFFFFFFFF), document, np.asarray(place, np.int64), out)
    return out


def _no_counts(F: int) -> Counts:
    def zeros(*shape: int) -> I64:
        return np.zeros((F, *shape), np.int64)

    return Counts(
        firings=zeros(),
        documents=zeros(),
        last_document=np.full(F, -1),
        total=np.zeros((F, 2)),
        highest=np.zeros(F, np.float32),
        exponent=np.full(F, loops.LOWEST),
        histogram=zeros(HISTOGRAM_BINS),
        levels=zeros(1 + LEVELS * OCTAVES),
        positions=zeros(3),
        octaves=zeros(POSITION_OCTAVES),
        strata=zeros(0),
    )


_SAVED = tuple(name for name in Slots._fields if name != "source")


def _no_slots(F: int, size: int) -> Slots:
    return Slots(
        key=np.zeros((F, size), np.uint64),
        value=np.zeros((F, size), np.float32),
        passage=np.full((F, size), -1),
        position=np.zeros((F, size), np.int32),
        size=np.zeros((F, size), np.int32),
        first=np.zeros(F + 1 if F else 0, np.int64),
        away=np.zeros(0, np.int16),
        active=np.zeros(0, np.float32),
        source=nowhere(),
    )
