"""Windows made by hand."""

from __future__ import annotations

import numpy as np

from unbraid.features.labels.contexts import Evidence, Window


def window(text: str, fires: dict[str, float], number: int = 0, *, hard: bool = False) -> Window:
    """A window of one token a word, in which the named words fire."""
    words = text.split()
    pieces = tuple(word if i == 0 else f" {word}" for i, word in enumerate(words))
    activations = np.array([fires.get(word, 0.0) for word in words], dtype=np.float32)
    return Window(f"document {number}", number, 0, tuple(range(len(words))), pieces, activations, hard)


def evidence(positives: list[Window], negatives: list[Window], train: int | None = None) -> Evidence:
    """Evidence whose test windows are also its training windows, or the first `train` of them are."""
    cut_p, cut_n = (len(positives), len(negatives)) if train is None else (train, train)
    test_p, test_n = (positives, negatives) if train is None else (positives[train:], negatives[train:])
    return Evidence(7, tuple(positives[:cut_p]), tuple(negatives[:cut_n]), tuple(test_p), tuple(test_n))
