"""First-letter absorption: where a latent for "begins with s" stays silent, does another carry it?

As in SAEBench (Karvonen et al. 2025, after Chanin et al. 2024, arXiv 2409.14507), on the model's own
vocabulary: the activation of each word is read; a probe for each letter is fitted; the latents that a
sparse probe of the letter needs are its main ones; and at the words of that letter that the probe gets
right it is asked whether

* full absorption: no main latent fires and one other carries at least 0.4 of the projection on the probe;
* absorption fraction: up to three others, each with a cosine of at least 0.1, carry at least 0.4 of it; then
  their share of what they and the main latents carry.

The definition changed between paper and code; ours has a version in its formula.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.sparse import csr_array
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.preprocessing import StandardScaler

from unbraid.activations.documents import Document
from unbraid.evaluation.absorption import LEAST_SHARE, absorbed, cosines
from unbraid.evaluation.definitions import Definition
from unbraid.evaluation.labelled import (
    Flags,
    Matrix,
    Reading,
    Rows,
    SuiteResult,
    Task,
    detectable,
    pool,
    split_documents,
    tasks,
)
from unbraid.evaluation.probing import PENALTY, top
from unbraid.evaluation.tpp import Probe, fit_probe
from unbraid.manifest.errors import UserError
from unbraid.manifest.progress import Progress
from unbraid.model.load import LanguageModel
from unbraid.sae.base import SAE
from unbraid.stats.bootstrap import Interval, bootstrap_ratio, mean_of_runs

MOST_LATENTS = 10
"""The largest sparse probe."""
F1_GAIN = 0.03
"""What a further latent has to add to the F1 of a sparse probe to count as a main one."""
ORACLE = "letter probes"
"""Name of the row that a dictionary of the probes themselves has."""
FRACTION_COSINE, FRACTION_LATENTS = 0.1, 3
"""Cosine that latents need to count in the fraction, and how many may."""

_HOW = (
    "first letter, version 1: vocabulary words of three or more ASCII letters after a space, the"
    " activation at the word's last token as a text of its own; probes are logistic regressions (L2, C=1,"
    " standardised) fitted on fit; main latents: the largest mean differences on select, joined while the"
    " F1 on select of a probe fitted on fit rises by 0.03, at most 10; test words of the letter that the"
    " dense probe gets right; words split 35:30:35 by hash and seed, classes of equal size for fitting;"
    " mean over letters"
)
DEFINITIONS: dict[str, Definition] = {
    "mean_full_absorption_score": Definition(
        "share of words whose letter one other latent carries alone",
        f"no main latent fires, and the latent with the largest f·cos has cos ≥ 0.025 and f·cos ≥ 0.4 x·p;"
        f" {_HOW}",
        "lower",
    ),
    "mean_absorption_fraction_score": Definition(
        "share of the letter's projection that absorbing latents carry",
        "0 where the main latents' f·cos reaches x·p, or where the three largest f·cos > 0 of others"
        " with cos ≥ 0.1 are below 0.4 x·p; 1 where the main latents' is not positive; else min(others,"
        f" x·p − main) / (that + main); {_HOW}",
        "lower",
    ),
    "mean_num_split_features": Definition(
        "main latents of a letter", f"number of main latents; {_HOW}", "lower"
    ),
}


def vocabulary(lm: LanguageModel) -> list[Document]:
    """The vocabulary's words as documents, each with its first letter as a label."""
    if lm.tokenizer is None:
        raise UserError(f"model {lm.name} has no tokenizer, so it has no words; leave absorption out")
    words: set[str] = set()
    for token in range(len(lm.tokenizer)):
        text = lm.tokenizer.decode([token])
        word = text.strip()
        if len(word) >= 3 and word.isascii() and word.isalpha():
            words.add(word)
    return [Document.of_text(f" {word}", labels={"first letter": word[0].lower()}) for word in sorted(words)]


