"""Spurious correlation removal: does ablating a concept's latents free a biased probe of that concept?

For two labels, as in SAEBench (Karvonen et al. 2025, arXiv 2503.09532): a probe is fitted where the labels
agree (all professors men, all nurses women), so it may read either. The n latents with the largest effect on
the label that it should not read, |mean of positives − mean of negatives| · |W_dec · that label's own probe|,
are ablated, the reconstruction error kept. On test documents where the labels are independent, with A the
accuracy for the other label, before and after, and the one of a probe that was never biased (the oracle):

    score = (A(after) − A(before)) / (A(oracle) − A(before))

1 where the bias is gone, 0 where nothing changed, below 0 where the wrong thing went. `dir1` keeps a pair's
first label, `dir2` its second, and `metric` the one that the biased probe reads worse. Which that is, and the
latents, are chosen on `select`, probes fitted on `fit`, accuracies taken on `test`; all of it again for
several seeds. As in TPP the ablation is done on documents' means, and directions that overlap overshoot.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np

from unbraid.activations.documents import Document
from unbraid.evaluation.definitions import Definition
from unbraid.evaluation.labelled import (
    LEAST,
    Flags,
    Matrix,
    Pooled,
    Rows,
    Split,
    SuiteResult,
    Task,
    detectable,
    split_documents,
)
from unbraid.evaluation.probing import mean_difference
from unbraid.evaluation.removal import matched
from unbraid.evaluation.reseeds import Judged, combined, over_seeds, values_of
from unbraid.evaluation.tpp import (
    RESEEDS,
    THRESHOLDS,
    Basis,
    Probe,
    ablated,
    bases_by_row,
    fit_probe,
    strongest,
)
from unbraid.manifest.errors import UserError
from unbraid.sae.base import SAE

GAP = 0.05
"""Accuracy that the bias has to cost before a score, which is divided by it, means anything."""
PARTS = {
    "metric": "of the label that the biased probe reads worse on select",
    "dir1": "of the first label, the second's latents ablated",
    "dir2": "of the second label, the first's latents ablated",
}

_HOW = (
    "SAEBench's SCR on mean-pooled documents of every two labels (of one with more than two values the first"
    " and second, third and fourth, … by name are two labels): (A(after) − A(before)) / (A(oracle) −"
    " A(before)), A the accuracy on test documents, as many of each of the four kinds, of a probe fitted on"
    " fit where both labels are positive or both negative, of the same after ablation, and of one fitted on"
    " fit's documents of all four kinds; latents by |mean difference on select · (W_dec·w)|, w the latter"
    " probe of the other label, zero-ablated with the error kept; logistic regressions (L2, C=1,"
    " standardised); 35:30:35 by hash of content and seed; DiffMean and the probe direction are one"
    " direction whatever n; mean over the pairs of labels with A(oracle) − A(before) of at least 0.05 and"
    " over five seeds, Student's t over the seeds with the covariance that the documents in two seeds' tests"
    " give"
)
DEFINITIONS: dict[str, Definition] = {
    f"scr_{part}_threshold_{n}": Definition(
        f"share of the accuracy lost to a bias that comes back, {n} latents ablated",
        f"share of the accuracy lost to a bias that comes back, {what}, {n} latents; {_HOW}",
        "higher",
    )
    for n in THRESHOLDS
    for part, what in PARTS.items()
}


@dataclass(frozen=True, eq=False)
class Pair:
    """Two labels, and documents in which they are independent."""

    name: str
    """Both labels with their positive values."""
    labels: tuple[Task, Task]
    """Either label of the same documents, as many of each of the four kinds in every split."""
    agreeing: Task
    """Both labels positive against both negative, on `fit` alone."""


@dataclass(frozen=True, eq=False)
class Bias:
    """A probe that was fitted where two labels agree, asked about one of them."""

    probe: Probe
    """The biased probe."""
    kept: Task
    """The label that it should read."""
    removed: Task
    """The label that it should not."""
    reader: Probe
    """The unbiased probe of `removed`, by which latents are chosen."""
    right: Flags
    """Whether the biased probe is right of `kept` on test (n,)."""
    oracle_right: Flags
    """Whether the unbiased probe is."""
    on_select: float
    """Accuracy of the biased probe for `kept` on select."""

    @property
    def before(self) -> float:
        """Accuracy of the biased probe for `kept` on test."""
        return float(self.right.mean())

    @property
    def oracle(self) -> float:
        """The unbiased probe's."""
        return float(self.oracle_right.mean())

    def score(self, raw: Matrix, basis: Basis, latents: Rows) -> Judged:
        """Share of the lost accuracy that comes back when these latents are ablated; some must be lost."""
        rows, positive = self.kept.rows["test"], self.kept.positive["test"]
        after = self.probe.correct(ablated(raw, basis, rows, latents), positive)
        lost = self.oracle - self.before
        score = float(after.mean() - self.before) / lost
        before = self.right.astype(np.float64)
        rest = (after - before) - score * (self.oracle_right - before)  # 0 in sum
        return Judged(score, Judged.mean_of(rest / lost, rows, len(raw)).pull)


