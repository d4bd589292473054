"""Intervals against SciPy's, against known distributions, and against their own promises."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, ttest_1samp
from scipy.stats import t as student

from unbraid.stats import bootstrap
from unbraid.stats.bootstrap import (
    Interval,
    as_equal,
    bootstrap_mean,
    bootstrap_ratio,
    bootstrap_unexplained,
    mean_of_runs,
    paired_difference,
    rate,
    rate_by_document,
    share_interval,
    wilson,
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


@pytest.mark.parametrize("n", [30, 60, 100])
def test_wilsons_coverage_is_what_the_docs_say(n: int) -> None:
    """Exactly, by the binomial distribution: counts are whole, so coverage jumps about its 95 % with p."""
    ends = np.array([bootstrap.wilson(k, n) for k in range(n + 1)])
    shares = np.linspace(0.02, 0.98, 97)
    held = (ends[:, :1] <= shares) & (shares <= ends[:, 1:])
    coverage = (binom.pmf(np.arange(n + 1)[:, None], n, shares) * held).sum(axis=0)
    assert 0.945 < coverage.mean() < 0.955
    assert coverage.min() > 0.9297 and coverage.max() < 0.982
    if n == 30:
        assert coverage[28] == pytest.approx(0.9298, abs=1e-4) == coverage.min()  # a share of .3


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
@given(st.integers(1, 40), st.integers(0, 10_000))
def test_the_same_seed_gives_the_same_interval_however_memory_is_cut(n: int, seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=n)
    whole = bootstrap_mean(values, [f"d{i % 15}" for i in range(n)], seed, resamples=100)
    before = bootstrap.DRAWN_AT_ONCE
    try:
        bootstrap.DRAWN_AT_ONCE = 20
        pieces = bootstrap_mean(values, [f"d{i % 15}" for i in range(n)], seed, resamples=100)
    finally:
        bootstrap.DRAWN_AT_ONCE = before
    assert whole == pieces
    assert whole.n == min(n, 15)
    assert whole.low <= whole.value <= whole.high


def test_the_interval_is_the_studentised_one_by_brute_force() -> None:
    """Written out with loops: leave-one-out for the estimate's error, resamples in their own."""
    rng = np.random.default_rng(5)
    a, b, n, resamples = rng.gamma(2, 1, 25), rng.gamma(3, 1, 25), 25, 300
    ratio = a.sum() / b.sum()
    without = np.array([np.delete(a, i).sum() / np.delete(b, i).sum() for i in range(n)])
    # The jackknife about the estimate itself.
    error = np.sqrt((n - 1) / n * ((without - ratio) ** 2).sum())
    drawn = np.random.default_rng(9).integers(0, n, size=(resamples, n))
    t = []
    for rows in drawn:
        again = a[rows].sum() / b[rows].sum()
        spread = np.sqrt(n / (n - 1) * ((a[rows] - again * b[rows]) ** 2).sum()) / b[rows].sum()
        t.append((again - ratio) / spread)
    low, high = np.quantile(t, [0.025, 0.975], method="inverted_cdf")
    found = bootstrap_ratio(a, b, np.arange(n), seed=9, resamples=resamples)
    assert (found.value, found.low, found.high) == pytest.approx(
        (ratio, ratio - high * error, ratio - low * error)
    )


def test_few_documents_get_students_interval() -> None:
    values = np.random.default_rng(0).gamma(2, 1, 8)
    theirs = ttest_1samp(values, 0.0).confidence_interval(0.95)
    ours = bootstrap_mean(values, np.arange(8), seed=0)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))


def test_one_odd_document_among_equal_ones_gets_students_interval() -> None:
    """Where it is not drawn there is no spread to measure its absence by."""
    values = np.append(np.ones(30), 4.0)
    theirs = ttest_1samp(values, 0.0).confidence_interval(0.95)
    ours = bootstrap_mean(values, np.arange(31), seed=0)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-1, 3)), min_size=1, max_size=25), st.integers(0, 99))
def test_no_ratio_is_without_finite_ends_around_it(pairs: list[tuple[float, float]], seed: int) -> None:
    above, below = (np.array(column) for column in zip(*pairs, strict=True))
    if abs(below.sum()) < 1e-3:
        return
    found = bootstrap_ratio(above, below, np.arange(len(above)), seed, resamples=60)
    assert np.isfinite([found.low, found.value, found.high]).all()
    assert found.low <= found.value <= found.high


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_the_size_of_the_numbers_does_not_matter(scale: float) -> None:
    a, b = np.random.default_rng(0).gamma(2, 1, (2, 20))
    found, plain = (bootstrap_ratio(a * s, b, np.arange(20), seed=0) for s in (scale, 1.0))
    assert (found.low / scale, found.high / scale) == pytest.approx((plain.low, plain.high), rel=1e-6)


def test_a_rate_by_document_counts_copies_once() -> None:
    rng = np.random.default_rng(1)
    hits = rng.random(40) < 0.2
    once, copied = (rate_by_document(np.repeat(hits, k), np.repeat(np.arange(40), k)) for k in (1, 5))
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high)) and copied.n == 40
    # Of single trials it is Wilson's interval with a little more room, since the deviation is measured too.
    plain = rate(hits)
    assert once.low < plain.low and once.high > plain.high
    assert once.high - once.low < 1.1 * (plain.high - plain.low)


