"""Which concept has a latent: how pure it is, how complete, over how many latents it is split, and where
another latent has taken its place.

Given which concepts stand at which token, for each concept:

* on `select` the latent whose firing has the best F1 is chosen, and an order of latents that join it,
greedily,
  each the one that raises the F1 of "any of them fires" most;
* on `fit` it is decided how many of them: as long as the next one finds at least a hundredth more of the
  concept's tokens and does not lower the F1;
* on `test` everything is measured, with intervals from drawing documents again.

Whether the best of thousands of latents means anything is asked by a permutation test on `select`: a
document's score is a latent's highest activation in it, and the labels of documents are exchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unbraid.activations.documents import Document
from unbraid.evaluation.definitions import Definition
from unbraid.evaluation.detectors import detectors
from unbraid.evaluation.drawn import Drawn, Share, Tokens, drawn_weights, mean_of
from unbraid.evaluation.labelled import (
    LEAST,
    SHARES,
    Flags,
    Matrix,
    Reading,
    Rows,
    SuiteResult,
    detectable,
    split_documents,
)
from unbraid.evaluation.tokens import Columns, Counts, candidate_columns, count_tokens
from unbraid.manifest.errors import UserError
from unbraid.manifest.progress import Progress
from unbraid.model.load import LanguageModel
from unbraid.sae.base import SAE
from unbraid.stats.bootstrap import Interval, rate
from unbraid.stats.effects import auroc_from_ranks, ranked
from unbraid.stats.permutation import familywise_p_value

CANDIDATES = 12
"""Latents of each concept, by F1, that may be joined."""
GAIN = 0.01
"""Share of a concept's tokens that a further latent has to find."""
LATENTS_AT_ONCE = 4096
"""Latents whose document scores are dense at the same time."""
ALPHA = 0.05
"""The familywise error at which a concept counts as having a latent."""

_BEST = (
    "the latent with the best F1 of firing (f>0) on select; split 35:30:35 by hash of content and seed;"
    " of DiffMean and Fisher's linear probe, from the moments of select: a projection from the threshold with"
    " the best F1 on fit on"
)
_MEAN = "; over several concepts the unweighted mean of those for which it exists, documents drawn jointly"
DEFINITIONS: dict[str, Definition] = {
    "purity": Definition(
        "share of the latent's firings that lie on its concept",
        f"test tokens where the latent fires and the concept stands / where it fires; {_BEST}{_MEAN}",
        "higher",
    ),
    "completeness": Definition(
        "share of the concept's tokens at which the latent fires",
        f"test tokens where the latent fires and the concept stands / where it stands; {_BEST}{_MEAN}",
        "higher",
    ),
    "auroc": Definition(
        "AUROC of the latent's value for its concept",
        "chance that a test token with the concept has a higher value than one without, ties half;"
        f" interval from values in 256 steps by rank; {_BEST}; of these the projection itself{_MEAN}",
        "higher",
    ),
    "split": Definition(
        "latents that the concept needs",
        "latents joined greedily by the F1 of any of them firing on select (among the 12 best alone), as"
        " long as one adds 0.01 of recall on fit without lowering F1 there, fit's documents drawn"
        f" again{_MEAN}",
        "lower",
    ),
    "split_purity": Definition(
        "purity of those latents together",
        f"as purity, of any of the joined latents; {_BEST}{_MEAN}",
        "higher",
    ),
    "split_completeness": Definition(
        "completeness of those latents together",
        f"as completeness, of any of the joined latents; {_BEST}{_MEAN}",
        "higher",
    ),
    "absorbed": Definition(
        "share of the concept's tokens that another latent has taken over",
        "test tokens with the concept where no joined latent fires and the firing latent with the"
        " largest f·cos(W_dec, p) has cos ≥ 0.025 and f·cos ≥ 0.4 (x − E x)·p > 0, p the unit difference"
        " of means of tokens with and without the concept on select, E x over select / test tokens with"
        f" the concept; {_BEST}{_MEAN}",
        "lower",
    ),
    "found": Definition(
        "share of the concepts that have a latent",
        "share of concepts whose best latent has a familywise p ≤ 0.05 on select: AUROC of the latent's"
        " highest value in a document for documents with the concept, against the largest over all"
        " latents under 200 permutations of the documents' labels; Wilson's interval over concepts;"
        f" {_BEST}",
        "higher",
    ),
}


@dataclass(frozen=True)
class ConceptRow:
    """What was found of one concept in one autoencoder."""

    concept: str
    """Its name."""
    tokens: int
    """Test tokens at which it stands."""
    latent: int
    """The latent whose firing fits best."""
    joined: tuple[int, ...]
    """That one and those that it is split over."""
    p_value: float | None
    """Familywise p-value of the latent among all; None where every document, or none, has the concept."""
    metrics: Mapping[str, Interval]
    """By the names in DEFINITIONS; purity is missing where the latent never fired on test."""

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {**vars(self), "metrics": {name: i.as_dict() for name, i in self.metrics.items()}}