def scr(
    pooled: Pooled,
    saes: Mapping[str, SAE],
    baselines: Sequence[str],
    documents: Sequence[Document],
    seed: int,
    *,
    thresholds: Sequence[int] = THRESHOLDS,
    reseeds: int = RESEEDS,
) -> SuiteResult:
    """SCR of every autoencoder, those named in `baselines` among them, and of what TPP has beside them.

    One more baseline for each autoencoder that is none: others of its latents, which fire as often as the
    chosen ones. Raises UserError when no two labels have enough documents of all four kinds.
    """
    lost: dict[str, list[dict[str, float]]] = {}
    runs: dict[str, dict[str, list[Judged]]] = {}
    by_pair: dict[str, dict[str, dict[str, list[float]]]] = {}
    for run in range(seed, seed + reseeds):
        here: dict[str, dict[str, list[Judged]]] = {}
        for pair in pairs(documents, split_documents(documents, run), run):
            probes = [fit_probe(pooled.raw, task) for task in pair.labels]
            asked = biases(pooled.raw, pair, probes)
            lost.setdefault(pair.name, []).append(
                {
                    f"dir{d}_{a}": getattr(bias, a)
                    for d, bias in enumerate(asked, 1)
                    for a in ("before", "oracle")
                }
            )
            ways = bases_by_row(pooled, saes, pair.labels, probes, run)
            for name, metric, score in _scores(pooled, saes, baselines, ways, asked, thresholds, run):
                here.setdefault(name, {}).setdefault(metric, []).append(score)
                by_pair.setdefault(name, {}).setdefault(pair.name, {}).setdefault(metric, []).append(
                    score.value
                )
        for name, row in here.items():
            for metric, scores in row.items():
                runs.setdefault(name, {}).setdefault(metric, []).append(combined(scores))
    rows = {name: {m: over_seeds(row[m]) for m in DEFINITIONS if m in row} for name, row in runs.items()}
    named = set(saes) - set(baselines)
    details = {
        "runs": values_of(runs),
        "pairs": {name: _means(its) for name, its in by_pair.items()},
        "bias": lost,
    }
    floors = tuple(name for name in rows if name not in named)
    return SuiteResult("scr", rows, floors, detectable(rows), details, _notes(lost))


def _means(scores: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, dict[str, float]]:
    return {name: {m: float(np.mean(values)) for m, values in row.items()} for name, row in scores.items()}


def pairs(documents: Sequence[Document], splits: Split, seed: int, least: int = LEAST) -> list[Pair]:
    """Every two labels that have `least` documents of each of the four kinds in each split.

    Of the more frequent kinds only as many are drawn as there are of the rarest. Raises UserError when
    there is no such pair.
    """
    sides: list[tuple[str, str, Flags, Flags]] = []
    for name in sorted({name for document in documents for name in document.labels}):
        values = np.array([document.labels.get(name) for document in documents], dtype=object)
        kinds = sorted({str(value) for value in values if value is not None})
        for no, yes in zip(kinds[::2], kinds[1::2], strict=False):
            sides.append((name, f"{name}={yes}", values == yes, values == no))
    found: list[Pair] = []
    for (one, first, *a), (other, second, *b) in combinations(sides, 2):
        if one != other and (pair := _pair(first, second, a, b, splits, seed, least)):
            found.append(pair)
    if not found:
        raise UserError(
            "spurious correlation removal needs two labels that are independent enough: each of two values"
            f" of the one with each of two of the other, in at least {least} documents of each of the three"
            f" splits, which takes about {round(least / 0.3) * 4} documents; labels found:"
            f" {', '.join(sorted({name for name, *_ in sides})) or 'none'}"
        )
    return found


