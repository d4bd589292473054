"""Splits by hash."""

from __future__ import annotations

import hashlib
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unbraid.stats.splits import split_of

SHARES = {"select": 0.4, "threshold": 0.2, "report": 0.4}


def test_known_texts_keep_their_split_for_ever() -> None:
    # Written down so that a change of the rule is noticed: documents would leak between splits.
    # The texts' points are .791, .243, .885 and .889; report lies up to .4, select up to .8, threshold above.
    found = [split_of(text, SHARES) for text in ("a", "b", "Once upon a time", "")]
    assert found == ["select", "report", "threshold", "threshold"]


@settings(deadline=None, max_examples=60)
@given(st.text())
def test_the_order_of_the_shares_and_empty_splits_change_nothing(text: str) -> None:
    split = split_of(text, SHARES)
    assert split_of(text, dict(reversed(SHARES.items()))) == split
    assert split_of(text, {**SHARES, "aaa": 0.0, "zzz": 0.0}) == split


@settings(deadline=None, max_examples=60)
@given(st.text())
def test_the_hash_decides(text: str) -> None:
    upper_half = hashlib.sha256(text.encode()).digest()[0] >= 128
    assert split_of(text, {"a": 0.5, "b": 0.5}) == ("b" if upper_half else "a")


def test_shares_are_kept() -> None:
    counts = Counter(split_of(f"document {i}", SHARES) for i in range(5000))
    assert {name: counts[name] / 5000 for name in SHARES} == pytest.approx(SHARES, abs=0.03)


@pytest.mark.parametrize("shares", [{}, {"a": 0.5}, {"a": 1.5, "b": -0.5}])
def test_shares_that_are_none_are_refused(shares: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        split_of("x", shares)