def concepts(
    saes: Mapping[str, SAE],
    baselines: Sequence[str],
    lm: LanguageModel,
    documents: Sequence[Document],
    reading: Reading,
    seed: int,
    *,
    resamples: int = 1000,
    permutations: int = 200,
    progress: Progress | None = None,
) -> tuple[SuiteResult, dict[str, list[ConceptRow]]]:
    """Measure all autoencoders, those named in `baselines` among them: means over concepts, and each concept.

    Beside them stand, of the means, the difference of means and a linear probe of the whole activation
    (Fisher's), and predicting nothing: see `detectors`.
    Two passes over the model; memory holds the candidates' values at every token, sparse. Concepts in fewer
    than ten documents of a split are left out and named in the notes. Raises UserError when none is left.
    """
    splits = split_documents(documents, seed)
    names, notes = _measurable(documents, splits)
    chosen = [document for document, split in zip(documents, splits, strict=True) if split == "select"]
    counts, sums = count_tokens(saes, lm, chosen, reading, names, progress)
    ranking = {name: candidates(found, sums.tokens_with) for name, found in counts.items()}
    wanted = {name: np.unique(found) for name, found in ranking.items()}
    columns = candidate_columns(saes, lm, documents, reading, splits, names, wanted, sums, progress)
    there = np.array([[n in {c for _, c, _, _ in d.concepts} for n in names] for d in chosen])

    rows: dict[str, dict[str, Interval]] = {}
    by_concept: dict[str, list[ConceptRow]] = {}
    for name in saes:
        scores = counts[name].highest(len(chosen))
        p_values = best_latent_p_values(scores, there, ranking[name][:, 0], permutations, seed)
        draws: dict[str, list[Share | Drawn]] = {}
        by_concept[name] = []
        for c, concept in enumerate(names):
            local = np.searchsorted(wanted[name], ranking[name][c])
            joined, drawn, n = _measure(columns[name], c, local, seed, resamples)
            for metric, one in drawn.items():
                draws.setdefault(metric, []).append(one)
            latents = tuple(int(wanted[name][j]) for j in joined)
            metrics = {metric: one.interval(n) for metric, one in drawn.items()}
            tokens = int(columns[name]["test"].labels[:, c].sum())
            by_concept[name].append(ConceptRow(concept, tokens, latents[0], latents, p_values[c], metrics))
        rows[name] = {metric: mean_of(some, n_documents(columns[name])) for metric, some in draws.items()}
        tested = [p <= ALPHA for p in p_values if p is not None]
        if tested:
            rows[name]["found"] = rate(tested)
    first = next(iter(columns.values()))
    beside = detectors(first, names)
    by_detector: dict[str, dict[str, dict[str, float]]] = {name: {} for name in beside}
    for name, row in beside.items():
        rows[name] = {
            metric: mean_of(list(some.values()), n_documents(first)) for metric, some in row.items()
        }
        for metric, some in row.items():
            for concept, one in some.items():
                by_detector[name].setdefault(concept, {})[metric] = one.value
    details = {name: [row.as_dict() for row in found] for name, found in by_concept.items()}
    result = SuiteResult(
        "concepts",
        rows,
        (*baselines, *beside),
        detectable(rows),
        {"concepts": details, "detectors": by_detector},
        tuple(notes),
    )
    return result, by_concept


def n_documents(columns: Mapping[str, Columns]) -> int:
    """Documents of the test split."""
    return len(np.unique(columns["test"].document))


def _measurable(documents: Sequence[Document], splits: NDArray[np.str_]) -> tuple[list[str], list[str]]:
    """Concepts in enough documents of every split, and a note on the others."""
    seen: dict[str, dict[str, int]] = {}
    for document, split in zip(documents, splits.tolist(), strict=True):
        for name in {concept for _, concept, _, _ in document.concepts}:
            at = seen.setdefault(name, {})
            at[split] = at.get(split, 0) + 1
    names = sorted(name for name, at in seen.items() if min(at.get(s, 0) for s in SHARES) >= LEAST)
    if not names:
        known = f"{len(seen)} concepts found" if seen else "no document has the field concepts"
        raise UserError(
            f"no concept stands in {LEAST} of the {len(documents)} documents in each of the three splits"
            f" ({known}); a concept needs about {4 * LEAST} documents"
        )
    few = sorted(set(seen) - set(names))
    note = f"left out, in fewer than {LEAST} documents of a split: {', '.join(few[:8])}"
    note += f" and {len(few) - 8} more" if len(few) > 8 else ""
    return names, [note] if few else []


def candidates(counts: Counts, tokens_with: Matrix) -> Rows:
    """For each concept the latents with the best F1 of firing, best first (C, m)."""
    f1 = 2 * counts.both / np.maximum(counts.fired[None] + tokens_with[:, None], 1)
    return np.argsort(-f1, axis=1, kind="stable")[:, :CANDIDATES]


