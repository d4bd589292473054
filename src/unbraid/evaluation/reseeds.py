"""Numbers of several runs that split the same documents anew, and their interval.

Runs share documents, so their spread alone says too little of what other documents would give. The variance
of a mean over J runs is s² / J + c, with s² the runs' own variance and c the covariance of two runs. What two
runs have in common is taken to be their test documents: c is what the documents in both tests put into it,
with a run's number linearised in its documents. Probes and latents that come out alike because documents were
fitted on twice are left out. Nadeau and Bengio 2003 ("Inference for the generalization error") take runs to
differ in their test documents alone; with five runs that test on .35 of the documents this makes intervals
1.9 times as wide as Student's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from unbraid.evaluation.labelled import Matrix, Rows
from unbraid.stats.bootstrap import Interval


@dataclass(frozen=True, eq=False)
class Judged:
    """A number, and what each document adds to it above or below what a document adds on average."""

    value: float
    pull: Matrix
    """(n_docs,), 0 for documents that were not tested on; 0 in sum."""

    @classmethod
    def mean_of(cls, values: Matrix, rows: Rows, n_docs: int) -> Judged:
        """The mean of values (n,) of the documents in rows (n,)."""
        pull, mean = np.zeros(n_docs), float(values.mean())
        pull[rows] = (values - mean) / len(rows)
        return cls(mean, pull)


def combined(some: Sequence[Judged], weights: Sequence[float] | None = None) -> Judged:
    """The sum of some numbers times their weights, or their mean."""
    by = np.full(len(some), 1 / len(some)) if weights is None else np.asarray(weights)
    return Judged(
        float(by @ [one.value for one in some]), np.asarray(by @ np.stack([one.pull for one in some]))
    )


def values_of(runs: Mapping[str, Mapping[str, Sequence[Judged]]]) -> dict[str, dict[str, list[float]]]:
    """By row and metric the numbers alone."""
    return {name: {m: [one.value for one in some] for m, some in row.items()} for name, row in runs.items()}


def over_seeds(runs: Sequence[Judged]) -> Interval:
    """The mean over runs on the same documents with Student's interval; of one run it is a point."""
    J, values = len(runs), np.array([run.value for run in runs])
    mean = float(values.mean())
    if J == 1:
        return Interval(mean, mean, mean, 1)
    pulls = np.stack([run.pull for run in runs])
    both = np.square(pulls.sum(axis=0)).sum() - np.square(pulls).sum()  # Σ over ordered pairs of runs
    own, shared = float(values.var(ddof=1)) / J, max(float(both) / (J * (J - 1)), 0.0)
    if own + shared == 0:
        return Interval(mean, mean, mean, J)
    # The shared part rests on many documents, the other on J runs (Satterthwaite 1946).
    freedom = (J - 1) * ((own + shared) / own) ** 2 if own else np.inf
    half = float(student.ppf(0.975, freedom)) * (own + shared) ** 0.5
    return Interval(mean, mean - half, mean + half, J)
