"""Scorers against judges whose every answer is known."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest

from unbraid.features.labels.embedding import embedding
from unbraid.features.labels.judges import Answer, LexicalJudge, Shown, Values
from unbraid.features.labels.scorers import detection, drawn, fuzzing, intruder, mean_active, simulation
from unbraid.features.labels.scores import classified

from .made import evidence, window

YES = [
    window(f"we want a refund number {i} now please", {"refund": 1.0 + i, "now": 0.1}, i) for i in range(11)
]
NO = [window(f"the storm number {i} came over red hills", {}, 100 + i, hard=i % 2 == 0) for i in range(9)]
EVIDENCE = evidence(YES, NO)
JUDGE = LexicalJudge()


class Fixed:
    """Gives the same answers whatever it is asked."""

    name = "fixed"

    def __init__(self, answers: list[Answer]) -> None:
        self.answers = answers
        self.seen: list[Shown] = []

    def holds(self, jobs: Sequence[tuple[str, Sequence[Shown]]]) -> list[list[Answer]]:
        self.seen = [shown for _, texts in jobs for shown in texts]
        return [self.answers[: len(texts)] for _, texts in jobs]

    def simulate(self, jobs: Sequence[tuple[str, Sequence[Shown]]]) -> list[list[Values | None]]:
        return [[None for _ in texts] for _, texts in jobs]

    def odd(self, jobs: Sequence[Sequence[Shown]]) -> list[int | None]:
        return [None for _ in jobs]


def test_a_true_label_scores_high_and_a_wrong_one_does_not() -> None:
    labelled = [('word "refund"', EVIDENCE), ('word "storm"', EVIDENCE), ('word "absent"', EVIDENCE)]
    for scorer, chance in ((detection, 0.5), (fuzzing, 0.5), (simulation, 0.0)):
        right, wrong, absent = scorer(JUDGE, labelled)
        assert right.value is not None and right.value.value > 0.85
        assert right.value.low < 1 and right.base_rate == 11 / 20 and right.hard == 5
        assert wrong.value is None or wrong.value.value <= chance
        assert absent.value is None or absent.value.value == chance
        json.dumps(right.as_dict(), allow_nan=False)


def test_predicting_nothing_is_worth_nothing() -> None:
    # With few positives accuracy would be high for saying no everywhere; balanced accuracy is one half.
    few = evidence(YES[:2], NO)
    score = classified("detection", "fixed", few, [False] * 11, 0)
    assert score.value is not None and score.value.value == 0.5 == score.chance
    assert score.base_rate == pytest.approx(2 / 11) and score.details["precision"] is None


def test_rates_and_f1_are_what_one_counts_by_hand() -> None:
    answers: list[Answer] = [*[True] * 8, *[False] * 3, *[True] * 2, *[False] * 7]
    score = classified("detection", "fixed", EVIDENCE, answers, 0)
    d = score.details
    assert d["tpr"]["value"] == pytest.approx(8 / 11) and d["tnr"]["value"] == pytest.approx(7 / 9)
    assert score.value is not None and score.value.value == pytest.approx((8 / 11 + 7 / 9) / 2)
    assert d["precision"] == pytest.approx(0.8) and d["recall"] == pytest.approx(8 / 11)
    assert d["f1"]["value"] == pytest.approx(2 * 8 / (11 + 10))
    # The three that were missed fire the strongest, so the weighted F1 is below the plain one.
    weights = np.array([w.max for w in YES]) / np.mean([w.max for w in YES])
    by_hand = 2 * weights[:8].sum() / (weights.sum() + weights[:8].sum() + 2)
    assert d["f1_weighted"]["value"] == pytest.approx(by_hand) and by_hand < d["f1"]["value"]
    assert d["tnr_hard"]["value"] == pytest.approx(4 / 5)


def test_answers_that_could_not_be_read_stay_in_the_count() -> None:
    answers: list[Answer] = [*[True] * 11, *[False] * 9]
    answers[0] = answers[11] = None
    score = classified("detection", "fixed", EVIDENCE, answers, 0)
    assert score.unparsed == 2 and (score.positives, score.negatives) == (11, 9)
    assert score.value is not None and score.value.value == pytest.approx((10 / 11 + 8 / 9) / 2)
    silent = classified("detection", "fixed", EVIDENCE, [None] * 20, 0)
    assert silent.unparsed == 20 and silent.value is not None and silent.value.value == 0
    (nothing,) = simulation(Fixed([]), [("x", EVIDENCE)])
    assert nothing.value is None and nothing.unparsed == 20 and "same at every token" in nothing.why_not
    (none,) = intruder(Fixed([]), [("x", EVIDENCE)])
    assert none.value is not None and none.value.value == 0 and none.unparsed == 9


def test_fuzzing_marks_strong_tokens_and_draws_each_negatives_own() -> None:
    judge = Fixed([True] * 20)
    fuzzing(judge, [("x", EVIDENCE)])
    for shown in judge.seen[:11]:
        assert shown.marks is not None and shown.marks[3]  # refund; "now" is weaker than 0.3 of it, or not
        assert not shown.marks[6] and sum(shown.marks) == 1
    count = mean_active(YES)
    assert count == 2
    patterns = [shown.marks for shown in judge.seen[11:]]
    assert all(marks is not None and sum(marks) == count for marks in patterns)
    assert len(set(patterns)) > 1  # one pattern shared by all negatives would give them away
    assert drawn(NO[0], 99, 0) == (True,) * 8


def test_simulation_is_the_correlation_over_all_tokens() -> None:
    (score,) = simulation(JUDGE, [('word "refund"', EVIDENCE)])
    true = np.concatenate([w.activations for w in (*YES, *NO)])
    said = np.concatenate([[10.0 * (p.strip() == "refund") for p in w.pieces] for w in (*YES, *NO)])
    assert score.value is not None
    assert score.value.value == pytest.approx(np.corrcoef(true, said)[0, 1], abs=1e-6)
    assert score.value.low < score.value.value < score.value.high


def test_the_intruder_is_found_by_what_the_others_share() -> None:
    (score,) = intruder(JUDGE, [("unused", EVIDENCE)])
    assert score.value is not None and score.value.value == 1 and score.chance == 0.2
    assert score.details["sets"] == 9
    (few,) = intruder(JUDGE, [("unused", evidence(YES[:3], NO))])
    assert few.value is None and "needs 4 test windows" in few.why_not


def test_embeddings_are_ranked_by_their_cosine() -> None:
    def embed(texts: Sequence[str]) -> np.ndarray:
        return np.array([[float("refund" in t), 0.5] for t in texts], dtype=np.float32)

    right, wrong = embedding(embed, "toy", [("refund", EVIDENCE), ("storm", EVIDENCE)])
    assert right.value is not None and right.value.value == 1 and right.value.low < 1
    assert wrong.value is not None and wrong.value.value == 0
    (nothing,) = embedding(embed, "toy", [("refund", evidence(YES, []))])
    assert nothing.value is None and "both kinds" in nothing.why_not


def test_many_labels_are_scored_in_one_call_to_the_judge() -> None:
    judge = Fixed([True] * 20)
    scores = detection(judge, [("a", EVIDENCE), ("b", evidence(YES[:3], NO[:2]))])
    assert len(judge.seen) == 25 and [s.positives for s in scores] == [11, 3]
