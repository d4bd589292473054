"""Whether planted concepts are found: by two sets of texts, by words, by a pasted text, and by labels.

Each question is asked as a user would ask it, from the world's words for a concept or with sentences of
conversations in which it stands.  An answer is right where a latent that detects the concept is among the
first ten: the one that was chosen for it on other conversations, or one that, on the conversations asked
with, tells the concept's tokens about as well, as a concept is often split over several.  The same answers
are looked through for the latents of unrelated concepts: that is what a guess would find.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from unbraid.activations.documents import Document
from unbraid.evaluation.concepts import ConceptRow
from unbraid.evaluation.labelled import Reading
from unbraid.evaluation.tokens import count_tokens
from unbraid.features.find import FindConfig, find
from unbraid.features.labels.contexts import Contexts
from unbraid.features.labels.labelling import AT_ONCE, BY, explanations_of
from unbraid.features.labels.matcher import quotes
from unbraid.features.labels.rows import Row
from unbraid.features.labels.store import Labels
from unbraid.features.labels.words import is_content, split_words
from unbraid.features.scores import document_scores
from unbraid.features.search import Search
from unbraid.manifest.errors import UserError
from unbraid.manifest.progress import Progress
from unbraid.practice.descriptions import describe
from unbraid.stats.bootstrap import Interval, rate

FIRST = 10
"""Latents of an answer among which the right one has to be."""
ASKED = 5
"""Phrases, or texts, that are asked with; one of them has to find it."""
AS_WELL = 0.9
"""Share of the chosen latent's F1 from which on another one detects a concept as well."""
SENTENCES = 4000
"""Sentences, in the order of the conversations, that are told apart by whether a concept stands in them."""
SENTENCE = re.compile(r"[^.!?\n]+[.!?]*")
Related = Mapping[str, frozenset[str]]
"""For each concept those that stand mostly at the same tokens."""


@dataclass(frozen=True)
class Way:
    """How one way of searching fared."""

    found: Mapping[str, bool]
    """By concept, whether a latent that detects it is in the answers."""
    share: Interval
    """Share of the concepts that are found."""
    guessed: float | None
    """Share of the unrelated concepts of which a latent is in the same answers."""

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {**asdict(self), "share": self.share.as_dict()}


@dataclass(frozen=True, eq=False)
class Sentence:
    """A sentence of a conversation."""

    document: Document
    """The conversation up to the sentence's message, with the sentence as its focus."""
    text: str
    """The sentence alone."""
    concepts: frozenset[str]
    """Which stand in it."""


def ways(
    rows: Sequence[ConceptRow],
    contexts: Contexts,
    documents: Sequence[Document],
    related: Related,
    *,
    seed: int,
    progress: Progress | None = None,
) -> dict[str, Way]:
    """Look for each concept's latent in every way; `documents` are conversations that the index has not seen.

    Their sentences are what is asked with.  The lexical explainer's labels of all latents that fire are
    proposed beside the index.
    """
    asked = sentences(documents)
    answers = {
        "find": by_sets(rows, contexts, asked, seed, progress),
        **by_search(rows, contexts, asked),
        "label": by_label(rows, contexts, progress),
    }
    as_good = detectors(rows, contexts, documents)
    return {how: judged(rows, found, related, as_good) for how, found in answers.items()}


def detectors(
    rows: Sequence[ConceptRow], contexts: Contexts, documents: Sequence[Document]
) -> list[frozenset[int]]:
    """For each concept its latent and those that tell its tokens in the documents about as well, by F1."""
    reading = Reading(contexts.site)
    counts, sums = count_tokens(
        {"": contexts.sae}, contexts.lm, documents, reading, [row.concept for row in rows]
    )
    f1 = 2 * counts[""].both / np.maximum(counts[""].fired + sums.tokens_with[:, None], 1)  # (rows, d_sae)
    return [
        frozenset(np.flatnonzero((own > 0) & (own >= AS_WELL * own[row.latent])).tolist()) | {row.latent}
        for row, own in zip(rows, f1, strict=True)
    ]


