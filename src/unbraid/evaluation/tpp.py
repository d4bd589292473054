"""Targeted probe perturbation: does ablating a concept's latents hurt the probe of that concept alone?

For the classes of one label, as in SAEBench (Karvonen et al. 2025, arXiv 2503.09532): a linear probe for each
class reads documents' mean activations; the n latents with the largest effect on it, (mean of positives −
mean of negatives, not below 0) · (W_dec · probe), are ablated, the reconstruction error kept; A(i, j) is the
accuracy of probe j after that was done for class i, and A(j) the one before:

    intended = mean_i A(i) − A(i, i)      unintended = mean_{i≠j} A(j) − A(i, j)      total = their difference

Directions that overlap, as random ones do, are all subtracted in full: many of them overshoot, which the
score takes for success. Read it beside its baselines. A mean over tokens is linear, so the ablation is
done on the means and the model is not run again. Latents are chosen on `select`, probes fitted on `fit`,
accuracies taken on `test`; all of it again for several seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from unbraid.activations.documents import Document
from unbraid.evaluation.baselines import principal_components, unit_directions
from unbraid.evaluation.definitions import Definition
from unbraid.evaluation.labelled import (
    Flags,
    Matrix,
    Pooled,
    Rows,
    SuiteResult,
    Task,
    detectable,
    split_documents,
    tasks,
)
from unbraid.evaluation.probing import PENALTY, direction, mean_difference
from unbraid.evaluation.reseeds import Judged, combined, over_seeds, values_of
from unbraid.manifest.errors import UserError
from unbraid.sae.base import SAE

THRESHOLDS = (2, 5, 10, 20, 50, 100, 500)
"""How many latents are ablated; those beyond an autoencoder's width are left out."""
RESEEDS = 5
"""How often splits, classes and probes are drawn anew."""
NONE = "ablate none"
"""Name of the row that nothing is done for."""
PARTS = {"total_metric": "total", "intended_diff_only": "intended", "unintended_diff_only": "unintended"}

_HOW = (
    "SAEBench's TPP on mean-pooled documents of every label with three or more values: latents by"
    " max(mean difference on select, 0)·(W_dec·w), w the weights of a logistic regression (L2, C=1,"
    " standardised) fitted on fit, zero-ablated with the error kept, accuracy on test, classes of equal"
    " size, 35:30:35 by hash of content and seed; DiffMean and the probe direction are one direction"
    " whatever n; mean over labels and over five seeds, Student's t over the seeds with the covariance that"
    " the documents in two seeds' tests give"
)
DEFINITIONS: dict[str, Definition] = {
    f"tpp_threshold_{n}_{part}": Definition(
        f"{what} drop of probe accuracy, {n} latents ablated",
        f"{what} (total = intended − unintended), {n} latents; {_HOW}",
        "lower" if what == "unintended" else "higher",
    )
    for n in THRESHOLDS
    for part, what in PARTS.items()
}


@dataclass(frozen=True, eq=False)
class Basis:
    """Features of documents and what each of them writes."""

    features: Any
    """Dense or sparse (n_docs, m)."""
    write: Matrix
    """What one unit of each feature adds to the activation (m, d_in)."""
    signed: bool
    """Whether a feature may as well be turned around, as directions may and latents may not."""


@dataclass(frozen=True, eq=False)
class Probe:
    """A linear probe of mean activations."""

    weight: Matrix
    """In the activation's own units (d_in,)."""
    bias: float
    """Its intercept."""

    def says(self, raw: Matrix) -> Flags:
        """Whether it says yes to each of these means (n, d_in)."""
        return raw @ self.weight + self.bias > 0

    def correct(self, raw: Matrix, positive: Flags) -> Flags:
        """Whether it says right of each of these means (n, d_in)."""
        return self.says(raw) == positive


def fit_probe(raw: Matrix, task: Task) -> Probe:
    """A logistic regression on the `fit` split."""
    scaler: Any = StandardScaler().fit(raw[task.rows["fit"]])
    model: Any = LogisticRegression(C=PENALTY, max_iter=1000)
    model.fit(scaler.transform(raw[task.rows["fit"]]), task.positive["fit"])
    weight = np.asarray(model.coef_[0] / scaler.scale_, dtype=np.float64)
    return Probe(weight, float(model.intercept_[0] - weight @ scaler.mean_))


def effects(basis: Basis, task: Task, probe: Probe) -> Matrix:
    """How much each feature moves the probe from negatives to positives (m,)."""
    difference = mean_difference(basis.features, task)
    return (difference if basis.signed else np.maximum(difference, 0)) * (basis.write @ probe.weight)


def strongest(effect: Matrix, n: int) -> Rows:
    """The n features with the largest effect, fewer where fewer have any."""
    order = np.argsort(-effect, kind="stable")[:n]
    return order[effect[order] != 0].astype(np.int64)


def ablated(raw: Matrix, basis: Basis, rows: Rows, features: Rows) -> Matrix:
    """Means of documents (rows,) without what these features contribute (rows, d_in)."""
    values = basis.features[rows][:, features]
    return raw[rows] - np.asarray(values @ basis.write[features])


