"""Effect sizes against scikit-learn, SciPy and brute force."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu
from sklearn.metrics import roc_auc_score

from unbraid.stats.effects import (
    auroc,
    auroc_interval,
    auroc_p_value,
    cohens_d,
    minimum_detectable_difference,
    risk_difference,
)


@st.composite
def scored(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Few distinct scores, so that ties abound; both classes."""
    n = draw(st.integers(3, 30))
    scores = np.array(draw(st.lists(st.integers(-2, 2), min_size=n * 3, max_size=n * 3)), dtype=float)
    labels = np.array([True, False, *draw(st.lists(st.booleans(), min_size=n - 2, max_size=n - 2))])
    return scores.reshape(n, 3), labels


@settings(deadline=None, max_examples=80)
@given(scored())
def test_auroc_equals_scikit_learns_with_ties(data: tuple[np.ndarray, np.ndarray]) -> None:
    scores, labels = data
    theirs = [roc_auc_score(labels, column) for column in scores.T]
    assert auroc(scores, labels) == pytest.approx(theirs, abs=1e-12)
    assert float(auroc(scores[:, 0], labels)) == pytest.approx(theirs[0], abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(scored(), st.sampled_from(["two-sided", "greater", "less"]))
def test_p_values_equal_scipys_with_ties(data: tuple[np.ndarray, np.ndarray], alternative: str) -> None:
    scores, labels = data
    for column, p in zip(scores.T, auroc_p_value(scores, labels, alternative), strict=True):
        if np.ptp(column) == 0:
            assert p == 1
            continue
        args = {"alternative": alternative, "method": "asymptotic", "use_continuity": True}
        assert p == pytest.approx(mannwhitneyu(column[labels], column[~labels], **args).pvalue, abs=1e-10)


@settings(deadline=None, max_examples=60)
@given(scored())
def test_the_ends_of_an_aurocs_interval_are_newcombes_surprises(data: tuple[np.ndarray, np.ndarray]) -> None:
    scores, labels = data[0][:, 0], data[1]
    found = auroc_interval(scores, labels)
    assert found.value == pytest.approx(float(auroc(scores, labels))) and found.n == len(labels)
    assert 0 <= found.low <= found.value <= found.high <= 1 and found.low < found.high
    m, n = labels.sum(), (~labels).sum()
    for end in {found.low, found.high} - {0.0, 1.0}:
        q1, q2 = end / (2 - end), 2 * end**2 / (1 + end)  # Hanley and McNeil (1982)
        # Newcombe's method 5 sets both group sizes of their formula to their mean.
        size = (m + n) / 2
        variance = end * (1 - end) + (size - 1) * (q1 - end**2) + (size - 1) * (q2 - end**2)
        assert abs(found.value - end) == pytest.approx(1.959964 * np.sqrt(variance / (m * n)), rel=1e-4)
    turned = auroc_interval(-scores, labels)
    assert (turned.low, turned.high) == pytest.approx((1 - found.high, 1 - found.low), abs=1e-9)


def test_groups_wholly_apart_have_an_interval_and_no_point() -> None:
    found = auroc_interval(np.arange(40.0), np.arange(40) >= 20)
    assert found.value == found.high == 1 and 0.8 < found.low < 0.95


def test_cohens_d_by_hand() -> None:
    scores = np.array([[1.0, 2.0, 5.0], [3.0, 2.0, 5.0], [0.0, 1.0, 5.0], [2.0, 1.0, 5.0]])
    assert cohens_d(scores, [1, 1, 0, 0]) == pytest.approx([1 / np.sqrt(2), np.inf, 0.0])
    assert cohens_d(scores, [0, 0, 1, 1])[0] == pytest.approx(-1 / np.sqrt(2))


def test_cohens_d_finds_a_known_shift() -> None:
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.normal(0.8, 1, 4000), rng.normal(0, 1, 4000)])
    assert cohens_d(scores, np.arange(8000) < 4000) == pytest.approx(0.8, abs=0.07)


def test_risk_difference_equals_newcombes_example() -> None:
    # Newcombe (1998), table II, row a: 56/70 against 48/80, method 10.
    a, b = np.arange(70) < 56, np.arange(80) < 48
    interval = risk_difference(a, b)
    assert (interval.value, interval.low, interval.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
    assert interval.n == 150
    turned = risk_difference(b, a)
    assert (turned.low, turned.high) == pytest.approx((-interval.high, -interval.low))


def test_the_minimum_detectable_difference_is_detected_as_often_as_promised() -> None:
    n1, n2, base = 200, 150, 0.3
    delta = minimum_detectable_difference(n1, n2, base)
    assert delta is not None
    rng = np.random.default_rng(0)
    p, q = rng.binomial(n1, base, 4000) / n1, rng.binomial(n2, base + delta, 4000) / n2
    pooled = (p * n1 + q * n2) / (n1 + n2)
    z = np.abs(p - q) / np.sqrt(pooled * (1 - pooled) * (1 / n1 + 1 / n2))
    assert (z > 1.959964).mean() == pytest.approx(0.8, abs=0.03)


def test_the_minimum_detectable_difference_shrinks_with_n_and_may_not_exist() -> None:
    few, many = (minimum_detectable_difference(n, n, 0.29) for n in (50, 500))
    assert few is not None and many is not None and 0 < many < few < 0.71
    assert minimum_detectable_difference(2, 2, 0.5) is None
    assert minimum_detectable_difference(60, 60, 0.9) == pytest.approx(
        minimum_detectable_difference(60, 60, 0.1)
    )
    never = minimum_detectable_difference(60, 60, 0.0)
    assert never is not None and never > 0.01


@pytest.mark.parametrize("measure", [auroc, auroc_interval, auroc_p_value, cohens_d])
def test_one_class_nan_and_wrong_shapes_are_refused(measure) -> None:
    for scores, labels in [
        ([1.0, 2.0, 3.0], [1, 1, 1]),
        ([1.0, np.nan, 2.0], [1, 0, 1]),
        ([1.0, 2.0, 3.0], [1, 0]),
        (np.zeros((2, 2, 2)), [1, 0]),
    ]:
        with pytest.raises(ValueError):
            measure(scores, labels)


def test_ranking_many_latents_is_quick() -> None:
    rng = np.random.default_rng(0)
    scores = np.maximum(0, rng.normal(size=(600, 2048)))
    started = time.process_time()
    auroc(scores, np.arange(600) < 300)
    assert time.process_time() - started < 5
