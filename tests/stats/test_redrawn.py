"""AUROC and correlation by document, against plain computations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr
from scipy.stats import t as student

from unbraid.stats.bootstrap import Interval
from unbraid.stats.effects import auroc, auroc_interval
from unbraid.stats.redrawn import auroc_by_document, correlation_by_document


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


def test_the_auroc_of_copied_documents_has_a_wider_interval_than_of_as_many_others() -> None:
    rng = np.random.default_rng(1)
    labels = np.arange(120) % 2 == 0
    scores = rng.normal(size=120) + labels
    found = auroc_by_document(scores, labels, list(range(120)), seed=0, resamples=400)
    whole = auroc_interval(scores, labels)
    assert found.value == pytest.approx(float(auroc(scores, labels))) and found.n == 120
    assert found.low <= whole.low and found.high >= whole.high
    few = auroc_by_document(np.tile(scores[:20], 6), np.tile(labels[:20], 6), [i % 20 for i in range(120)], 0)
    assert few.n == 20 and few.high - few.low > 1.5 * (found.high - found.low)
