"""Labels on the practice assistant: do scorers rank a concept's true description above wrong ones?

Concepts with a pure latent are found where the answers are known (`evaluation.concepts`), and looked for in
every way that there is (`planted_search`).  For each, its true
description and twenty of others go through every scorer on windows in which the index shows that latent.  The
descriptions were written beforehand, from the world's word lists (`practice.descriptions`).  A concept that
stands mostly at the same tokens, such as the value of a slot and the slot, is no wrong one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from unbraid.activations.documents import Document
from unbraid.evaluation.concepts import ALPHA, ConceptRow
from unbraid.features.index import IndexConfig, build_index
from unbraid.features.labels.contexts import ContextConfig, Contexts, Evidence
from unbraid.features.labels.embedding import Embed
from unbraid.features.labels.judges import Judge, LexicalJudge
from unbraid.features.labels.labelling import explanations_of, score_labels
from unbraid.features.labels.llm import LLM
from unbraid.features.labels.scores import Score
from unbraid.manifest.errors import UserError
from unbraid.manifest.progress import Progress
from unbraid.model.load import LanguageModel
from unbraid.practice.corpus import conversations
from unbraid.practice.descriptions import describe
from unbraid.recipes.concepts import document, practice_concepts
from unbraid.recipes.planted_search import Related, Way, ways
from unbraid.sae.base import SAE
from unbraid.stats.bootstrap import Interval, bootstrap_mean, rate

PURE = 0.8
"""Share of a latent's firings on its concept from which it counts as pure."""
WRONG = 20
"""Wrong descriptions beside each true one."""
RELATED = 0.2
"""Share of a concept's characters from which another one that stands there too is no wrong description."""
RANKING = ("detection", "fuzzing", "simulation")
TOGETHER = "together"
"""The sum of the three scorers, which ask for a window, for marked tokens and for every token."""
OTHERS = ("embedding", "surprisal", "intervention")
"""Scorers without a judge, which have no part in the sum: they ask a model that has to understand English."""
FEW = 3
"""Wrong descriptions that these slow ones score."""


@dataclass(frozen=True)
class Ranking:
    """How one concept's true description fared."""

    concept: str
    """Its name."""
    latent: int
    """Its latent."""
    purity: float
    """Share of the latent's firings that lie on the concept."""
    description: str
    """The true description."""
    above: Mapping[str, int]
    """By scorer, how many of the wrong descriptions scored less."""
    wrong: Mapping[str, int]
    """By scorer, how many there were."""
    best_wrong: Mapping[str, str]
    """By scorer, the concept of the best of them."""
    scores: Mapping[str, float | None]
    """By scorer, the true description's own score."""


@dataclass(frozen=True)
class LabelReport:
    """What labels are worth where the answers are known."""

    judge: str
    """Who judged."""
    concepts: int
    """How many concepts were measured."""
    standing_out: int
    """How many of them have a latent that stands out among all."""
    pure: int
    """How many of these are pure."""
    ways: Mapping[str, Way]
    """By way of searching, which of the ranked concepts are found."""
    rankings: tuple[Ranking, ...]
    """One for each concept with a pure latent and a description."""
    first: Mapping[str, Interval]
    """By scorer, the share of concepts whose true description is above all wrong ones, over concepts."""
    labellers: Mapping[str, Mapping[str, Any]]
    """By explainer, the mean of its labels' detection scores and how many latents it labelled."""
    notes: tuple[str, ...]
    """What was left out."""

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        first = {name: interval.as_dict() for name, interval in self.first.items()}
        ways = {name: way.as_dict() for name, way in self.ways.items()}
        return {**asdict(self), "first": first, "ways": ways}


def practice_labels(
    sae: SAE,
    lm: LanguageModel,
    out: Path,
    *,
    sae_id: str,
    count: int = 1000,
    seed: int = 0,
    judge: Judge | None = None,
    llms: Sequence[LLM] = (),
    embed: tuple[Embed, str] | None = None,
    config: ContextConfig | None = None,
    progress: Progress | None = None,
) -> LabelReport:
    """Rank descriptions of planted concepts, and let explainers label their latents.

    Concepts are looked for in `count` conversations of the world's test split, latents are indexed in as
    many of its fit split, into the folder `out`.  The lexical explainer and each of `llms` label the latents
    of all ranked concepts, judged by `judge`, the lexical one when left out; without `embed` there is no
    embedding scorer.  Raises UserError where no concept has a pure latent.
    """
    judge = judge or LexicalJudge()
    _, found = practice_concepts(sae, lm, conversations=count, seed=seed, floors=False, progress=progress)
    pure = [row for row in found["sae"] if is_pure(row)]
    if not pure:
        raise UserError(f"no concept has a latent of purity {PURE:g}; train the autoencoder longer or wider")
    indexed = [document(c) for c in islice(conversations("fit", seed=seed, advice_share=0.5), count)]
    index = build_index(sae, lm, indexed, IndexConfig(seed=seed), out, sae_id=sae_id, progress=progress)
    contexts = Contexts(index, sae, lm, config or ContextConfig(seed=seed))

    described = [row for row in pure if describe(row.concept) is not None]
    silent = sorted(row.concept for row in pure if describe(row.concept) is None)
    notes: list[str] = []
    if silent:
        notes.append(f"{len(silent)} concepts with a pure latent have no description: {', '.join(silent)}")
    latents = sorted({row.latent for row in described})
    evidence = dict(zip(latents, contexts.evidence(latents), strict=True))
    usable = [row for row in described if evidence[row.latent].positives and evidence[row.latent].negatives]
    notes += [f"{row.concept}: no test windows of both kinds" for row in described if row not in usable]
    standing, others = related(overlaps(indexed)), OTHERS if embed else OTHERS[1:]
    rankings = tuple(
        rank(contexts, row, evidence[row.latent], standing, judge, others, embed, seed=seed + number)
        for number, row in enumerate(usable)
    )
    first = {
        name: rate([ranking.above[name] == ranking.wrong[name] for ranking in rankings])
        for name in (rankings[0].above if rankings else ())
    }
    asked = [document(c) for c in islice(conversations("test", seed=seed + 1, advice_share=0.5), count)]
    looked_for = ways(usable, contexts, asked, standing, seed=seed, progress=progress) if usable else {}
    chosen = [evidence[latent] for latent in sorted({row.latent for row in usable})]
    labellers = {"lexical": labeller(contexts, chosen, judge, None)}
    for llm in llms:
        labellers[llm.name] = labeller(contexts, chosen, judge, llm)
    out_of = len(found["sae"]), sum(row.p_value is not None and row.p_value <= ALPHA for row in found["sae"])
    return LabelReport(judge.name, *out_of, len(pure), looked_for, rankings, first, labellers, tuple(notes))


