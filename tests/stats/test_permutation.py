"""The null of the best latent."""

from __future__ import annotations

import time

import numpy as np
import pytest

from unbraid.stats import permutation
from unbraid.stats.effects import auroc
from unbraid.stats.permutation import familywise_p_value, max_statistic_null


@pytest.mark.parametrize("statistic", ["auroc", "auroc_two_sided"])
def test_noise_raises_a_false_alarm_one_time_in_twenty(statistic: str) -> None:
    rng = np.random.default_rng(0)
    alarms, runs = 0, 400
    for run in range(runs):
        scores = np.maximum(0, rng.normal(-0.5, 1, (40, 30)))  # sparse, full of ties
        labels = rng.permutation(np.arange(40) < 18)
        found = auroc(scores, labels)
        best = np.maximum(found, 1 - found).max() if statistic == "auroc_two_sided" else found.max()
        null = max_statistic_null(scores, labels, statistic, permutations=99, seed=run)
        alarms += familywise_p_value(best, null) <= 0.05
    assert 0.02 <= alarms / runs <= 0.08  # three standard errors about 5 %


def test_a_planted_latent_stands_out_and_the_rest_do_not() -> None:
    rng = np.random.default_rng(1)
    labels = np.arange(120) < 60
    scores = rng.normal(size=(120, 500))
    scores[:, 77] += 1.5 * labels
    p = familywise_p_value(
        auroc(scores, labels), max_statistic_null(scores, labels, permutations=199, seed=0)
    )
    assert p[77] == pytest.approx(1 / 200)
    assert (np.delete(p, 77) > 0.05).all()


def test_two_sided_finds_a_latent_that_goes_down() -> None:
    rng = np.random.default_rng(2)
    labels = np.arange(100) < 50
    scores = rng.normal(size=(100, 50))
    scores[:, 3] -= 2 * labels
    one, two = (max_statistic_null(scores, labels, s, seed=0) for s in ("auroc", "auroc_two_sided"))
    found = auroc(scores, labels)
    assert familywise_p_value(found[3], one) > 0.5
    assert familywise_p_value(1 - found[3], two) < 0.05


def test_the_null_equals_a_loop_over_permutations_and_does_not_depend_on_memory(monkeypatch) -> None:
    rng = np.random.default_rng(3)
    scores, labels = rng.normal(size=(30, 8)).round(1), np.arange(30) < 11
    whole = max_statistic_null(scores, labels, "mean_difference", permutations=50, seed=4)
    assert whole == pytest.approx(
        max_statistic_null(scores, labels, "mean_difference", permutations=50, seed=4)
    )
    ranks = max_statistic_null(scores, labels, "auroc", permutations=50, seed=4)
    again = np.random.default_rng(4)
    for means, best in zip(whole, ranks, strict=True):
        shuffled = again.permuted(labels[None], axis=1)[0]
        assert means == pytest.approx((scores[shuffled].mean(0) - scores[~shuffled].mean(0)).max())
        assert best == pytest.approx(auroc(scores, shuffled).max())
    monkeypatch.setattr(permutation, "HELD_AT_ONCE", 24)
    assert max_statistic_null(scores, labels, "auroc", permutations=50, seed=4) == pytest.approx(ranks)


def test_p_values_count_the_labels_as_they_are() -> None:
    null = np.array([0.5, 0.6, 0.7, 0.8])
    assert familywise_p_value([0.4, 0.7, 0.9], null) == pytest.approx([1.0, 0.6, 0.2])


def test_two_hundred_permutations_of_two_thousand_latents_are_quick() -> None:
    rng = np.random.default_rng(0)
    started = time.process_time()
    max_statistic_null(rng.normal(size=(600, 2048)), np.arange(600) < 300, permutations=200, seed=0)
    assert time.process_time() - started < 10
