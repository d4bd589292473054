"""How well one number a document separates two sets: thresholds, intervals and the best linear read-outs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from unbraid.stats.bootstrap import Interval
from unbraid.stats.effects import auroc

Scores = NDArray[np.float64]
Labels = NDArray[np.bool_]

# Pairs of documents compared at once; more would only cost memory.
_MOST_PAIRS = 4_000_000


def best_threshold(scores: Scores, labels: Labels) -> float:
    """The threshold with the largest hit rate less false alarm rate (Youden, 1950) for `scores >
    threshold`.

    Scores and labels have shape (n,).  It lies half-way between two neighbouring scores; the lowest of
    several equally good ones is taken.
    """
    order = np.argsort(scores, kind="stable")
    values, sorted_labels = scores[order], labels[order]
    # Column i: the threshold lies just above the i-th smallest score.
    missed = np.cumsum(sorted_labels) / max(int(labels.sum()), 1)
    passed = np.cumsum(~sorted_labels) / max(int((~labels).sum()), 1)
    gain = passed - missed
    gain[:-1][values[1:] == values[:-1]] = -np.inf  # equal scores cannot be told apart
    best = int(np.argmax(gain))
    return float(values[best] if best + 1 == len(values) else (values[best] + values[best + 1]) / 2)


def auroc_interval(
    scores: Scores, labels: Labels, *, seed: int, resamples: int = 2000, level: float = 0.95
) -> Interval:
    """AUROC of positive over negative scores (n,), ties counting half, with a percentile bootstrap
    interval.

    Documents are resampled within each of the two sets (Efron and Tibshirani, 1993), since how many of
    each kind there are was the experimenter's choice.
    """
    positive, negative = scores[labels], scores[~labels]
    rng = np.random.default_rng(seed)
    if len(positive) * len(negative) <= _MOST_PAIRS:
        won = np.sign(positive[:, None] - negative[None, :]) / 2 + 0.5  # (positive, negative)
        value = float(won.mean())
        up = rng.multinomial(len(positive), np.full(len(positive), 1 / len(positive)), size=resamples)
        down = rng.multinomial(len(negative), np.full(len(negative), 1 / len(negative)), size=resamples)
        draws = ((up @ won) * down).sum(axis=1) / (len(positive) * len(negative))
    else:
        value = float(auroc(scores, labels))
        draws = np.empty(resamples)
        for draw in range(resamples):
            up = positive[rng.integers(len(positive), size=len(positive))]
            down = negative[rng.integers(len(negative), size=len(negative))]
            draws[draw] = auroc(np.concatenate([up, down]), np.arange(len(up) + len(down)) < len(up))
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value=value, low=float(low), high=float(high), n=len(scores))


def linear_readout(
    raw: NDArray[np.float32], labels: Labels, held_out: NDArray[np.float32], *, strength: float = 1.0
) -> Scores:
    """Scores (m,) of held-out means (m, d_in) by logistic regression fit on `raw` (n, d_in).

    Inputs are standardised by the fit split's own mean and deviation; the L2 penalty is fixed (`strength` is
    scikit-learn's C), so nothing is tuned on the documents that the read-out is reported on.
    """
    scaler = StandardScaler().fit(raw)
    model = LogisticRegression(C=strength, max_iter=2000)
    model.fit(scaler.transform(raw), labels)
    return np.asarray(model.decision_function(scaler.transform(held_out)), dtype=np.float64)


def mean_difference_readout(
    raw: NDArray[np.float32], labels: Labels, held_out: NDArray[np.float32]
) -> Scores:
    """Scores (m,) of held-out means along the difference of the two sets' means on the fit split."""
    direction = raw[labels].mean(axis=0) - raw[~labels].mean(axis=0)
    return np.asarray(held_out @ direction, dtype=np.float64)