def is_pure(row: ConceptRow) -> bool:
    """Whether a concept's latent stands out among all and fires on the concept alone, or nearly."""
    purity = row.metrics.get("purity")
    return row.p_value is not None and row.p_value <= ALPHA and purity is not None and purity.value >= PURE


def overlaps(documents: Sequence[Document]) -> dict[str, dict[str, float]]:
    """For each two concepts the share of the characters of the first at which the second stands as well."""
    total: dict[str, float] = {}
    both: dict[str, dict[str, float]] = {}
    for one in documents:
        for message, concept, start, end in one.concepts:
            total[concept] = total.get(concept, 0.0) + end - start
            for other_message, other, low, high in one.concepts:
                shared = min(end, high) - max(start, low)
                if other_message == message and other != concept and shared > 0:
                    row = both.setdefault(concept, {})
                    row[other] = row.get(other, 0.0) + shared
    return {
        concept: {other: shared / length for other, shared in both.get(concept, {}).items()}
        for concept, length in total.items()
    }


def related(shares: Mapping[str, Mapping[str, float]]) -> Related:
    """For each concept those that stand at a fifth of its characters, or it at a fifth of theirs."""
    return {
        one: frozenset(
            other
            for other in shares
            if shares[one].get(other, 0.0) >= RELATED or shares[other].get(one, 0.0) >= RELATED
        )
        for one in shares
    }


def rank(
    contexts: Contexts,
    row: ConceptRow,
    evidence: Evidence,
    related: Related,
    judge: Judge,
    others: Sequence[str] = (),
    embed: tuple[Embed, str] | None = None,
    *,
    seed: int,
) -> Ranking:
    """Score a concept's true description beside twenty wrong ones, drawn from all concepts in the text, by
    the judge's scorers, and a few of these by `others`."""
    true = describe(row.concept)
    assert true is not None
    texts = {name: text for name in sorted(related) if (text := describe(name)) and text != true}
    free = [name for name in texts if name not in related.get(row.concept, ()) and name != row.concept]
    drawn = np.random.default_rng(seed).permutation(len(free))[:WRONG]
    names = [free[i] for i in drawn.tolist()]
    labelled = [(text, evidence) for text in (true, *(texts[name] for name in names))]
    values = {
        name: [_value(score) for score in score_labels(contexts, labelled, name, judge)] for name in RANKING
    }
    values[TOGETHER] = [sum(some) for some in zip(*values.values(), strict=True)]
    for name in others:
        few = labelled[: FEW + 1]
        values[name] = [_value(score) for score in score_labels(contexts, few, name, judge, embed)]
    best = {name: names[int(np.argmax(some[1:]))] for name, some in values.items()}
    return Ranking(
        row.concept,
        row.latent,
        row.metrics["purity"].value,
        true,
        {name: sum(some[0] > other for other in some[1:]) for name, some in values.items()},
        {name: len(some) - 1 for name, some in values.items()},
        best,
        {name: some[0] for name, some in values.items()},
    )


def labeller(
    contexts: Contexts, evidence: Sequence[Evidence], judge: Judge, llm: LLM | None
) -> dict[str, Any]:
    """Label latents and give the mean of the labels' detection scores with its interval over latents; where
    there is no label, the score is that of knowing nothing."""
    explanations = explanations_of(contexts, evidence, llm)
    labelled = [(e.text, one) for e, one in zip(explanations, evidence, strict=True) if e.text]
    scores = iter(score_labels(contexts, labelled, "detection", judge))
    values = [_value(next(scores)) if e.text else 0.5 for e in explanations]
    return {
        "detection": bootstrap_mean(values, range(len(values)), 0).within(0, 1).as_dict(),
        "values": values,
        "labelled": len(labelled),
        "latents": len(values),
        "labels": {str(one.latent): e.text for e, one in zip(explanations, evidence, strict=True)},
    }


def _value(score: Score) -> float:
    """A score as a number; what could not be measured is worth what knowing nothing gives."""
    return score.chance if score.value is None else score.value.value
