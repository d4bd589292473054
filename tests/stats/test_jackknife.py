"""AUROC and correlation by document, against plain computations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm, pearsonr, rankdata
from scipy.stats import t as student

from unbraid.stats.bootstrap import Interval
from unbraid.stats.effects import auroc
from unbraid.stats.jackknife import auroc_by_document, correlation_by_document


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), n=st.integers(3, 12))
def test_a_correlations_interval_is_the_jackknifes_about_fishers_z(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    documents = np.concatenate([np.arange(n), rng.integers(0, n, 40)])
    x = rng.normal(size=len(documents)) * 7 + 100
    y = x + rng.normal(size=len(documents)) * 5
    found = correlation_by_document(x, y, documents.tolist())
    z = np.arctanh(pearsonr(x, y).statistic)
    apart = [np.arctanh(pearsonr(x[documents != d], y[documents != d]).statistic) for d in range(n)]
    half = student.ppf(0.975, n - 1) * np.sqrt((n - 1) / n * np.square(np.array(apart) - z).sum())
    assert found is not None and found.n == n
    assert (found.value, found.low, found.high) == pytest.approx(np.tanh([z, z - half, z + half]))


def test_copies_of_a_document_s_values_make_no_interval_narrower() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=30)
    y = x + rng.normal(size=30)
    one = correlation_by_document(x, y, list(range(30)))
    many = correlation_by_document(np.repeat(x, 5), np.repeat(y, 5), np.repeat(np.arange(30), 5).tolist())
    assert one is not None and many is not None
    assert (one.low, one.high) == pytest.approx((many.low, many.high))


def test_correlations_without_a_spread() -> None:
    assert correlation_by_document([1, 1, 1], [1, 2, 3], [0, 1, 2]) is None
    assert correlation_by_document([1.0], [2.0], [0]) is None
    perfect = correlation_by_document([1, 2, 3, 5], [2, 4, 6, 10], [0, 1, 2, 3])
    assert perfect is not None and perfect.low == pytest.approx(1) == perfect.high
    # One document alone varies: without it nothing is known.
    alone = correlation_by_document([0, 0, 0, 3, 4], [0, 0, 0, 1, 2], [0, 1, 2, 3, 3])
    assert alone is not None and (alone.low, alone.high) == (-1, 1)
    single = correlation_by_document([1, 2, 3], [1, 3, 2], ["d"] * 3)
    assert single == Interval(pytest.approx(0.5), pytest.approx(0.5), pytest.approx(0.5), 1)


def ends(trials: float, value: float, level: float) -> np.ndarray:
    """Wilson's, as roots of (value − truth)² = z² truth (1 − truth) / trials."""
    z2 = norm.ppf((1 + level) / 2) ** 2 / trials
    return np.sort(np.roots([1 + z2, -2 * value - z2, value**2]).real)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 9), shift=st.sampled_from([0, 2, 5]))
def test_an_aurocs_interval_is_wilsons_by_the_jackknife(seed: int, n: int, shift: int) -> None:
    rng = np.random.default_rng(seed)
    documents = np.concatenate([np.arange(n), rng.integers(0, n, 20)])
    labels = rng.random(len(documents)) < 0.5
    labels[:2] = True, False
    scores = rng.integers(0, 6, len(documents)) + shift * labels.astype(float)
    found = auroc_by_document(scores, labels, documents.tolist())
    value = float(auroc(scores, labels))
    of = documents[:, None] == np.arange(n)
    held = of.mean(axis=0)
    without = np.array(
        [float(auroc(scores[~d], labels[~d])) if 0 < labels[~d].sum() < (~d).sum() else value for d in of.T]
    )
    # Satterthwaite's degrees of freedom, from the covariance of the documents' deviations.
    spread = np.diag(held) - np.outer(held, held)
    spread /= np.sqrt(np.outer(1 - held, 1 - held))
    freedom = np.trace(spread) ** 2 / np.square(spread).sum()
    ranks = np.zeros((2, len(scores)))
    for row, kind in zip(ranks, (labels, ~labels), strict=True):
        row[kind] = (rankdata(scores[kind]) - (kind.sum() + 1) / 2) / kind.sum() ** 2
    independent = max(np.square(ranks).sum(), 1e-12)

    def at_most(share: float) -> float:
        vary = np.square(ranks @ of).sum() - 8 * share * (1 - share) * np.prod(ranks @ of, axis=0).sum()
        return 4 * labels.sum() * (~labels).sum() / len(scores) / max(1, vary / independent)

    most = at_most(value)
    tied = np.mean(scores[labels][:, None] == scores[~labels])
    variance = float(((1 - held) * np.square(without - value)).sum())
    limits = []
    for level in (0.95, 0.9):
        t = student.ppf((1 + level) / 2, freedom) / norm.ppf((1 + level) / 2)
        trials = (
            min(value * (1 - value) / variance / t**2, most * (1 + tied))
            if variance > 1e-20
            else min(n, most)
        )
        limits.append(ends(trials, value, level))
    (low, high), (lower, upper) = limits
    least = max(0.5, ends(at_most(1), 1, 0.95)[0])
    high = high if high <= least else max(least, upper)
    low = low if low >= 1 - least else min(1 - least, lower)
    assert found.value == pytest.approx(value) and found.n == n
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-6)


def test_an_auroc_of_copies_is_of_no_more_documents_and_one_of_1_has_an_interval() -> None:
    rng = np.random.default_rng(1)
    labels = np.arange(120) % 2 == 0
    scores = rng.normal(size=120) + labels
    few = auroc_by_document(scores[:20], labels[:20], list(range(20)))
    copied = auroc_by_document(np.tile(scores[:20], 6), np.tile(labels[:20], 6), [i % 20 for i in range(120)])
    assert (copied.low, copied.high, copied.n) == (pytest.approx(few.low), pytest.approx(few.high), 20)
    many = auroc_by_document(scores, labels, list(range(120)))
    assert many.high - many.low < 0.6 * (few.high - few.low)
    scores = np.r_[np.arange(30), 13.5]
    nearly = auroc_by_document(scores, np.arange(31) >= 15, list(range(31)))
    assert 0.99 < nearly.value < 1 and nearly.low < 0.9
    apart = auroc_by_document([3.0, 4.0, 1.0, 2.0], [True, True, False, False], [0, 1, 2, 3])
    assert apart.value == apart.high == 1 and 0 < apart.low < 0.6
    alone = auroc_by_document([3.0, 1.0], [True, False], [0, 0])
    assert alone.n == 1 and alone.low < 0.5
    nothing = auroc_by_document([0.0] * 8, [True, False] * 4, list(range(8)))
    assert nothing.low < 0.3 and nothing.value == 0.5 and nothing.high > 0.7


def test_an_auroc_of_documents_of_one_kind_rests_on_documents_even_where_all_are_apart() -> None:
    scores = np.repeat([1.0, 3.0, 2.0, 4.0, 11.0, 14.0, 13.0, 12.0], 5) + np.tile(np.linspace(0, 0.1, 5), 8)
    labels = np.arange(40) >= 20
    together = auroc_by_document(scores, labels, np.repeat(np.arange(8), 5).tolist())
    spread = auroc_by_document(scores, labels, np.tile(np.arange(8), 5).tolist())
    assert together.value == spread.value == together.high == spread.high == 1
    nearly = scores.copy()
    nearly[19] = 20  # One window of one document.
    low = [
        auroc_by_document(nearly, labels, d.tolist()).low for d in (np.repeat(np.arange(8), 5), np.arange(40))
    ]
    assert together.low < 0.7 and low[0] < low[1]
