"""Label latents: gather evidence, explain, score, and write it all down, some latents at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from unbraid.features.geometry import promoted_and_suppressed
from unbraid.features.labels.contexts import Contexts, Evidence
from unbraid.features.labels.embedding import Embed, embedding
from unbraid.features.labels.endpoint import Estimate, Request
from unbraid.features.labels.judges import Judge, Shown
from unbraid.features.labels.label import Label
from unbraid.features.labels.lexical import Explanation, explain
from unbraid.features.labels.llm import LLM, TEXTS_A_CALL
from unbraid.features.labels.model_scorers import intervention, surprisal
from unbraid.features.labels.prompts import holds_request, odd_request, simulate_request
from unbraid.features.labels.scorers import JUDGED, OTHERS, Labelled
from unbraid.features.labels.scores import Score, not_measured
from unbraid.features.labels.store import Labels
from unbraid.manifest.errors import UserError
from unbraid.manifest.progress import Progress

SCORERS = (*JUDGED, "embedding", "surprisal", "intervention")
USUAL = ("detection", "fuzzing", "simulation")
AT_ONCE = 32
"""Latents whose evidence is held at the same time."""
BY = "unbraid"


@dataclass(frozen=True, eq=False)
class Found:
    """What was found out about one latent."""

    latent: int
    """Its number."""
    explanation: Explanation
    """The label, or why there is none."""
    scores: tuple[Score, ...]
    """One for each scorer that was asked for; none without a label."""
    notes: tuple[str, ...]
    """Where there was less evidence than asked for."""
    label: Label | None
    """As it was stored."""

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "latent": self.latent,
            "label": self.explanation.text or None,
            "why_not": self.explanation.why_not,
            "id": self.label.id if self.label else None,
            "scores": {score.scorer: score.as_dict() for score in self.scores},
            "notes": list(self.notes),
        }


def label_latents(
    contexts: Contexts,
    latents: Sequence[int],
    judge: Judge,
    scorers: Sequence[str] = USUAL,
    *,
    llm: LLM | None = None,
    embed: tuple[Embed, str] | None = None,
    labels: Labels | None = None,
    progress: Progress | None = None,
) -> Iterator[Found]:
    """Explain and score latents, in their order; each label is proposed in `labels` as soon as it is scored.

    With `llm` it writes the labels, else the lexical explainer does.  Raises UserError for an unknown scorer.
    """
    check_scorers(scorers)
    for start in range(0, len(latents), AT_ONCE):
        evidence = contexts.evidence(latents[start : start + AT_ONCE])
        explanations = explanations_of(contexts, evidence, llm)
        labelled = [(e.text, one) for e, one in zip(explanations, evidence, strict=True) if e.text]
        by_scorer = [score_labels(contexts, labelled, scorer, judge, embed) for scorer in scorers]
        scores = iter(list(zip(*by_scorer, strict=True)) if by_scorer else [()] * len(labelled))
        for explanation, one in zip(explanations, evidence, strict=True):
            found = next(scores) if explanation.text else ()
            stored = None
            if explanation.text and labels is not None:
                stored = labels.propose(
                    one.latent,
                    explanation.text,
                    by=BY,
                    kind="llm" if llm else "lexical",
                    model=llm.name if llm else None,
                    scores={score.scorer: score.as_dict() for score in found},
                )
            yield Found(one.latent, explanation, tuple(found), one.notes, stored)
        if progress is not None:
            progress(min(start + AT_ONCE, len(latents)), len(latents), "")


def check_scorers(scorers: Sequence[str]) -> None:
    """Raise UserError for an unknown scorer."""
    for scorer in scorers:
        if scorer not in SCORERS:
            raise UserError(f"there is no scorer {scorer!r}; choose from {', '.join(SCORERS)}")


def explanations_of(
    contexts: Contexts, evidence: Sequence[Evidence], llm: LLM | None = None
) -> list[Explanation]:
    """A label for each latent, or why there is none; from training windows and promoted tokens alone."""
    numbers = [one.latent for one in evidence]
    if contexts.lm.layout.unembed is None or contexts.sae.W_dec.shape[1] != contexts.lm.d_in:
        promoted = [()] * len(numbers)
    else:
        promoted = [up for up, _ in promoted_and_suppressed(contexts.sae, contexts.lm, numbers, tokens=5)]
    if llm is None:
        return [explain(one, up) for one, up in zip(evidence, promoted, strict=True)]
    seen = [(one, [e.token for e in up]) for one, up in zip(evidence, promoted, strict=True) if one.train]
    found = iter(llm.explain([one for one, _ in seen], [up for _, up in seen]))
    nothing = Explanation("", None, "it fires in no training window")
    return [next(found) if one.train else nothing for one in evidence]


def score_labels(
    contexts: Contexts,
    labelled: Sequence[Labelled],
    scorer: str,
    judge: Judge,
    embed: tuple[Embed, str] | None = None,
) -> list[Score]:
    """One scorer's scores of many labels, in their order."""
    seed = contexts.config.seed
    if scorer in JUDGED:
        return JUDGED[scorer](judge, labelled, seed)
    if scorer == "surprisal":
        return surprisal(contexts.lm, labelled)
    if scorer == "intervention":
        return intervention(contexts.lm, contexts.sae, contexts.site, labelled, seed)
    if embed is None:
        why = "no embedding model is on this machine; name the folder of one with --embedding-model"
        return [not_measured("embedding", "none", 0.5, why, one) for _, one in labelled]
    return embedding(embed[0], embed[1], labelled)


def estimate(
    contexts: Contexts, latents: Sequence[int], llm: LLM, scorers: Sequence[str], *, judged: bool
) -> Estimate:
    """What the calls for these latents will take, extrapolated from the evidence about a few of them.

    `judged`: whether the language model also judges.  A label that does not exist yet is taken to have a
    hundred characters; what is asked a second time, after a reply that could not be read, is not foreseen.
    """
    some = contexts.evidence(latents[: min(4, len(latents))])
    requests: list[Request] = llm.explain_requests(
        [one for one in some if one.train], [["token"] * 5 for one in some if one.train]
    )
    label = "x" * 100
    for one in some if judged else ():
        shown = [Shown.of(window) for window in (*one.positives, *one.negatives)]
        parts = [shown[i : i + TEXTS_A_CALL] for i in range(0, len(shown), TEXTS_A_CALL)]
        asked: dict[str, Callable[[], list[Request]]] = {
            "detection": lambda parts=parts: [holds_request(label, part) for part in parts],
            "fuzzing": lambda parts=parts: [holds_request(label, part) for part in parts],
            "simulation": lambda shown=shown: [simulate_request(label, text) for text in shown],
            "intruder": lambda one=one, shown=shown: [
                odd_request(shown[: OTHERS + 1]) for _ in one.negatives
            ],
        }
        requests += [request for scorer in scorers if scorer in asked for request in asked[scorer]()]
    return llm.endpoint.estimate(requests, len(latents) / max(len(some), 1))
