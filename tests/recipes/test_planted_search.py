"""Planted concepts are found where their latent is in the answers; what a guess would find is told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from unbraid.activations.documents import Document
from unbraid.evaluation.concepts import ConceptRow
from unbraid.evaluation.tokens import Counts
from unbraid.practice.descriptions import describe
from unbraid.practice.lexicon import DRUG_DOSES
from unbraid.recipes import planted_search
from unbraid.recipes.planted_search import ASKED, detectors, judged, phrases, sentences


def _row(concept: str, latent: int) -> ConceptRow:
    return ConceptRow(concept, 50, latent, (latent,), 0.01, {})


def test_a_concept_is_found_where_a_latent_that_detects_it_is_in_the_answers() -> None:
    rows = [_row("a", 1), _row("b", 2), _row("c", 3), _row("d", 1)]
    related = {"a": frozenset("b"), "b": frozenset("a"), "c": frozenset[str]()}  # d is not in the texts
    detecting = [frozenset({row.latent}) for row in rows]
    way = judged(rows, [{1, 2, 3}, {1, 9}, {3}, set()], related, detecting)
    assert dict(way.found) == {"a": True, "b": False, "c": True, "d": False}
    assert (way.share.value, way.share.n) == (0.5, 4) and 0 < way.share.low < 0.5 < way.share.high < 1
    # Guesses: for a the latent of c alone, which is there (b is related, d has the same latent); for b those
    # of c and d; for c those of a, b and d; for d those of b and c.
    assert way.guessed == pytest.approx((1 + (0 + 1) + 0 + 0) / (1 + 2 + 3 + 2))
    assert judged(rows[:1], [{1}], related, detecting[:1]).guessed is None
    detecting[1] |= {9}  # b is told as well by 9, which is in its answer; c's answer has none of b's
    way = judged(rows, [{1, 2, 3}, {1, 9}, {3}, set()], related, detecting)
    assert way.found["b"] and way.guessed == pytest.approx((1 + 1) / 8)


def test_a_latent_detects_a_concept_where_its_f1_is_near_that_of_the_chosen_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tokens 0 to 9 have the concept; latent 1 fires at 0 to 7, 2 at 2 to 9 and 10, 3 at 0 to 3, 0 never."""
    fires = np.zeros((20, 4))
    fires[0:8, 1] = fires[2:11, 2] = fires[0:4, 3] = 1
    labels = np.arange(20)[:, None] < np.array([[10, 0]])
    counts = Counts(2, 4)
    counts.add(fires, np.tile(np.arange(4), (20, 1)), labels, np.zeros(20, np.int64))
    sums = SimpleNamespace(tokens_with=labels.sum(axis=0))
    monkeypatch.setattr(planted_search, "count_tokens", lambda *_: ({"": counts}, sums))
    contexts: Any = SimpleNamespace(sae=None, lm=None, site=None)
    # F1 are 16/18, 16/19 and 8/14; of a concept that stands nowhere the chosen latent alone is known.
    rows = [_row("a", 1), _row("b", 3)]
    assert detectors(rows, contexts, []) == [{1, 2}, {3}]
    assert detectors([_row("a", 3), _row("b", 3)], contexts, []) == [{1, 2, 3}, {3}]


def test_a_sentence_has_the_concepts_that_stand_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    messages = (
        {"role": "user", "content": "I am ill. Help me!\nNow"},
        {"role": "assistant", "content": "Take 5."},
    )
    concepts = ((0, "ill", 5, 8), (0, "both", 7, 12), (1, "dose", 5, 6))
    made = sentences([Document.of_messages(messages, id="a", concepts=concepts)])
    assert [(one.text, one.concepts) for one in made] == [
        ("I am ill.", {"ill", "both"}), ("Help me!", {"both"}), ("Now", set()), ("Take 5.", {"dose"}),
    ]  # fmt: skip
    assert [len(one.document.messages or ()) for one in made] == [1, 1, 1, 2]
    for one in made:
        assert one.document.messages is not None and one.document.focus is not None
        assert one.document.messages[-1]["content"][slice(*one.document.focus)].strip() == one.text
    monkeypatch.setattr(planted_search, "SENTENCES", 2)
    assert len(sentences([Document.of_messages(messages, concepts=concepts)] * 3)) == 2


def test_the_words_of_a_concept_are_those_that_its_description_quotes() -> None:
    assert phrases("drug") == list(DRUG_DOSES)[:ASKED]
    assert all(f'"{phrase}"' in str(describe("closing")) for phrase in phrases("closing"))
    assert phrases("answer") == []
