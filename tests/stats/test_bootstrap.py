"""Intervals against SciPy's, against known distributions, and against their own promises."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, ttest_1samp

from unbraid.stats import bootstrap
from unbraid.stats.bootstrap import (
    Interval,
    bootstrap_mean,
    bootstrap_ratio,
    mean_of_runs,
    paired_difference,
    rate,
)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.booleans(), min_size=1, max_size=200), st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_equals_scipys(successes: list[bool], level: float) -> None:
    theirs = binomtest(sum(successes), len(successes)).proportion_ci(level, method="wilson")
    ours = rate(successes, level)
    assert ours.value == pytest.approx(np.mean(successes))
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert 0 <= ours.low <= ours.value <= ours.high <= 1
    assert ours.n == len(successes)


def test_the_bootstrap_by_document_covers_where_the_one_by_token_does_not() -> None:
    rng = np.random.default_rng(0)
    documents = np.repeat(np.arange(40), 10)
    by_document = by_token = 0
    runs = 200
    for run in range(runs):
        values = np.repeat(rng.normal(1.0, 1.0, 40), 10) + rng.normal(0, 0.3, 400)  # true mean 1
        interval = bootstrap_mean(values, documents, seed=run, resamples=300)
        by_document += interval.low <= 1 <= interval.high
        naive = bootstrap_mean(values, np.arange(400), seed=run, resamples=100)
        by_token += naive.low <= 1 <= naive.high
    assert 0.90 <= by_document / runs <= 0.985
    assert by_token / runs < 0.6


def test_the_bootstraps_width_is_the_standard_errors() -> None:
    values = np.random.default_rng(1).normal(3, 2, 400)
    interval = bootstrap_mean(values, np.arange(400), seed=0)
    assert interval.value == pytest.approx(values.mean())
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert interval.n == 400


def test_a_ratio_is_drawn_together() -> None:
    rng = np.random.default_rng(2)
    below = rng.uniform(1, 100, 60)
    interval = bootstrap_ratio(below * 0.25, below, np.arange(60), seed=0)
    assert (interval.value, interval.low, interval.high) == pytest.approx((0.25, 0.25, 0.25))


def test_a_ratio_weights_documents_by_their_length() -> None:
    assert bootstrap_ratio([1, 0, 0, 0], [1, 1, 1, 1], ["a", "b", "b", "b"], seed=0).value == 0.25
    assert bootstrap_ratio([1, 5], [0, 2], ["a", "b"], seed=0).value == 3


def test_pairing_cancels_what_both_share() -> None:
    rng = np.random.default_rng(3)
    shared = rng.normal(0, 10, 50)
    a, b = shared + rng.normal(0.5, 0.1, 50), shared
    paired = paired_difference(a, b, np.arange(50), seed=0)
    assert 0.4 < paired.low < paired.value < paired.high < 0.6
    assert paired.value == pytest.approx(a.mean() - b.mean())


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 30), st.integers(0, 10_000))
def test_the_same_seed_gives_the_same_interval_however_memory_is_cut(n: int, seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=n)
    whole = bootstrap_mean(values, [f"d{i % 7}" for i in range(n)], seed, resamples=100)
    before = bootstrap.DRAWN_AT_ONCE
    try:
        bootstrap.DRAWN_AT_ONCE = 20
        pieces = bootstrap_mean(values, [f"d{i % 7}" for i in range(n)], seed, resamples=100)
    finally:
        bootstrap.DRAWN_AT_ONCE = before
    assert whole == pieces
    assert whole.n == min(n, 7)
    assert values.min() - 1e-9 <= whole.low <= whole.high <= values.max() + 1e-9


def test_one_document_is_a_point_that_says_so() -> None:
    assert bootstrap_mean([1.0, 3.0], ["d", "d"], seed=0) == Interval(2.0, 2.0, 2.0, 1)


def test_an_interval_is_json() -> None:
    assert json.loads(json.dumps(rate([True, True]).as_dict()))["n"] == 2


@pytest.mark.parametrize(
    "call",
    [
        lambda: rate([]),
        lambda: rate([True], level=1.0),
        lambda: bootstrap_mean([], [], seed=0),
        lambda: bootstrap_mean([1.0, float("nan")], [0, 1], seed=0),
        lambda: bootstrap_mean([1.0, 2.0], [0], seed=0),
        lambda: bootstrap_ratio([1.0], [0.0], [0], seed=0),
        lambda: bootstrap_ratio([1.0, 2.0], [1.0], [0, 1], seed=0),
        lambda: paired_difference([1.0, 2.0], [1.0], [0, 1], seed=0),
    ],
)
def test_what_has_no_interval_is_refused(call) -> None:
    with pytest.raises(ValueError):
        call()


def test_the_mean_of_runs_has_students_interval() -> None:
    values = [0.31, 0.29, 0.36]
    theirs = ttest_1samp(values, 0.0).confidence_interval(0.95)
    ours = mean_of_runs(values)
    assert (ours.value, ours.n) == (pytest.approx(0.32), 3)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))
    assert mean_of_runs([2.0]) == Interval(2.0, 2.0, 2.0, 1)
    with pytest.raises(ValueError, match="at least one run"):
        mean_of_runs([])
    with pytest.raises(ValueError, match="finite"):
        mean_of_runs([1.0, float("nan")])
