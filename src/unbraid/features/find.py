"""Find the latents that separate two sets of documents, or say that none does.

The documents fall into three disjoint splits by their hash.  Latents are ranked on the first; a null of
permuted labels over all latents decides there whether anything may be reported at all.  Thresholds are
set on the second. Every number in the report comes from the third, which had no part in any choice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csc_array, vstack

from unbraid.features.separation import (
    best_threshold,
    linear_readout,
    mean_difference_readout,
)
from unbraid.manifest.errors import UserError
from unbraid.stats.bootstrap import Interval
from unbraid.stats.effects import (
    auroc,
    auroc_interval,
    auroc_p_value,
    cohens_d,
    minimum_detectable_difference,
    risk_difference,
)
from unbraid.stats.multiple import benjamini_hochberg
from unbraid.stats.permutation import familywise_p_value, max_statistic_null
from unbraid.stats.splits import split_of

SPLITS = ("rank", "threshold", "report")
FEWEST = 3
HELD = 8_000_000
"""Scores, documents × latents, that are held in full at a time, and some copies of them as float64."""
Scores = NDArray[np.float32] | csc_array
"""Mean activations (n_docs, d_sae)."""


@dataclass(frozen=True)
class FindConfig:
    """How documents are split and what may be reported."""

    shares: Mapping[str, float] = field(
        default_factory=lambda: MappingProxyType({"rank": 0.4, "threshold": 0.2, "report": 0.4})
    )
    """Share of the documents for ranking, for setting thresholds and for the report."""
    alpha: float = 0.05
    """Chance, over all latents together, of reporting anything when the labels mean nothing."""
    top: int = 10
    """At most this many latents are reported."""
    permutations: int = 200
    """Permutations of the labels behind the null of the best latent."""
    seed: int = 0
    """Seed of the permutations."""

    def __post_init__(self) -> None:
        total = math.fsum(self.shares.values())
        if set(self.shares) != set(SPLITS) or min(self.shares.values()) <= 0 or abs(total - 1) > 1e-9:
            raise UserError(f"shares must be positive, sum to 1 and name {', '.join(SPLITS)}")
        if self.top < 1:
            raise UserError(f"top is {self.top}; it must be at least 1")
        if not 0 < self.alpha < 1:
            raise UserError(f"alpha is {self.alpha}; it must lie between 0 and 1")
        if self.permutations * self.alpha < 1:
            raise UserError(
                f"{self.permutations} permutations can never show a level of {self.alpha}; "
                f"use at least {int(np.ceil(1 / self.alpha))}"
            )


@dataclass(frozen=True)
class SeparatingLatent:
    """A latent whose activity differs between the two sets; every number but the ranking is held out."""

    latent: int
    """Number of the latent."""
    pole: int
    """1 where it is more active on positive documents, -1 where it is more active on negative ones."""
    rank_auroc: float
    """AUROC on the split that ranked the latents; flattered by the choice."""
    p_value: float
    """Two-sided Mann–Whitney p-value on that split, not corrected."""
    q_value: float
    """The same after Benjamini–Hochberg over all latents."""
    p_best_of_all: float
    """Share of label permutations in which the best of all latents did as well."""
    auroc: Interval
    """AUROC of positive against negative documents on held-out documents, below .5 for the negative pole."""
    cohens_d: float | None
    """Difference of means in pooled standard deviations, held out; None where it would be infinite."""
    threshold: float
    """Mean activation that separates the sets best on the threshold split."""
    hit_rate: float
    """Share of held-out documents of the latent's own pole beyond the threshold."""
    false_alarm_rate: float
    """Share of held-out documents of the other pole beyond the threshold."""
    risk_difference: Interval
    """Hit rate less false alarm rate."""
    holds: bool
    """Whether the held-out interval lies wholly on the latent's side of .5."""


@dataclass(frozen=True)
class Readout:
    """A comparison that reads the site itself instead of one latent."""

    name: str
    """What it is."""
    auroc: Interval
    """AUROC on held-out documents."""


