"""What a concept's latent is held against: detectors that read the whole activation, and one that says no.

Both directions come from the moments of `select`, the threshold above which they fire from `fit`, like a
latent's place among the thousands; so they are judged on `test` by the very numbers that latents are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unbraid.evaluation.drawn import Share, Tokens
from unbraid.evaluation.labelled import Flags
from unbraid.evaluation.tokens import Columns

DIFFMEAN, PROBE, NONE = "DiffMean", "linear probe", "predict none"


def detectors(columns: Mapping[str, Columns], names: Sequence[str]) -> dict[str, dict[str, dict[str, Share]]]:
    """By detector and by metric (purity, completeness, AUROC) a number for each concept that has one."""
    fit, test = columns["fit"], columns["test"]
    by_document = Tokens(test.document)
    found: dict[str, dict[str, dict[str, Share]]] = {}
    for c, concept in enumerate(names):
        label = test.labels[:, c]
        nothing = np.zeros(len(label))
        scores = {DIFFMEAN: test.projection[:, c], PROBE: test.probed[:, c], NONE: nothing}
        bars = {
            DIFFMEAN: best_bar(fit.projection[:, c], fit.labels[:, c]),
            PROBE: best_bar(fit.probed[:, c], fit.labels[:, c]),
            NONE: np.inf,
        }
        for name, score in scores.items():
            fires = score >= bars[name]
            drawn = {
                "purity": by_document.ratio(fires & label, fires),
                "completeness": by_document.ratio(fires & label, label),
                "auroc": by_document.auroc(score.astype(np.float64), label),
            }
            for metric, one in drawn.items():
                if np.isfinite(one.value):
                    found.setdefault(name, {}).setdefault(metric, {})[concept] = one
    return found


def best_bar(scores: NDArray[Any], label: Flags) -> float:
    """From where on firing has the best F1 for `label` (n,): halfway from the lowest of these scores (n,) to
    the next below, the highest of equally good."""
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(label[order])
    f1 = 2 * hits / (np.arange(1, len(order) + 1) + label.sum())
    ordered = np.append(scores[order], scores.min())
    best = int(np.argmax(np.where(ordered[1:] != ordered[:-1], f1, -1.0)))  # equal scores fire together
    if f1[-1] > f1[best] or ordered[best] == ordered[-1]:
        return float(ordered[-1])
    return float((ordered[best] + ordered[best + 1]) / 2)
