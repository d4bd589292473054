from __future__ import annotations

from collections import Counter
from itertools import islice

from unbraid.practice.corpus import conversations
from unbraid.practice.rehearsal import BOOST, WRONG, Rehearsal, kind_of

DRAWN = list(islice(conversations("train", seed=4, advice_share=0.3), 4000))
TRUSTED = ("facts", "status trusted")


def _taught(rehearsal: Rehearsal, failing: tuple[str, ...]) -> None:
    """As after many steps in which only one kind was answered wrongly."""
    for start in range(0, len(DRAWN), 50):
        batch = DRAWN[start : start + 50]
        rehearsal.note(batch, [WRONG + 1 if kind_of(c) == failing else 0.3 for c in batch])


def test_all_is_wanted_before_anything_is_known() -> None:
    rehearsal = Rehearsal(0)
    assert all(rehearsal.wanted(c) for c in DRAWN[:100])
    assert rehearsal.hardest() == ""


def test_what_fails_comes_more_often_by_the_boost_and_the_rest_stays_even() -> None:
    rehearsal = Rehearsal(0)
    _taught(rehearsal, TRUSTED)
    assert rehearsal.errors[TRUSTED] == 1 and "status trusted (100% wrong)" in rehearsal.hardest()
    before = Counter(kind_of(c) for c in DRAWN)
    after = Counter(kind_of(c) for c in DRAWN if rehearsal.wanted(c))
    assert after[TRUSTED] == before[TRUSTED]
    others = [kind for kind in before if kind != TRUSTED]
    share = sum(after[k] for k in others) / sum(before[k] for k in others)
    assert abs(share - 1 / (1 + BOOST)) < 0.03


def test_errors_are_forgotten_once_a_kind_is_right() -> None:
    rehearsal = Rehearsal(0)
    _taught(rehearsal, TRUSTED)
    for _ in range(8):
        _taught(rehearsal, ("none",))
    assert rehearsal.errors[TRUSTED] < 0.01
    assert sum(rehearsal.wanted(c) for c in DRAWN) > 0.95 * len(DRAWN)


def test_a_kind_is_what_its_rule_looks_at() -> None:
    kinds = {kind_of(c) for c in DRAWN}
    advice = {k for k in kinds if k[0] == "medical advice"}
    assert len(advice) == 8  # three cues; neither the hidden mode nor the wording
    assert ("refund", "angry True", "delayed True", "high True", "refused True") in kinds and (
        "travel",
    ) in kinds
