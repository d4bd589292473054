"""Sample replies to probes under edits and judge them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from unbraid.causal.probes import Outcome, Probe, judge
from unbraid.manifest.errors import UserError
from unbraid.manifest.progress import Progress
from unbraid.model.edits import Edit
from unbraid.model.generate import Reply, generate
from unbraid.model.load import LanguageModel
from unbraid.stats.bootstrap import Interval, paired_difference, rate, rate_by_document

Quantity = Literal["incident", "kept", "helpful", "refused"]
QUANTITIES: tuple[Quantity, ...] = ("incident", "kept", "helpful", "refused")


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn."""

    max_new_tokens: int = 64
    """Longest reply, in tokens."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy."""
    samples: int = 1
    """Replies to each probe."""
    batch_size: int = 64
    """Replies generated together; it has no influence on them."""
    seed: int = 0
    """Seed of the run; each reply's own seed is a hash of this, the probe's id and the sample's number."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "samples", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.temperature < 0:
            raise UserError(f"temperature is {self.temperature}; it must not be negative")


@dataclass(frozen=True)
class Applied:
    """Proof that an edit was applied, over all replies of a measurement."""

    name: str
    """Name of the edit."""
    considered: int
    """Token positions at which the edit was evaluated."""
    fired: int
    """Positions that it changed."""
    sequences: int
    """Replies it was installed for."""
    gated: int
    """Replies for which its gate was closed."""


@dataclass(frozen=True, eq=False)
class Measurement:
    """Replies to probes under one set of edits; n rows are probes × samples, those of a probe together."""

    probe_ids: tuple[str, ...]
    """The probe of each row (n,)."""
    replies: tuple[Reply, ...]
    """The replies (n,)."""
    outcomes: dict[Quantity, NDArray[np.float64]]
    """For each quantity 1 or 0 a row (n,), NaN where the probe has no expression for it."""
    applied: tuple[Applied, ...]
    """What each edit did."""

    @property
    def texts(self) -> list[str]:
        """The replies as text (n,)."""
        return [reply.text for reply in self.replies]

    def rate(self, quantity: Quantity) -> Interval | None:
        """Rate of a quantity with its 95 % interval, or None where no probe asks for it.

        Wilson's interval; where probes were sampled more than once, for as many replies as tell as much.
        """
        values = self.outcomes[quantity]
        asked = ~np.isnan(values)
        if not asked.any():
            return None
        probes = np.array(self.probe_ids)[asked]
        if len(set(self.probe_ids)) == len(self.probe_ids):
            return rate(values[asked] > 0)
        return rate_by_document(values[asked] > 0, probes)

    def change_from(
        self, baseline: Measurement, quantity: Quantity, *, seed: int = 0, resamples: int = 2000
    ) -> Interval | None:
        """Mean of this less `baseline`'s, paired by row, with its bootstrap interval over probes."""
        if self.probe_ids != baseline.probe_ids:
            raise ValueError("measurements of different probes cannot be paired")
        ours, theirs = self.outcomes[quantity], baseline.outcomes[quantity]
        asked = ~np.isnan(ours)
        if not asked.any():
            return None
        probes = np.array(self.probe_ids)[asked]
        return paired_difference(ours[asked], theirs[asked], probes, seed=seed, resamples=resamples)


def measure(
    lm: LanguageModel,
    probes: Sequence[Probe],
    edits: Sequence[Edit] = (),
    sampling: Sampling | None = None,
    *,
    progress: Progress | None = None,
) -> Measurement:
    """Draw replies to `probes` under `edits` and judge each of them.

    Two measurements with one seed share their random numbers row by row, whatever the edits, so that their
    difference is due to the edits alone.
    """
    sampling = sampling or Sampling()
    rows = [(probe, sample) for probe in probes for sample in range(sampling.samples)]
    replies = generate(
        lm,
        [probe.messages for probe, _ in rows],
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        seeds=[reply_seed(probe.id, sample, sampling.seed) for probe, sample in rows],
        edits=tuple(edits),
        batch_size=sampling.batch_size,
        progress=progress,
    )
    judged = [judge(probe, reply.text) for (probe, _), reply in zip(rows, replies, strict=True)]
    return Measurement(
        probe_ids=tuple(probe.id for probe, _ in rows),
        replies=tuple(replies),
        outcomes={quantity: _column(judged, quantity) for quantity in QUANTITIES},
        applied=_applied(replies),
    )


def reply_seed(probe_id: str, sample: int, seed: int) -> int:
    """Seed of one reply (63 bits): a hash, so that it depends neither on order nor on the other probes."""
    digest = hashlib.sha256(f"{seed}\x00{sample}\x00{probe_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _column(judged: Sequence[Outcome], quantity: Quantity) -> NDArray[np.float64]:
    values = [getattr(outcome, quantity) for outcome in judged]
    return np.array([np.nan if value is None else float(value) for value in values])


def _applied(replies: Sequence[Reply]) -> tuple[Applied, ...]:
    # Edits are told apart by their place, since names need not differ.
    per_edit = zip(*(reply.edits for reply in replies), strict=True)
    return tuple(
        Applied(
            name=counts[0].name,
            considered=sum(count.considered for count in counts),
            fired=sum(count.fired for count in counts),
            sequences=sum(count.sequences for count in counts),
            gated=sum(count.gated for count in counts),
        )
        for counts in per_edit
    )
