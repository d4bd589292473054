"""Sparse probing: how much of a label can be read off k latents.

For each task the k latents with the largest difference of means are chosen on the split `select`, a logistic
regression reads them on `fit`, and its accuracy on `test` is reported, over as many positives as negatives
(Gurnee et al. 2023, arXiv 2305.01610). A document's latents are their means over its tokens. Nothing is tuned
on `test`, no epoch is picked by it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import issparse
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import MaxAbsScaler, StandardScaler

from unbraid.activations.documents import Document
from unbraid.evaluation.baselines import principal_components, unit_directions
from unbraid.evaluation.definitions import Definition
from unbraid.evaluation.labelled import Pooled, SuiteResult, Task, split_documents, tasks
from unbraid.stats.bootstrap import Interval, bootstrap_ratio
from unbraid.stats.effects import minimum_detectable_difference

TOP = (1, 2, 5)
"""How many latents are read."""
PENALTY = 1.0
"""scikit-learn's C of every logistic regression."""
CEILING, NONE = "dense probe", "predict none"
Features = Any
"""A dense or sparse (n_docs, m) array."""

_HOW = (
    "mean over tasks (a label's value against its others, classes made equal in size in each split by"
    " drawing) of the accuracy on test documents; features are means over a document's tokens; select,"
    " fit, test 35:30:35 by hash of content and seed; logistic regression with L2, C=1, features"
    " standardised on fit"
)
DEFINITIONS: dict[str, Definition] = {
    f"probe_top_{k}": Definition(
        f"accuracy of a probe on {k} latent{'s' * (k > 1)}",
        f"{_HOW}; the {k} features with the largest absolute difference of class means on select",
        "higher",
    )
    for k in TOP
} | {
    "probe_all": Definition(
        "accuracy of a probe on all latents",
        f"{_HOW}; all features (of autoencoders divided by their largest absolute value on fit)",
        "higher",
    )
}


def probing(
    pooled: Pooled,
    baselines: Sequence[str],
    documents: Sequence[Document],
    seed: int,
    resamples: int = 2000,
) -> SuiteResult:
    """Probe every autoencoder in `pooled`, those named in `baselines` among them, and directions beside them.

    Further baselines: raw neurons, principal components of the select split's means, random directions as
    many as the widest autoencoder has, the difference of means (one direction), all of the activation
    (the ceiling), and predicting nothing. Raises UserError when no label divides the documents.
    """
    asked = tasks(documents, split_documents(documents, seed), seed)
    features: dict[str, Features] = dict(pooled.latents)
    widest = max((array.shape[1] for array in pooled.latents.values()), default=pooled.raw.shape[1])
    chosen_on = np.unique(np.concatenate([task.rows["select"] for task in asked]))
    linear = {
        "neurons": pooled.raw,
        "PCA": pooled.raw @ principal_components(pooled.raw[chosen_on]),
        "random directions": pooled.raw @ unit_directions(pooled.raw.shape[1], widest, seed),
    }
    correct: dict[str, dict[str, list[NDArray[np.bool_]]]] = {}
    for name, array in (features | linear).items():
        row = {f"probe_top_{k}": [probe(array, task, top(array, task, k)) for task in asked] for k in TOP}
        if name in features:
            row["probe_all"] = [probe(array, task) for task in asked]
        correct[name] = row
    one = [pooled.raw @ direction(pooled.raw, task)[:, None] for task in asked]
    correct["DiffMean"] = {
        "probe_top_1": [probe(array, task) for array, task in zip(one, asked, strict=True)]
    }
    correct[CEILING] = {"probe_all": [probe(pooled.raw, task) for task in asked]}
    correct[NONE] = {name: [~task.positive["test"] for task in asked] for name in DEFINITIONS}

    rows = {
        name: {metric: accuracy(found, asked, seed, resamples) for metric, found in row.items()}
        for name, row in correct.items()
    }
    by_task = {
        name: {
            m: {t.name: float(c.mean()) for t, c in zip(asked, found, strict=True)}
            for m, found in row.items()
        }
        for name, row in correct.items()
    }
    return SuiteResult(
        "probing", rows, tuple(name for name in rows if name in baselines or name not in features),
        detectable_differences(rows), {"tasks": by_task},
    )  # fmt: skip


def top(features: Features, task: Task, k: int) -> NDArray[np.intp]:
    """The k columns (k,) whose means differ most between the classes on `select`, largest first."""
    difference = np.abs(mean_difference(features, task))
    return np.argsort(-difference, kind="stable")[:k]


def mean_difference(features: Features, task: Task) -> NDArray[np.float64]:
    """Mean of the positives less that of the negatives on `select`, for each column (m,)."""
    rows, positive = task.rows["select"], task.positive["select"]
    up, down = (np.asarray(features[rows[side]].mean(axis=0)).ravel() for side in (positive, ~positive))
    return up - down


def direction(raw: NDArray[np.float64], task: Task) -> NDArray[np.float64]:
    """The difference of the classes' means as a unit vector (d_in,), zero where they are the same."""
    difference = mean_difference(raw, task)
    return difference / max(float(np.linalg.norm(difference)), 1e-300)


def probe(features: Features, task: Task, columns: NDArray[np.intp] | None = None) -> NDArray[np.bool_]:
    """Whether a probe fitted on `fit` says right of each test document (n_test,), reading these columns."""
    chosen = features if columns is None else features[:, columns]
    if issparse(chosen) and columns is not None:
        chosen = chosen.toarray()
    scaler: Any = MaxAbsScaler() if issparse(chosen) else StandardScaler()
    model: Any = LogisticRegression(C=PENALTY, max_iter=1000)
    model.fit(scaler.fit_transform(chosen[task.rows["fit"]]), task.positive["fit"])
    said = model.predict(scaler.transform(chosen[task.rows["test"]]))
    return np.asarray(said == task.positive["test"], dtype=np.bool_)


def accuracy(
    correct: Sequence[NDArray[np.bool_]], asked: Sequence[Task], seed: int, resamples: int = 2000
) -> Interval:
    """Mean over tasks of the share that is right, with an interval from drawing test documents again.

    A document that several tasks ask about is drawn for all of them.
    """
    weight = np.concatenate([np.full(len(c), 1 / len(c)) for c in correct])
    documents = np.concatenate([task.rows["test"] for task in asked])
    found = bootstrap_ratio(np.concatenate(correct) * weight, weight, documents, seed, resamples)
    return found.within(0, 1)


def detectable_differences(rows: Mapping[str, Mapping[str, Interval]]) -> dict[str, float | None]:
    """For each metric that is a share, the difference from its best row that two sets of so many documents
    would show at 5 % with a power of 80 %; on the same documents a smaller one shows."""
    found: dict[str, float | None] = {}
    for metric in sorted({metric for row in rows.values() for metric in row}):
        best = max((row[metric] for row in rows.values() if metric in row), key=lambda i: i.value)
        found[metric] = minimum_detectable_difference(best.n, best.n, min(1.0, max(0.0, best.value)))
    return found