def tpp(
    pooled: Pooled,
    saes: Mapping[str, SAE],
    baselines: Sequence[str],
    documents: Sequence[Document],
    seed: int,
    *,
    thresholds: Sequence[int] = THRESHOLDS,
    reseeds: int = RESEEDS,
) -> SuiteResult:
    """TPP of every autoencoder, those named in `baselines` among them, and of directions.

    Further baselines: raw neurons, principal components, as many random directions as the widest autoencoder
    has latents, the difference of means alone, the probe's own direction (the ceiling), and ablating nothing.
    Raises UserError when no label has three values with enough documents.
    """
    runs: dict[str, dict[str, list[Judged]]] = {}
    for run in range(reseeds):
        groups = labels_with_classes(tasks(documents, split_documents(documents, seed + run), seed + run))
        per_label: dict[str, dict[str, list[Judged]]] = {}
        for group in groups:
            probes = [fit_probe(pooled.raw, task) for task in group]
            for name, bases in bases_by_row(pooled, saes, group, probes, seed + run).items():
                for n in thresholds:
                    if n > bases[0].write.shape[0] and name in saes:
                        continue
                    for part, value in perturbation(pooled.raw, bases, group, probes, n).items():
                        metric = f"tpp_threshold_{n}_{part}"
                        per_label.setdefault(name, {}).setdefault(metric, []).append(value)
        for name, row in per_label.items():
            for metric, values in row.items():
                runs.setdefault(name, {}).setdefault(metric, []).append(combined(values))
    rows = {name: {m: over_seeds(values) for m, values in row.items()} for name, row in runs.items()}
    named = set(saes) - set(baselines)
    floors = tuple(name for name in rows if name not in named)
    details = {"runs": values_of(runs)}
    return SuiteResult("tpp", rows, floors, detectable(rows), details)


def labels_with_classes(asked: Sequence[Task]) -> list[list[Task]]:
    """Tasks by label, of labels with at least two tasks."""
    groups: dict[str, list[Task]] = {}
    for task in asked:
        groups.setdefault(task.name.partition("=")[0], []).append(task)
    found = [group for group in groups.values() if len(group) > 1]
    if not found:
        raise UserError(
            "targeted probe perturbation needs a label with three or more values, as it asks what"
            f" ablating one does to the others; labels found: {', '.join(groups)}"
        )
    return found


def bases_by_row(
    pooled: Pooled, saes: Mapping[str, SAE], group: Sequence[Task], probes: Sequence[Probe], seed: int
) -> dict[str, list[Basis]]:
    """For each row of the table a basis for each task of a group."""
    raw = pooled.raw
    chosen = np.unique(np.concatenate([task.rows["select"] for task in group]))
    centred = raw - raw[chosen].mean(axis=0)

    def along(columns: Matrix) -> Basis:
        return Basis(centred @ columns, columns.T, True)

    found = {
        name: [Basis(pooled.latents[name], sae.W_dec.detach().double().cpu().numpy(), False)] * len(group)
        for name, sae in saes.items()
    }
    for name, columns in unlearned(raw[chosen], saes, seed).items():
        found[name] = [along(columns)] * len(group)
    found["DiffMean"] = [along(direction(raw, task)[:, None]) for task in group]
    found["probe direction"] = [
        along(probe.weight[:, None] / max(float(np.linalg.norm(probe.weight)), 1e-300)) for probe in probes
    ]
    found[NONE] = [along(np.zeros((raw.shape[1], 0)))] * len(group)
    return found


def unlearned(raw: Matrix, saes: Mapping[str, SAE], seed: int) -> dict[str, Matrix]:
    """Directions that took no training, as unit columns (d_in, m), from means of documents raw (n, d_in)."""
    d_in = raw.shape[1]
    widest = max((sae.config.d_sae for sae in saes.values()), default=d_in)
    return {
        "neurons": np.eye(d_in),
        "PCA": principal_components(raw),
        "random directions": unit_directions(d_in, widest, seed),
    }


def perturbation(
    raw: Matrix, bases: Sequence[Basis], group: Sequence[Task], probes: Sequence[Probe], n: int
) -> dict[str, Judged]:
    """Total, intended and unintended effect of ablating n features for each class of a label."""
    own: list[Judged] = []
    others: list[Judged] = []
    for i, (task, probe, basis) in enumerate(zip(group, probes, bases, strict=True)):
        features = strongest(effects(basis, task, probe), n)
        for j, (other, reader) in enumerate(zip(group, probes, strict=True)):
            rows, positive = other.rows["test"], other.positive["test"]
            before = reader.correct(raw[rows], positive).astype(np.float64)
            drop = before - reader.correct(ablated(raw, basis, rows, features), positive)
            (own if i == j else others).append(Judged.mean_of(drop, rows, len(raw)))
    intended, unintended = combined(own), combined(others)
    return {
        "total_metric": combined([intended, unintended], [1, -1]),
        "intended_diff_only": intended,
        "unintended_diff_only": unintended,
    }
