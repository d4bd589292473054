"""What a scorer found about a label: a number, its interval, what guessing gives, and what is missing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unbraid.features.labels.contexts import Evidence, Window
from unbraid.features.labels.judges import Answer
from unbraid.stats.bootstrap import Interval, bootstrap_ratio, rate_by_document


@dataclass(frozen=True)
class Score:
    """One scorer's verdict on one label."""

    scorer: str
    """Its name."""
    judge: str
    """Who answered: a judge, the model itself, or an embedding."""
    value: Interval | None
    """The number; none where it could not be measured."""
    chance: float
    """What a judge that knows nothing about the latent gets."""
    positives: int = 0
    """Windows on which the latent fires."""
    negatives: int = 0
    """Windows on which it was found silent."""
    hard: int = 0
    """Those of them on which a neighbour fires."""
    unparsed: int = 0
    """Questions whose answer could not be read; each counts as answered wrongly."""
    details: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Further numbers."""
    why_not: str = ""
    """Why there is no number."""

    @property
    def base_rate(self) -> float | None:
        """Share of the windows on which the latent fires."""
        n = self.positives + self.negatives
        return self.positives / n if n else None

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON values; `value` is a number, with `low`, `high` and `n` beside it."""
        interval = self.value.as_dict() if self.value else {"value": None}
        rest = {k: v for k, v in vars(self).items() if k not in ("scorer", "value", "details")}
        return {**interval, "base_rate": self.base_rate, **rest, **self.details}


def not_measured(scorer: str, judge: str, chance: float, why: str, evidence: Evidence | None = None) -> Score:
    """A score without a number."""
    if evidence is None:
        return Score(scorer, judge, None, chance, why_not=why)
    hard = sum(window.hard for window in evidence.negatives)
    return Score(
        scorer, judge, None, chance, len(evidence.positives), len(evidence.negatives), hard, why_not=why
    )


def classified(scorer: str, judge: str, evidence: Evidence, answers: Sequence[Answer], seed: int) -> Score:
    """Balanced accuracy (TPR + TNR) / 2 of yes-or-no answers, the positives' first, then the negatives'.

    Both rates have intervals by document; those are joined as if they were independent (Zou and Donner 2008,
    MOVER), so that a judge who is right everywhere does not get an interval of no width.  An answer that
    could not be read is wrong, whatever was right.
    """
    windows = (*evidence.positives, *evidence.negatives)
    truth = np.arange(len(windows)) < len(evidence.positives)
    if truth.all() or not truth.any():
        return not_measured(scorer, judge, 0.5, "it needs windows of both kinds", evidence)
    unparsed = np.array([answer is None for answer in answers])
    right = np.array([a is not None and a == t for a, t in zip(answers, truth.tolist(), strict=True)])
    documents = [window.document for window in windows]
    tpr, tnr = (_rate(right, documents, truth == side) for side in (True, False))
    value = (tpr.value + tnr.value) / 2
    low = value - math.hypot(tpr.value - tpr.low, tnr.value - tnr.low) / 2
    high = value + math.hypot(tpr.high - tpr.value, tnr.high - tnr.value) / 2
    hard = np.array([window.hard for window in windows])
    details: dict[str, Any] = {
        "tpr": tpr.as_dict(),
        "tnr": tnr.as_dict(),
        "tnr_hard": _rate(right, documents, hard & ~truth).as_dict() if (hard & ~truth).any() else None,
        **_f_scores(windows, truth, right, documents, seed),
    }
    return Score(
        scorer,
        judge,
        Interval(value, low, high, len(set(documents))).within(0, 1),
        0.5,
        int(truth.sum()),
        int((~truth).sum()),
        int(hard.sum()),
        int(unparsed.sum()),
        details,
    )


def _rate(right: NDArray[np.bool_], documents: Sequence[str], where: NDArray[np.bool_]) -> Interval:
    return rate_by_document(right[where], [d for d, w in zip(documents, where, strict=True) if w])


def _f_scores(
    windows: Sequence[Window],
    truth: NDArray[np.bool_],
    right: NDArray[np.bool_],
    documents: Sequence[str],
    seed: int,
) -> dict[str, Any]:
    """Precision, recall, F1, and F1 with each positive weighed by how strongly the latent fires.

    The weights of the positives are scaled to a mean of 1, so a judge who misses the weak ones alone has a
    weighted F1 above the plain one.
    """
    said = np.where(truth, right, ~right)  # an unread answer on a negative window counts as a yes
    strength = np.array([window.max for window in windows])
    weights = np.where(truth, strength / strength[truth].mean(), 1.0)
    found: dict[str, Any] = {"precision": None, "recall": float(right[truth].mean())}
    if said.any():
        found["precision"] = float((said & truth).sum() / said.sum())
    for name, w in (("f1", np.ones(len(windows))), ("f1_weighted", weights)):
        both, total = 2 * w * (said & truth), w * (said.astype(float) + truth)
        found[name] = bootstrap_ratio(both, total, documents, seed).within(0, 1).as_dict()
    return found
