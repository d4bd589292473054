"""AUROC and correlation by document, against plain computations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr
from scipy.stats import t as student

from unbraid.stats.bootstrap import Interval, as_equal, share_interval
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


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 9))
def test_an_aurocs_interval_is_that_of_the_jackknifes_error(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    documents = np.concatenate([np.arange(n), rng.integers(0, n, 20)])
    scores, labels = rng.integers(0, 6, len(documents)).astype(float), rng.random(len(documents)) < 0.5
    labels[:2] = True, False
    found = auroc_by_document(scores, labels, documents.tolist())
    value = float(auroc(scores, labels))
    without = [
        float(auroc(scores[left], labels[left])) if 0 < labels[left].sum() < left.sum() else value
        for left in (documents != d for d in range(n))
    ]
    error = np.sqrt((n - 1) / n * np.square(np.array(without) - np.mean(without)).sum())
    wanted = share_interval(value, float(error), n, len(scores), equal=as_equal(np.bincount(documents)))
    assert found == Interval(*(pytest.approx(number) for number in (value, wanted.low, wanted.high)), n)


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
