"""Agreement between people against published examples, scikit-learn, and chance."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from unbraid.stats.agreement import agreement
from unbraid.stats.bootstrap import wilson


def _two(first: list[str], second: list[str]) -> list[tuple[str, str, str]]:
    return [
        (f"{n:04d}", rater, value)
        for rater, values in (("a", first), ("b", second))
        for n, value in enumerate(values)
    ]


def test_kappa_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    first = rng.choice(["x", "y", "z"], 60)
    second = np.where(rng.random(60) < 0.6, first, rng.choice(["x", "y", "z"], 60))
    found = agreement(_two(first.tolist(), second.tolist()))
    assert found is not None
    kappa = found.cohen["a", "b"]
    assert kappa is not None and kappa.value == pytest.approx(cohen_kappa_score(first, second))
    assert kappa.low < kappa.value < kappa.high
    assert found.percent.value == pytest.approx((first == second).mean()) and found.units == 60


def test_alpha_of_a_published_example() -> None:
    # Krippendorff (2011), "Computing Krippendorff's Alpha-Reliability", example C: nominal, four observers,
    # missing values; alpha = 0.743.
    observers = {
        "A": "1 2 3 3 2 1 4 1 2 . . .",
        "B": "1 2 3 3 2 2 4 1 2 5 . 3",
        "C": ". 3 3 3 2 3 4 2 2 5 1 .",
        "D": "1 2 3 3 2 4 4 1 2 5 1 .",
    }
    judgements = [
        (f"{unit:02d}", who, value)
        for who, row in observers.items()
        for unit, value in enumerate(row.split())
        if value != "."
    ]
    found = agreement(judgements)
    assert found is not None and found.krippendorff is not None
    assert found.krippendorff.value == pytest.approx(0.743, abs=5e-4)
    assert found.units == 11 and found.raters == ("A", "B", "C", "D") and len(found.cohen) == 6


def test_chance_agrees_at_zero_and_one_value_says_nothing() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.choice(["x", "y"], (2, 400), p=[0.9, 0.1])
    found = agreement(_two(first.tolist(), second.tolist()))
    assert found is not None and found.krippendorff is not None
    assert found.percent.value > 0.75 and found.krippendorff.low < 0 < found.krippendorff.high
    same = agreement(_two(["x"] * 5, ["x"] * 5))
    assert same is not None and same.percent.value == 1
    assert same.krippendorff is None and same.cohen == {("a", "b"): None}
    assert agreement([("1", "a", "x"), ("2", "b", "x")]) is None


def test_full_agreement_has_an_interval_with_a_width() -> None:
    values = ["x", "y", "z"] * 5
    found = agreement(_two(values, values))
    assert found is not None and found.krippendorff is not None
    # No disagreement in 15 trials, by Wilson, times what chance does to it: Σ p² = 1/3.
    low = 1 - wilson(0, 15)[1]
    assert (found.percent.value, found.percent.low, found.percent.high) == (1, pytest.approx(low), 1)
    kappa = found.cohen["a", "b"]
    assert kappa is not None and (kappa.low, kappa.high) == (pytest.approx(1 - 1.5 * (1 - low)), 1)
    assert found.krippendorff.low < found.percent.low


def test_of_two_people_the_share_has_wilsons_interval_but_for_students_t() -> None:
    rng = np.random.default_rng(2)
    first = rng.choice(["x", "y"], 40)
    second = np.where(rng.random(40) < 0.8, first, "z")
    found = agreement(_two(first.tolist(), second.tolist()))
    assert found is not None
    wide = 40 * (1.959964 / 2.022691) ** 2  # z and t of 39 degrees of freedom
    wide *= 39 / 40  # the jackknife's variance is that of n − 1
    assert (found.percent.low, found.percent.high) == pytest.approx(wilson(found.percent.value * wide, wide))