def _pair(
    first: str, second: str, a: Sequence[Flags], b: Sequence[Flags], splits: Split, seed: int, least: int
) -> Pair | None:
    """`a` and `b` say of each document (n_docs,) whether a label is positive, and whether it is negative."""
    generator = np.random.default_rng(seed)
    rows: dict[str, Rows] = {}
    agreeing = np.zeros(0, dtype=np.int64)
    for split in ("select", "fit", "test"):
        here = splits == split
        kinds = [generator.permutation(np.flatnonzero(here & x & y)) for x, y in product(a, b)]
        size = min(map(len, kinds))
        if size < least:
            return None
        rows[split] = np.sort(np.concatenate([kind[:size] for kind in kinds])).astype(np.int64)
        if split == "fit":  # as many as for the unbiased probes, where there are so many
            both, neither = kinds[0], kinds[3]
            many = min(2 * size, len(both), len(neither))
            agreeing = np.sort(np.r_[both[:many], neither[:many]]).astype(np.int64)
    labels = tuple(
        Task(name, rows, {split: yes[chosen] for split, chosen in rows.items()})
        for name, (yes, _) in ((first, a), (second, b))
    )
    name = f"{first} × {second}"
    return Pair(name, (labels[0], labels[1]), Task(name, {"fit": agreeing}, {"fit": a[0][agreeing]}))


def biases(raw: Matrix, pair: Pair, probes: Sequence[Probe]) -> tuple[Bias, Bias]:
    """The biased probe asked about the first label and about the second, from the unbiased probes of both."""
    probe = fit_probe(raw, pair.agreeing)

    def asked(kept: int) -> Bias:
        task = pair.labels[kept]

        def right(reader: Probe, split: str) -> Flags:
            return reader.correct(raw[task.rows[split]], task.positive[split])

        return Bias(
            probe, task, pair.labels[1 - kept], probes[1 - kept],
            right(probe, "test"), right(probes[kept], "test"), float(right(probe, "select").mean()),
        )  # fmt: skip

    return asked(0), asked(1)


def effects(basis: Basis, removed: Task, reader: Probe) -> Matrix:
    """How much each feature moves the probe of the label that is removed, whichever way (m,)."""
    return np.abs(mean_difference(basis.features, removed) * (basis.write @ reader.weight))


def _scores(
    pooled: Pooled,
    saes: Mapping[str, SAE],
    baselines: Sequence[str],
    ways: Mapping[str, Sequence[Basis]],
    asked: tuple[Bias, Bias],
    thresholds: Sequence[int],
    seed: int,
) -> Iterator[tuple[str, str, Judged]]:
    """Row of the table, metric and score of one pair, where its bias costs anything."""
    worse = 0 if asked[0].on_select <= asked[1].on_select else 1
    for kept, bias in enumerate(asked):
        if bias.oracle - bias.before < GAP:
            continue
        parts = [f"dir{kept + 1}"] + ["metric"] * (kept == worse)
        for name, its in ways.items():
            basis = its[1 - kept]
            counts = [n for n in thresholds if name not in saes or n <= basis.write.shape[0]]
            best = strongest(effects(basis, bias.removed, bias.reader), max(counts, default=0))
            rows = {name: best}
            if name in saes and name not in baselines:
                rows[f"{name}: random latents"] = matched(best, pooled.fired[name], seed)
            for row, latents in rows.items():
                for n in counts:
                    if len(latents) >= len(best[:n]):  # of few latents not as many others may be left
                        score = bias.score(pooled.raw, basis, latents[:n])
                        yield from ((row, f"scr_{part}_threshold_{n}", score) for part in parts)


def _notes(lost: Mapping[str, Sequence[Mapping[str, float]]]) -> tuple[str, ...]:
    """What was not scored because the bias cost nothing."""
    idle = [
        f"{pair} (dir{d}, {count} of {len(found)} seeds)"
        for pair, found in lost.items()
        for d in (1, 2)
        if (count := sum(one[f"dir{d}_oracle"] - one[f"dir{d}_before"] < GAP for one in found))
    ]
    return (
        (f"no score where the bias costs less than {GAP:g} of accuracy: {', '.join(idle)}",) if idle else ()
    )
