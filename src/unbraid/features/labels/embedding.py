"""The embedding scorer: does a label lie nearer to the windows on which its latent fires?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from unbraid.features.labels.scorers import Labelled
from unbraid.features.labels.scores import Score, not_measured
from unbraid.stats.jackknife import auroc_by_document

Embed = Callable[[Sequence[str]], NDArray[np.float32]]
"""Turns n texts into vectors (n, d)."""


def embedding(embed: Embed, name: str, labelled: Sequence[Labelled]) -> list[Score]:
    """AUROC of the cosine of the label with each test window, positives against negatives."""
    scores: list[Score] = []
    for label, evidence in labelled:
        windows = (*evidence.positives, *evidence.negatives)
        truth = np.arange(len(windows)) < len(evidence.positives)
        if truth.all() or not truth.any():
            scores.append(not_measured("embedding", name, 0.5, "it needs windows of both kinds", evidence))
            continue
        vectors = np.asarray(embed([label, *(window.text for window in windows)]), dtype=np.float64)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        value = auroc_by_document(vectors[1:] @ vectors[0], truth, [w.document for w in windows])
        blank = not_measured("embedding", name, 0.5, "", evidence)
        scores.append(Score("embedding", name, value, 0.5, blank.positives, blank.negatives, blank.hard))
    return scores
