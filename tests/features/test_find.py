"""The search reports planted latents, with held-out numbers, and nothing when labels mean nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csc_array
from scipy.stats import binom

from unbraid.features.find import FindConfig, find
from unbraid.features.separation import best_threshold, linear_readout
from unbraid.manifest.errors import UserError
from unbraid.stats.effects import auroc, auroc_p_value
from unbraid.stats.permutation import max_statistic_null
from unbraid.stats.splits import split_of

N, F = 120, 60


def _scores(seed: int, documents: int = 2 * N) -> np.ndarray:
    """Sparse, skewed, correlated columns, some of them dead: what mean activations look like."""
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal((documents, 5)) @ rng.standard_normal((5, F))
    scores = np.maximum(shared + rng.standard_normal((documents, F)) - 1.0, 0.0)
    scores[:, -5:] = 0.0
    return scores.astype(np.float32)


def _ids(count: int) -> list[str]:
    return [f"document {i}" for i in range(count)]


def test_both_planted_poles_are_found_with_their_sign() -> None:
    scores = _scores(0)
    scores[:N, 7] += 3.0
    scores[N:, 11] += 3.0
    result = find(scores[:N], scores[N:], _ids(2 * N), raw=(scores[:N], scores[N:]))
    found = {latent.latent: latent for latent in result.latents}
    assert {7, 11} <= found.keys()
    assert found[7].pole == 1 and found[7].auroc.low > 0.5 and found[7].cohens_d > 1
    assert found[11].pole == -1 and found[11].auroc.high < 0.5 and found[11].cohens_d < -1
    for latent in (found[7], found[11]):
        assert latent.holds and latent.hit_rate > 0.9 and latent.false_alarm_rate < 0.2
        assert latent.risk_difference.value == pytest.approx(latent.hit_rate - latent.false_alarm_rate)
        assert latent.auroc.n == sum(result.counts["report"])
    assert [readout.auroc.value > 0.9 for readout in result.baselines] == [True, True]
    assert sum(sum(pair) for pair in result.counts.values()) == 2 * N
    json.dumps(result.as_dict(), allow_nan=False)


def test_shuffled_labels_report_nothing_at_the_stated_rate() -> None:
    scores, rng = _scores(1), np.random.default_rng(2)
    alarms = 0
    for shuffle in range(100):
        order = rng.permutation(2 * N)
        result = find(
            scores[order[:N]],
            scores[order[N:]],
            [f"document {i}" for i in order],
            FindConfig(seed=shuffle),
        )
        alarms += bool(result.latents)
    # If the rate is 5 %, more alarms than this come up once in a thousand such tests.
    assert alarms <= binom.ppf(0.999, 100, 0.05)


def test_reported_numbers_ignore_the_splits_that_chose() -> None:
    scores = _scores(3)
    scores[:N, 7] += 3.0
    config = FindConfig()
    ids = _ids(2 * N)
    report = np.array([split_of(name, config.shares) == "report" for name in ids])
    labels = np.arange(2 * N) < N
    result = find(scores[:N], scores[N:], ids, config)
    first = next(latent for latent in result.latents if latent.latent == 7)
    assert first.auroc.value == pytest.approx(float(auroc(scores[report, 7], labels[report])))


def test_the_same_search_gives_the_same_result() -> None:
    scores = _scores(4)
    scores[:N, 3] += 1.0
    once, again = (find(scores[:N], scores[N:], _ids(2 * N)).as_dict() for _ in range(2))
    assert once == again


def test_too_few_documents_are_refused() -> None:
    scores = _scores(5, documents=8)
    with pytest.raises(UserError, match="documents fall into the"):
        find(scores[:4], scores[4:], _ids(8))
    with pytest.raises(UserError, match="permutations can never show"):
        FindConfig(permutations=10)
    with pytest.raises(UserError, match="top is -2; it must be at least 1"):
        FindConfig(top=-2)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30))
def test_no_threshold_beats_the_best_one(pairs: list[tuple[int, bool]]) -> None:
    scores = np.array([value for value, _ in pairs], dtype=float)
    labels = np.array([label for _, label in pairs])
    if labels.all() or not labels.any():
        return

    def gain(bar: float) -> float:
        return float((scores[labels] > bar).mean() - (scores[~labels] > bar).mean())

    best = gain(best_threshold(scores, labels))
    everything_passes = 0.0
    assert best >= max([everything_passes, *(gain(value) for value in scores)]) - 1e-12


def test_the_linear_readout_sees_what_no_single_dimension_shows() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 4)).astype(np.float32)
    labels = x[:, 0] - x[:, 1] > 0
    scores = linear_readout(x[:200], labels[:200], x[200:])
    assert float(auroc(scores, labels[200:])) > 0.99


def _dense(scores: np.ndarray, labels: np.ndarray, config: FindConfig) -> tuple[np.ndarray, ...]:
    """AUROC, p-values and null over the whole table at once, silent latents among them."""
    null = max_statistic_null(
        scores, labels, "auroc_two_sided", permutations=config.permutations, seed=config.seed
    )
    return auroc(scores, labels), auroc_p_value(scores, labels), null


@pytest.mark.parametrize("held", [N * 2 // 4, N * 7, 10**9])
def test_silent_latents_count_in_every_correction(monkeypatch: pytest.MonkeyPatch, held: int) -> None:
    scores = _scores(6)
    scores[:N, 7] += 3.0
    scores[N:, 11] += 1.0
    # Many that never fire, between those that do, and one that fires in the report split alone.
    wide = np.zeros((2 * N, 5 * F), dtype=np.float32)
    wide[:, ::5] = scores
    report = [split_of(name, FindConfig().shares) == "report" for name in _ids(2 * N)]
    wide[report, 1] = 1.0
    monkeypatch.setattr("unbraid.features.find.HELD", held)
    sparse = find(csc_array(wide[:N]), csc_array(wide[N:]), _ids(2 * N))
    full = find(wide[:N], wide[N:], _ids(2 * N))
    monkeypatch.setattr("unbraid.features.find._ranking", lambda s, *rest: _dense(s.toarray(), *rest))
    assert sparse.latents and sparse == full == find(wide[:N], wide[N:], _ids(2 * N))
    assert sparse.searched == 5 * F and {35, 55} <= {latent.latent for latent in sparse.latents}
    # The same latents among fewer have smaller q-values.
    alone = find(scores[:N], scores[N:], _ids(2 * N))
    assert sparse.latents[0].q_value == pytest.approx(5 * alone.latents[0].q_value)


def test_where_no_latent_fires_nothing_is_reported() -> None:
    silent = csc_array((N, F), dtype=np.float32)
    result = find(silent, silent, _ids(2 * N))
    assert (result.latents, result.best_seen, result.p_anything) == ((), 0.5, 1.0)