@dataclass(frozen=True)
class FindResult:
    """What a search found, with everything needed to judge it."""

    latents: tuple[SeparatingLatent, ...]
    """The latents that passed both corrections, best on the ranking split first; empty when none did."""
    best_seen: float
    """Largest ranking AUROC of all latents, either pole (AUROC or 1 − AUROC)."""
    null_quantile: float
    """The same under permuted labels, at the quantile 1 − alpha: the bar that a latent must clear."""
    p_anything: float
    """Share of permutations in which the best latent did as well as the best one seen."""
    passed: int
    """Latents that passed, of which at most `top` are reported."""
    searched: int
    """Latents that were searched; those that never fire in the ranking split cannot pass."""
    counts: dict[str, tuple[int, int]]
    """Positive and negative documents in each split."""
    minimum_detectable_difference: float | None
    """Change from a rate of one half that the report split shows with 80 % power; None: not even to one."""
    baselines: tuple[Readout, ...]
    """Read-outs of the raw site on the same documents, where raw activations were given."""
    config: dict[str, Any]
    """The settings."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def find(
    positive: Scores,
    negative: Scores,
    documents: Sequence[str],
    config: FindConfig | None = None,
    *,
    raw: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None,
) -> FindResult:
    """Search all latents for those that separate `positive` (n, d_sae) from `negative` (m, d_sae)
    documents.

    `documents` are the n + m ids, positive ones first; equal ids always share a split.  `raw` gives the
    site's own means (n, d_in), (m, d_in) for the baselines.  A latent is reported when its
    Benjamini–Hochberg q-value (1995) and its max-statistic permutation p-value (Westfall and Young, 1993)
    both reach `alpha`; when labels mean nothing, anything at all is reported with a chance of at most
    `alpha`.

    Raises UserError when a split lacks documents of either kind.
    """
    config = config or FindConfig()
    sets: list[Any] = [csc_array(positive), csc_array(negative)]
    n, m = (scored.shape[0] for scored in sets)
    if len(documents) != n + m:
        raise ValueError(f"{len(documents)} ids for {n} + {m} documents")
    scores: Any = vstack(sets, format="csc")
    labels = np.arange(n + m) < n
    splits = _split(documents, labels, config)
    rank, threshold, report = (splits[name] for name in SPLITS)

    ranked, p_values, null = _ranking(scores[rank], labels[rank], config)
    strength = np.maximum(ranked, 1 - ranked)  # either pole
    q_values = np.asarray(benjamini_hochberg(p_values))
    # A rounding error must not turn a tie with the null into a win.
    p_best = familywise_p_value(strength - 1e-12, null)
    passing = np.flatnonzero((p_best <= config.alpha) & (q_values <= config.alpha))
    order = passing[np.argsort(-strength[passing], kind="stable")]

    found: list[SeparatingLatent] = []
    for latent in order[: config.top].tolist():
        pole = 1 if ranked[latent] > 0.5 else -1
        column = scores[:, [latent]].toarray()[:, 0].astype(np.float64)
        own = labels == (pole > 0)
        bar = best_threshold(column[threshold], own[threshold])
        hits = column[report][own[report]] > bar
        false_alarms = column[report][~own[report]] > bar
        effect = float(cohens_d(column[report], labels[report]))
        interval = auroc_interval(column[report], labels[report])
        found.append(
            SeparatingLatent(
                latent=latent,
                pole=pole,
                rank_auroc=float(ranked[latent]),
                p_value=float(p_values[latent]),
                q_value=float(q_values[latent]),
                p_best_of_all=float(p_best[latent]),
                auroc=interval,
                cohens_d=effect if np.isfinite(effect) else None,
                threshold=bar,
                hit_rate=float(hits.mean()),
                false_alarm_rate=float(false_alarms.mean()),
                risk_difference=risk_difference(hits, false_alarms),
                holds=bool(interval.low > 0.5 if pole > 0 else interval.high < 0.5),
            )
        )
    n_report = (int(labels[report].sum()), int((~labels[report]).sum()))
    return FindResult(
        latents=tuple(found),
        best_seen=float(strength.max()),
        null_quantile=float(np.quantile(null, 1 - config.alpha)),
        p_anything=float(p_best.min()),
        passed=len(passing),
        searched=scores.shape[1],
        counts={
            name: (int(labels[splits[name]].sum()), int((~labels[splits[name]]).sum())) for name in SPLITS
        },
        minimum_detectable_difference=minimum_detectable_difference(*n_report, 0.5),
        baselines=() if raw is None else _baselines(np.concatenate(raw), labels, rank, report),
        config={
            "shares": dict(config.shares),
            "alpha": config.alpha,
            "top": config.top,
            "permutations": config.permutations,
            "seed": config.seed,
        },
    )


def _ranking(
    scores: Any, labels: NDArray[np.bool_], config: FindConfig
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """AUROC and p-value of each latent (d_sae,), and the null of the best one (permutations,).

    `scores` is sparse, (n, d_sae).  A latent that is silent in all of these documents says nothing whatever
    their labels are: its AUROC is ½ and its p-value 1.  So only the others are ranked, a block of them at a
    time, each block under the same permutations.
    """
    n, d_sae = scores.shape
    areas, p_values, null = np.full(d_sae, 0.5), np.ones(d_sae), np.full(config.permutations, 0.5)
    fired = np.flatnonzero(np.diff(scores.indptr))
    step = max(HELD // n, 1)
    for first in range(0, len(fired), step):
        some = fired[first : first + step]
        block = scores[:, some].toarray()
        areas[some], p_values[some] = auroc(block, labels), auroc_p_value(block, labels)
        best = max_statistic_null(
            block,
            labels,
            statistic="auroc_two_sided",
            permutations=config.permutations,
            seed=config.seed,
        )
        null = np.maximum(null, best)
    return areas, p_values, null


def _split(
    documents: Sequence[str], labels: NDArray[np.bool_], config: FindConfig
) -> dict[str, NDArray[np.int64]]:
    names = np.array([split_of(document, config.shares) for document in documents])
    splits = {name: np.flatnonzero(names == name) for name in SPLITS}
    for name, rows in splits.items():
        for kind, count in (("positive", labels[rows].sum()), ("negative", (~labels[rows]).sum())):
            if count < FEWEST:
                raise UserError(
                    f"only {count} {kind} documents fall into the {name} split and {FEWEST} are needed; "
                    f"give more {kind} documents"
                )
    return splits


def _baselines(
    raw: NDArray[np.float32],
    labels: NDArray[np.bool_],
    fit: NDArray[np.int64],
    report: NDArray[np.int64],
) -> tuple[Readout, ...]:
    found: list[Readout] = []
    for name, readout in (
        ("logistic regression on the site", linear_readout),
        ("difference of means at the site", mean_difference_readout),
    ):
        scores = readout(raw[fit], labels[fit], raw[report])
        found.append(Readout(name, auroc_interval(scores, labels[report])))
    return tuple(found)