def sentences(documents: Iterable[Document]) -> list[Sentence]:
    """The first sentences of conversations, each in the middle of its own and read there alone."""
    found: list[Sentence] = []
    for document in documents:
        messages = document.messages or ()
        for number, message in enumerate(messages):
            for match in SENTENCE.finditer(message["content"]):
                if len(found) == SENTENCES:
                    return found
                names = frozenset(
                    name
                    for of, name, start, end in document.concepts
                    if of == number and start < match.end() and end > match.start()
                )
                asked = Document.of_messages(messages[: number + 1], id=document.id, focus=match.span())
                found.append(Sentence(asked, match.group().strip(), names))
    return [one for one in found if one.text]


def by_sets(
    rows: Sequence[ConceptRow],
    contexts: Contexts,
    asked: Sequence[Sentence],
    seed: int,
    progress: Progress | None,
) -> list[set[int]]:
    """What `find` reports for the sentences with a concept against all others; those of one conversation are
    in one split."""
    documents = [one.document for one in asked]
    scores = document_scores(contexts.sae, contexts.lm, documents, contexts.site, progress=progress)
    answers: list[set[int]] = []
    for row in rows:
        mine = np.array([row.concept in one.concepts for one in asked])
        ids = [documents[i].id for i in np.argsort(~mine, kind="stable").tolist()]
        try:
            found = find(scores.latents[mine], scores.latents[~mine], ids, FindConfig(top=FIRST, seed=seed))
        except UserError:  # too few sentences with it, or without: nothing is found
            answers.append(set())
        else:
            answers.append({one.latent for one in found.latents})
    return answers


def by_search(
    rows: Sequence[ConceptRow], contexts: Contexts, asked: Sequence[Sentence]
) -> dict[str, list[set[int]]]:
    """What full text answers to the concept's phrases, and what fires on sentences in which it stands."""
    search = Search(contexts.index)
    words: list[set[int]] = []
    pasted: list[set[int]] = []
    for row in rows:
        words.append(_latents(search.text(f'"{phrase}"', FIRST) for phrase in phrases(row.concept)))
        some = list(dict.fromkeys(one.text for one in asked if row.concept in one.concepts))[:ASKED]
        pasted.append(_latents(search.activation(contexts.sae, contexts.lm, t, FIRST) for t in some))
    return {"search by words": words, "search by a pasted text": pasted}


def by_label(rows: Sequence[ConceptRow], contexts: Contexts, progress: Progress | None) -> list[set[int]]:
    """Latents whose lexical labels hold a content word of the concept's phrases."""
    alive = np.flatnonzero(contexts.index.densities > 0).tolist()
    labels = Labels.of_index(contexts.index)
    drafts: list[Row] = []
    for start in range(0, len(alive), AT_ONCE):
        some = contexts.evidence(alive[start : start + AT_ONCE])
        for one, said in zip(some, explanations_of(contexts, some), strict=True):
            if said.text:
                drafts.append(Row.of_label(labels.draft(one.latent, said.text, by=BY, kind="lexical")))
        if progress is not None:
            progress(min(start + AT_ONCE, len(alive)), len(alive), "latents labelled")
    labels.add(drafts)
    text = Search(contexts.index, labels).labelled
    assert text is not None
    answers: list[set[int]] = []
    for row in rows:
        words = dict.fromkeys(w for p in phrases(row.concept) for w in split_words(p) if is_content(w))
        answers.append(_latents(text.search(word, FIRST) for word in words))
    return answers


def judged(
    rows: Sequence[ConceptRow],
    answers: Sequence[set[int]],
    related: Related,
    detecting: Sequence[frozenset[int]],
) -> Way:
    """Which concepts' `detecting` latents are in their answers, and how many unrelated concepts' are."""
    found = {row.concept: bool(mine & some) for row, some, mine in zip(rows, answers, detecting, strict=True)}
    others = [
        bool(its & some)
        for row, some, mine in zip(rows, answers, detecting, strict=True)
        for other, its in zip(rows, detecting, strict=True)
        if not its & mine and other.concept not in related.get(row.concept, ())
    ]
    return Way(found, rate(list(found.values())), float(np.mean(others)) if others else None)


def phrases(concept: str) -> list[str]:
    """The first phrases that a concept's description quotes."""
    return quotes(describe(concept) or "")[:ASKED]


def _latents(answers: Iterable[Iterable[Any]]) -> set[int]:
    return {hit.latent for answer in answers for hit in answer}