def best_latent_p_values(
    scores: Any, labels: Flags, latents: Rows, permutations: int, seed: int
) -> list[float | None]:
    """Familywise p-value of each concept's latent (C,) by its AUROC among all, labels of documents permuted.

    `scores`: sparse by column (n_docs, d_sae), `labels` (n_docs, C). The null is `stats.permutation`'s, with
    the ranks, which do not depend on the labels, taken once for all concepts.
    """
    n = len(labels)
    asked = [c for c in range(labels.shape[1]) if 0 < labels[:, c].sum() < n]
    null = np.full((labels.shape[1], permutations), -np.inf)
    observed = np.full(labels.shape[1], np.nan)
    shuffled = {c: _shuffled(labels[:, c], permutations, seed) for c in asked}
    for start in range(0, scores.shape[1], LATENTS_AT_ONCE):
        if not asked:
            break
        ranks, _ = ranked(scores[:, start : start + LATENTS_AT_ONCE].toarray(), labels[:, asked[0]])
        for c in asked:
            count = int(labels[:, c].sum())
            null[c] = np.maximum(null[c], auroc_from_ranks(shuffled[c] @ ranks, count, n).max(axis=1))
            if start <= latents[c] < start + ranks.shape[1]:
                own = ranks[labels[:, c], latents[c] - start].sum()
                observed[c] = auroc_from_ranks(np.asarray(own), count, n)
    return [
        float(familywise_p_value(observed[c], null[c])) if c in asked else None
        for c in range(labels.shape[1])
    ]


def _shuffled(labels: Flags, permutations: int, seed: int) -> Matrix:
    """Permutations of labels (n,) as rows (permutations, n)."""
    tiled = np.tile(labels, (permutations, 1))
    return np.random.default_rng(seed).permuted(tiled, axis=1).astype(np.float64)


def _measure(
    columns: Mapping[str, Columns], c: int, ranking: Rows, seed: int, resamples: int
) -> tuple[list[int], dict[str, Share | Drawn], int]:
    """Places of the joined latents among the columns, the metrics of concept c, and their test documents."""
    select, fit, test = (columns[split] for split in SHARES)
    order = join_order((select.values[:, ranking] > 0).toarray(), select.labels[:, c])
    places = [int(ranking[j]) for j in order]
    enough, split_draws = _needed((fit.values[:, places] > 0).toarray(), fit, c, seed, resamples)
    joined = places[:enough]
    label, tokens = test.labels[:, c], Tokens(test.document)
    fires = (test.values[:, joined] > 0).toarray()
    one, any_ = fires[:, 0], fires.any(axis=1)
    ratio = tokens.ratio
    drawn: dict[str, Share | Drawn] = {
        "purity": ratio(one & label, one),
        "completeness": ratio(one & label, label),
        "auroc": tokens.auroc(test.values[:, [joined[0]]].toarray()[:, 0], label),
        "split": split_draws,
        "split_purity": ratio(any_ & label, any_),
        "split_completeness": ratio(any_ & label, label),
        "absorbed": ratio(label & ~any_ & test.taken[:, c], label),
    }
    kept = {name: one for name, one in drawn.items() if np.isfinite(one.value)}
    return joined, kept, tokens.documents


def join_order(fires: Flags, label: Flags) -> list[int]:
    """Columns of `fires` (n, m) in the order in which they join: the first, then greedily by the F1 of
    any."""
    order, left = [0], list(range(1, fires.shape[1]))
    covered = fires[:, 0]
    while left:
        joint = covered[:, None] | fires[:, left]
        f1 = 2 * (joint & label[:, None]).sum(axis=0) / np.maximum(joint.sum(axis=0) + label.sum(), 1)
        best = left.pop(int(np.argmax(f1)))
        order.append(best)
        covered = covered | fires[:, best]
    return order


def _needed(fires: Flags, fit: Columns, c: int, seed: int, resamples: int) -> tuple[int, Drawn]:
    """How many of the columns (n, m), in their order, are joined."""
    label, joint = fit.labels[:, c], np.logical_or.accumulate(fires, axis=1)
    _, inverse = np.unique(fit.document, return_inverse=True)

    def by_document(values: Any) -> Matrix:
        out = np.zeros((int(inverse.max()) + 1, values.shape[1]))
        np.add.at(out, inverse, values)
        return out

    hit, fired, there = (by_document(v) for v in (joint & label[:, None], joint, label[:, None]))

    def count(weights: Matrix) -> NDArray[np.int64]:
        hits, firings, tokens = weights @ hit, weights @ fired, weights @ there
        recall = hits / np.maximum(tokens, 1)
        f1 = 2 * hits / np.maximum(firings + tokens, 1)
        goes_on = (np.diff(recall, axis=1) >= GAIN) & (np.diff(f1, axis=1) >= 0)
        return 1 + np.logical_and.accumulate(goes_on, axis=1).sum(axis=1)

    value = int(count(np.ones((1, len(hit))))[0])
    return value, Drawn(float(value), count(drawn_weights(fit.document, seed, resamples)).astype(np.float64))
