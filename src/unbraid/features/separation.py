"""Telling two sets of documents apart by one number each: the threshold, and the best linear read-outs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

Scores = NDArray[np.float64]
Labels = NDArray[np.bool_]


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
