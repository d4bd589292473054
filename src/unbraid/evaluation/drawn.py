"""Numbers about tokens with intervals by document, of one concept or as a mean over several.

What is kept of a share is its value without each document, so that several shares on the same documents are
averaged as they are; of what is no share, its values with documents drawn again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unbraid.evaluation.labelled import Flags, Matrix, Rows
from unbraid.stats.bootstrap import Interval, as_equal, jackknife_error, share_interval
from unbraid.stats.effects import auroc

BINS = 256
"""Steps to which scores are rounded, by rank, in the intervals of AUROC; the value itself is exact."""


@dataclass(frozen=True, eq=False)
class Share:
    """A number from 0 to 1, and the same without each document."""

    value: float
    without: Matrix
    """(documents,), NaN where without a document nothing is left."""
    held: Matrix
    """(documents,), the share of what it is counted among that each document holds; 1 in sum."""

    def interval(self, n: int) -> Interval:
        """`share_interval` of the jackknife's standard error over documents, of which there are n."""
        error = jackknife_error(self.without, self.value)
        return share_interval(self.value, error, n, equal=as_equal(self.held))


@dataclass(frozen=True, eq=False)
class Drawn:
    """A number and the same number with documents drawn again."""

    value: float
    draws: Matrix
    """(resamples,), NaN where a resample says nothing."""

    def interval(self, n: int) -> Interval:
        """The draws' percentiles."""
        usable = self.draws[np.isfinite(self.draws)]
        low, high = np.quantile(usable, [0.025, 0.975]) if len(usable) else (self.value, self.value)
        return Interval(self.value, float(low), float(high), n)


class Tokens:
    """Tokens (n,) by document."""

    def __init__(self, document: Rows) -> None:
        found, self.inverse = np.unique(document, return_inverse=True)
        self.documents = len(found)

    def ratio(self, above: Flags, below: Flags) -> Share:
        """Tokens that are `above` (n,) for each that is `below` (n,), which holds all of the former."""
        tops, bottoms = (
            np.bincount(self.inverse, weights=v, minlength=self.documents) for v in (above, below)
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            value = float(np.divide(tops.sum(), bottoms.sum()))
            return Share(value, (tops.sum() - tops) / (bottoms.sum() - bottoms), bottoms / bottoms.sum())

    def auroc(self, scores: Matrix, label: Flags) -> Share:
        """AUROC over tokens; without a document, from how many of either kind it has in each of the steps."""
        held = np.bincount(self.inverse) / len(self.inverse)
        if label.all() or not label.any():
            return Share(np.nan, np.full(self.documents, np.nan), held)
        edges = np.unique(scores)
        if len(edges) > BINS:
            edges = np.unique(
                np.r_[edges[0], np.quantile(scores[scores > edges[0]], np.linspace(0, 1, BINS - 1))]
            )
        step = np.searchsorted(edges, scores, side="right") - 1
        shape = (self.documents, len(edges))
        flat = self.inverse * shape[1] + step
        up, down = (
            np.bincount(flat[side], minlength=shape[0] * shape[1]).reshape(shape) for side in (label, ~label)
        )
        every = _from_counts(up.sum(axis=0, keepdims=True), down.sum(axis=0, keepdims=True))
        without = _from_counts(up.sum(axis=0) - up, down.sum(axis=0) - down)
        value = float(auroc(scores, label))
        return Share(value, without - every + value, held)


def _from_counts(up: Matrix, down: Matrix) -> Matrix:
    """AUROC (m,) of positives and negatives counted in steps (m, steps); NaN without either."""
    below = np.cumsum(down, axis=1) - down / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return (up * below).sum(axis=1) / (up.sum(axis=1) * down.sum(axis=1))


def drawn_weights(document: Rows, seed: int, resamples: int) -> Matrix:
    """How often each document is drawn (resamples, documents)."""
    n = len(np.unique(document))
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)


def mean_of(some: Sequence[Share | Drawn], n: int) -> Interval:
    """Mean over concepts, all of one kind, document by document or draw by draw; n documents."""
    value = float(np.mean([one.value for one in some]))
    if isinstance(some[0], Share):
        # A concept that is gone without a document says nothing of that document.
        shares = [one for one in some if isinstance(one, Share)]
        without = [np.where(np.isfinite(one.without), one.without, one.value) for one in shares]
        held = [one.held for one in shares]
        return Share(value, np.mean(without, axis=0), np.mean(held, axis=0)).interval(n)
    draws = np.stack([one.draws for one in some if isinstance(one, Drawn)])
    there = np.isfinite(draws)
    means = np.where(there, draws, 0).sum(axis=0) / np.maximum(there.sum(axis=0), 1)
    return Drawn(value, means[there.any(axis=0)]).interval(n)
