"""Ranking descriptions: a true one wins over unrelated ones, and related ones are never called wrong."""

from __future__ import annotations

from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from unbraid.activations.documents import Document
from unbraid.evaluation.concepts import ConceptRow
from unbraid.features.labels.contexts import Evidence, Window
from unbraid.features.labels.judges import LexicalJudge
from unbraid.practice.corpus import conversations
from unbraid.practice.lexicon import DRUG_DOSES
from unbraid.recipes.concepts import document
from unbraid.recipes.labels import RANKING, TOGETHER, WRONG, is_pure, overlaps, rank, related
from unbraid.stats.bootstrap import Interval

DOCUMENTS = [document(c) for c in islice(conversations("fit", seed=2, advice_share=0.5), 120)]


def _evidence() -> Evidence:
    """A latent that is the concept drug, on prompts of the world."""
    yes: list[Window] = []
    no: list[Window] = []
    for number, one in enumerate(DOCUMENTS):
        assert one.messages is not None
        pieces = tuple(f" {word}" for word in one.messages[0]["content"].split())
        fires = np.array([piece.strip(" .?") in DRUG_DOSES for piece in pieces], dtype=np.float32)
        window = Window(f"{number}", number, 0, tuple(range(len(pieces))), pieces, fires)
        (yes if fires.any() else no).append(window)
    return Evidence(3, (), (), tuple(yes[:30]), tuple(no[:30]))


def _row(purity: float, p: float | None) -> ConceptRow:
    return ConceptRow("drug", 50, 3, (3,), p, {"purity": Interval(purity, purity, purity, 9)})


def test_the_true_description_is_above_all_wrong_ones() -> None:
    contexts: Any = SimpleNamespace(config=SimpleNamespace(seed=0))
    standing = related(overlaps(DOCUMENTS))
    found = rank(contexts, _row(0.95, 0.01), _evidence(), standing, LexicalJudge(), seed=0)
    assert set(found.wrong.values()) == {WRONG} == {20}
    assert {found.above[name] for name in (*RANKING, TOGETHER)} == {20}
    # The judge can also say no: a latent of something else does not go with the description of a drug.
    moved = _evidence()
    for window in moved.positives:
        window.activations[:] = np.roll(window.activations, 3)
    other = rank(contexts, _row(0.95, 0.01), moved, standing, LexicalJudge(), seed=0)
    assert other.above["fuzzing"] < 20


def test_concepts_at_the_same_place_are_related() -> None:
    shares = overlaps(DOCUMENTS)
    assert shares["drug=Zolvane"]["drug"] == pytest.approx(1)
    assert 0 < shares["drug"]["drug=Zolvane"] < 0.5
    assert shares["drug"].get("symptom", 0.0) == 0
    standing = related(shares)
    assert "drug=Zolvane" in standing["drug"] and "drug" in standing["drug=Zolvane"]
    assert "symptom" not in standing["drug"]
    alone = Document.of_messages(({"role": "user", "content": "Hi"},), concepts=((0, "opener", 0, 2),))
    assert overlaps([alone]) == {"opener": {}} and related(overlaps([alone])) == {"opener": frozenset()}


def test_a_pure_latent_stands_out_and_fires_nowhere_else() -> None:
    assert is_pure(_row(0.8, 0.05))
    assert not is_pure(_row(0.79, 0.01)) and not is_pure(_row(0.95, 0.06)) and not is_pure(_row(0.95, None))
