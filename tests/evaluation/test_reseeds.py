"""Runs on the same documents, against the variance that they have over documents."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student

from unbraid.evaluation.reseeds import Judged, combined, over_seeds, values_of
from unbraid.stats.bootstrap import mean_of_runs


def test_a_mean_of_documents_and_what_each_pulls() -> None:
    found = Judged.mean_of(np.array([1.0, 0.0, 0.0, 1.0]), np.array([5, 2, 0, 3]), 6)
    assert found.value == 0.5
    np.testing.assert_allclose(found.pull, [-0.125, 0, -0.125, 0.125, 0, 0.125])


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), many=st.integers(1, 5))
def test_sums_are_those_of_numbers_and_of_pulls(seed: int, many: int) -> None:
    rng = np.random.default_rng(seed)
    values, rows, weights = rng.normal(size=(many, 4)), rng.permutation(9)[:4], rng.normal(size=many)
    some = [Judged.mean_of(v, rows, 9) for v in values]
    for found, by in ((combined(some), np.full(many, 1 / many)), (combined(some, list(weights)), weights)):
        wanted = Judged.mean_of(by @ values, rows, 9)
        assert found.value == pytest.approx(wanted.value)
        np.testing.assert_allclose(found.pull, wanted.pull, atol=1e-12)
    assert values_of({"row": {"metric": some}}) == {"row": {"metric": [one.value for one in some]}}


def test_runs_that_share_no_document_have_students_interval_and_one_run_is_a_point() -> None:
    rng = np.random.default_rng(0)
    runs = [Judged.mean_of(rng.normal(size=10), np.arange(10 * i, 10 * i + 10), 50) for i in range(5)]
    ours, plain = over_seeds(runs), mean_of_runs([run.value for run in runs])
    assert (ours.value, ours.low, ours.high, ours.n) == pytest.approx((plain.value, plain.low, plain.high, 5))
    assert over_seeds(runs[:1]).low == over_seeds(runs[:1]).high == runs[0].value
    same = over_seeds([Judged(0.25, np.zeros(3))] * 4)
    assert (same.low, same.high) == (0.25, 0.25)


def test_runs_on_the_same_documents_vary_as_the_documents_do() -> None:
    values = np.random.default_rng(1).normal(size=40)
    found = over_seeds([Judged.mean_of(values, np.arange(40), 40)] * 5)  # no seed makes any difference
    assert found.high - found.value == pytest.approx(1.959964 * values.std() / 40**0.5)


def test_shared_documents_widen_the_interval_by_their_covariance() -> None:
    rng = np.random.default_rng(2)
    values = rng.normal(size=60)
    runs = [Judged.mean_of(values[rows], rows, 60) for rows in (rng.permutation(60)[:21] for _ in range(4))]
    each = np.array([run.value for run in runs])
    pairs = [float(runs[i].pull @ runs[j].pull) for i in range(4) for j in range(4) if i != j]
    own, shared = each.var(ddof=1) / 4, max(float(np.mean(pairs)), 0.0)
    assert shared > 0
    half = student.ppf(0.975, 3 * ((own + shared) / own) ** 2) * np.sqrt(own + shared)
    found = over_seeds(runs)
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half))