def absorption_first_letter(
    saes: Mapping[str, SAE],
    baselines: Sequence[str],
    lm: LanguageModel,
    reading: Reading,
    seed: int,
    *,
    words: Sequence[Document] | None = None,
    resamples: int = 2000,
    progress: Progress | None = None,
) -> SuiteResult:
    """Absorption of first letters in every autoencoder, those named in `baselines` among them.

    The floor of both scores is a dictionary of the letters' own probes: a latent a letter, which fires where
    its probe says yes, by the projection on it.
    `words` are the vocabulary's unless given. Raises UserError when no letter has enough words.
    """
    asked_words = vocabulary(lm) if words is None else list(words)
    at_end = Reading(reading.site, "last", reading.context, reading.batch_tokens)
    splits = split_documents(asked_words, seed)
    try:
        asked = tasks(asked_words, splits, seed)
    except UserError as error:
        raise UserError(
            f"the vocabulary of {lm.name} has {len(asked_words)} plain words, too few to probe for first"
            " letters; leave absorption out"
        ) from error
    pooled = pool(lm, asked_words, saes, at_end, progress)
    letters = np.array([word.labels["first letter"] for word in asked_words])
    rows: dict[str, dict[str, Interval]] = {}
    details: dict[str, Any] = {}
    scored = [_scored(pooled.raw, task, letters, splits) for task in asked]
    scored_tasks = [(task, *found) for task, found in zip(asked, scored, strict=True) if len(found[0])]
    if not scored_tasks:
        raise UserError(f"no first letter can be read off {lm.name} at {reading.site}; leave absorption out")
    units = np.stack([unit for _, _, unit, _ in scored_tasks])
    table = {name: (pooled.latents[name], cosines(sae, units)) for name, sae in saes.items()}
    fires = np.stack([probe.says(pooled.raw) for *_, probe in scored_tasks], axis=1)
    ideal = np.where(fires, np.maximum(pooled.raw @ units.T, 0), 0)
    table[ORACLE] = (csr_array(ideal), units @ units.T)
    for name, (codes, aligned) in table.items():
        full: list[Flags] = []
        fraction: list[Matrix] = []
        mains: list[Rows] = []
        for number, (task, chosen, unit, _) in enumerate(scored_tasks):
            main = main_latents(codes, task)
            projection = pooled.raw[chosen] @ unit
            dense = codes[chosen].toarray()
            full.append(full_absorption(dense, main, projection, aligned[:, number]))
            fraction.append(absorption_fraction(dense, main, projection, aligned[:, number]))
            mains.append(main)
        words_of = [chosen for _, chosen, _, _ in scored_tasks]
        rows[name] = {
            "mean_full_absorption_score": _over_letters(full, words_of, seed, resamples),
            "mean_absorption_fraction_score": _over_letters(fraction, words_of, seed, resamples),
            "mean_num_split_features": mean_of_runs([len(main) for main in mains]),
        }
        details[name] = {
            task.name: {"main": main.tolist(), "words": len(chosen), "full": float(a.mean()),
                        "fraction": float(b.mean())}
            for (task, chosen, _, _), main, a, b in zip(scored_tasks, mains, full, fraction, strict=True)
        }  # fmt: skip
    lost = [task.name for task, found in zip(asked, scored, strict=True) if not len(found[0])]
    notes = (f"no test word that the probe gets right: {', '.join(lost)}",) if lost else ()
    return SuiteResult(
        "absorption", rows, (*baselines, ORACLE), detectable(rows), {"letters": details}, notes
    )


def _scored(raw: Matrix, task: Task, letters: Any, splits: Any) -> tuple[Rows, Matrix, Probe]:
    """Test words of the letter that the probe gets right, the probe's unit direction, and the probe."""
    probe = fit_probe(raw, task)
    positives = np.flatnonzero((letters == task.name.partition("=")[2]) & (splits == "test"))
    right = probe.correct(raw[positives], np.ones(len(positives), dtype=np.bool_))
    unit = probe.weight / max(float(np.linalg.norm(probe.weight)), 1e-300)
    return positives[right].astype(np.int64), unit, probe


def main_latents(codes: Any, task: Task) -> Rows:
    """The latents that a sparse probe of the letter needs, one or more."""
    order = top(codes, task, MOST_LATENTS)
    best, count = -np.inf, 0
    for k in range(1, len(order) + 1):
        scaler: Any = StandardScaler()
        model: Any = LogisticRegression(C=PENALTY, max_iter=1000)
        model.fit(scaler.fit_transform(codes[task.rows["fit"]][:, order[:k]].toarray()), task.positive["fit"])
        said = model.predict(scaler.transform(codes[task.rows["select"]][:, order[:k]].toarray()))
        f1 = float(f1_score(task.positive["select"], said))
        if count and f1 < best + F1_GAIN:
            break
        best, count = f1, k
    return order[:count].astype(np.int64)


def full_absorption(dense: Matrix, main: Rows, projection: Matrix, aligned: Matrix) -> Flags:
    """Whether one other latent carries the letter where all main ones are silent (n,); codes (n, d_sae)."""
    silent = (dense[:, main] == 0).all(axis=1)
    indices = np.broadcast_to(np.arange(dense.shape[1]), dense.shape)
    return silent & absorbed(projection, dense, indices, aligned)


def absorption_fraction(dense: Matrix, main: Rows, projection: Matrix, aligned: Matrix) -> Matrix:
    """What share of what is carried of the letter absorbing latents carry (n,); codes (n, d_sae)."""
    carried = dense * aligned
    own = carried[:, main].sum(axis=1)
    others = np.where(aligned >= FRACTION_COSINE, np.maximum(carried, 0), 0)
    others[:, main] = 0
    most = min(FRACTION_LATENTS, dense.shape[1])
    lent = np.partition(others, -most, axis=1)[:, -most:].sum(axis=1)
    # A probe that is not even activated has nothing to be absorbed.
    none = (own >= projection) | (lent < LEAST_SHARE * projection) | (projection <= 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        taken = np.minimum(lent, projection - own)
        share = np.where(own <= 0, 1.0, taken / (taken + own))
    return np.where(none, 0.0, np.clip(share, 0, 1))


def _over_letters(values: Sequence[Any], words: Sequence[Rows], seed: int, resamples: int) -> Interval:
    weight = np.concatenate([np.full(len(v), 1 / len(v)) for v in values])
    every = np.concatenate([np.asarray(v, dtype=np.float64) for v in values])
    found = bootstrap_ratio(every * weight, weight, np.concatenate(list(words)), seed, resamples)
    return found.within(0, 1)
