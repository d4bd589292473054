"""Benjamini–Hochberg against its definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unbraid.stats.multiple import benjamini_hochberg


def _by_definition(p: list[float]) -> list[float]:
    """For each test the smallest n·p_(k)/k over all ranks k at or above its own."""
    n, ordered = len(p), sorted(p)
    return [
        min(1.0, *(n * ordered[k - 1] / k for k in range(1, n + 1) if ordered[k - 1] >= one)) for one in p
    ]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_q_values_follow_the_definition(p: list[float]) -> None:
    assert benjamini_hochberg(p) == pytest.approx(_by_definition(p), abs=1e-12)


def test_nothing_to_correct_and_nonsense() -> None:
    assert benjamini_hochberg([]).size == 0
    for bad in ([0.5, float("nan")], [1.5], [-0.1], [[0.5]]):
        with pytest.raises(ValueError):
            benjamini_hochberg(bad)


def test_the_false_discovery_rate_is_held() -> None:
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(300):
        p = rng.uniform(size=200)
        p[:20] *= 1e-4
        taken = benjamini_hochberg(p) <= 0.1
        shares.append(taken[20:].sum() / max(1, taken.sum()))
    assert 0.06 < np.mean(shares) < 0.12