def test_a_rate_by_document_of_independent_replies_uses_them_all() -> None:
    hits = np.random.default_rng(2).random(400) < 0.3
    many = rate_by_document(hits, np.repeat(np.arange(100), 4))
    assert many.high - many.low == pytest.approx(rate(hits).high - rate(hits).low, rel=0.2)


@pytest.mark.parametrize("outcome", [False, True])
def test_the_same_outcome_everywhere_is_as_many_trials_as_documents(outcome: bool) -> None:
    found = rate_by_document(np.full(60, outcome), np.repeat(np.arange(20), 3))
    assert (found.low, found.high) == pytest.approx((rate([outcome] * 20).low, rate([outcome] * 20).high))


def test_a_paired_difference_of_rates_has_bonett_and_prices_interval() -> None:
    a = np.array([1] * 9 + [0] * 2 + [1] * 10 + [0] * 19)
    b = np.array([0] * 9 + [1] * 2 + [1] * 10 + [0] * 19)
    found = paired_difference(a, b, np.arange(40), seed=0)
    gained, lost = 10 / 42, 3 / 42
    half = student.ppf(0.975, 41) * np.sqrt((gained + lost - (gained - lost) ** 2) / 41)
    assert found.value == pytest.approx(7 / 40)
    assert (found.low, found.high) == pytest.approx((gained - lost - half, gained - lost + half), abs=1e-9)
    # Nothing changed in 40 prompts: that does not prove that nothing ever will.
    same = paired_difference(a, a, np.arange(40), seed=0)
    assert same.value == 0 and -0.15 < same.low < 0 < same.high < 0.15
    every = paired_difference(np.ones(40), np.zeros(40), np.arange(40), seed=0)
    assert every.high == 1 and 0.8 < every.low < 1


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 999), st.floats(-50, 50))
def test_what_is_unexplained_is_about_the_mean(seed: int, shift: float) -> None:
    rng = np.random.default_rng(seed)
    documents = [rng.normal(rng.normal(size=5), 1, (size, 5)) + shift for size in rng.integers(1, 9, 15)]
    wrong = [x + rng.normal(0, 0.3, x.shape) for x in documents]
    sums = (
        [np.square(x - w).sum() for x, w in zip(documents, wrong, strict=True)],
        [np.square(x).sum() for x in documents],
        [x.sum(axis=0) for x in documents],
        [len(x) for x in documents],
    )
    found = bootstrap_unexplained(*sums, seed=0, resamples=50)
    x, w = np.concatenate(documents), np.concatenate(wrong)
    assert found.value == pytest.approx(
        np.square(x - w).sum() / np.square(x - x.mean(axis=0)).sum(), rel=1e-6
    )


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
        lambda: rate_by_document([], []),
        lambda: rate_by_document([True], [0, 1]),
        lambda: bootstrap_unexplained([1.0], [4.0], [[2.0]], [1], seed=0),
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


def test_a_quantity_that_is_bounded_has_an_interval_within() -> None:
    assert Interval(0.9, 0.7, 1.2, 5).within(0, 1) == Interval(0.9, 0.7, 1.0, 5)
    assert Interval(0.1, -0.2, 0.3, 5).within(0) == Interval(0.1, 0.0, 0.3, 5)


def test_a_share_has_wilsons_interval_for_as_many_trials_as_vary_as_much() -> None:
    p, n = 0.3, 50
    found = share_interval(p, np.sqrt(p * (1 - p) / 200), n)
    trials = 200 * (1.959964 / student.ppf(0.975, n - 1)) ** 2
    assert (found.low, found.high) == pytest.approx(wilson(p * trials, trials))
    assert share_interval(p, 1e-4, n, trials=200).low == pytest.approx(found.low)  # no more than there are
    sure = share_interval(1.0, 0.0, n)
    assert (sure.low, sure.high) == (pytest.approx(wilson(n, n)[0]), 1.0)
    lost = share_interval(1.0, 0.2, n)  # it varies, though no trials of this share would
    assert (lost.low, lost.high) == (0.0, 1.0)


def test_few_documents_with_most_tokens_tell_a_spread_no_better_than_themselves() -> None:
    assert as_equal([3.0] * 7) == pytest.approx(7)
    assert as_equal([1e6] * 4 + [1e-3] * 50) == pytest.approx(4)
    assert as_equal([1.0, 0.0]) == 2.0  # no interval without a degree of freedom
    assert as_equal([1.0, 2.0, 3.0]) == pytest.approx(36 / 14)
    even, uneven = (
        share_interval(0.3, 0.05, 20, equal=equal) for equal in (None, as_equal([1] * 10 + [9] * 5))
    )
    assert uneven.low < even.low < even.high < uneven.high
    hits = [True, False, False, True, False, True, False, True, True, False]
    documents = [0, 0, 0, 0, 1, 1, 2, 2, 3, 3]
    found = rate_by_document(hits, documents)
    rest, sizes = np.array([2, 1, 1, 1]) - 0.5 * np.array([4, 2, 2, 2]), np.array([4, 2, 2, 2])
    error = np.sqrt(3 / 4 * np.square(rest / (1 - sizes / 10)).sum()) / 10
    wanted = share_interval(0.5, float(error), 4, 10, equal=100 / 28)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))
