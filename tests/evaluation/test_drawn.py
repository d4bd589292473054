"""Numbers about tokens without each document, against leaving its tokens out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unbraid.evaluation import drawn
from unbraid.evaluation.drawn import Drawn, Share, Tokens, mean_of
from unbraid.stats.bootstrap import as_equal, share_interval
from unbraid.stats.effects import auroc


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), n=st.integers(3, 8))
def test_without_a_document_is_without_its_tokens(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    document = np.r_[np.arange(n), rng.integers(0, n, 60)] * 7  # numbers of documents have gaps
    below = rng.random(len(document)) < 0.7
    above = below & (rng.random(len(document)) < 0.6)
    scores, label = rng.integers(0, 9, len(document)).astype(np.float64), rng.random(len(document)) < 0.4
    label[:2] = True, False
    tokens = Tokens(document)
    ratio, area = tokens.ratio(above, below), tokens.auroc(scores, label)
    assert ratio.value == pytest.approx(above.sum() / below.sum())
    assert area.value == pytest.approx(float(auroc(scores, label)))
    for place, gone in enumerate(np.unique(document)):
        left = document != gone
        if below[left].any():
            assert ratio.without[place] == pytest.approx(above[left].sum() / below[left].sum())
        else:
            assert np.isnan(ratio.without[place])
        assert ratio.held[place] == pytest.approx((below & ~left).sum() / below.sum())
        assert area.held[place] == pytest.approx(1 - left.mean())
        if 0 < label[left].sum() < left.sum():
            assert area.without[place] == pytest.approx(float(auroc(scores[left], label[left])))


def test_more_scores_than_steps_move_the_value_without_a_document_by_little(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(0)
    document, scores = np.repeat(np.arange(6), 100), rng.normal(size=600)
    label = scores + rng.normal(size=600) > 0.5
    fine = Tokens(document).auroc(scores, label)
    monkeypatch.setattr(drawn, "BINS", 2000)
    exact = Tokens(document).auroc(scores, label)
    assert fine.value == exact.value
    np.testing.assert_allclose(fine.without, exact.without, atol=1e-3)
    assert fine.without.std() > 1e-3


def test_a_mean_over_concepts_is_jackknifed_as_one() -> None:
    rng = np.random.default_rng(1)
    without, held = rng.uniform(0.4, 0.6, (3, 20)), rng.dirichlet(np.ones(20), 3)
    values = [0.4, 0.5, 0.6]
    found = mean_of([Share(*each) for each in zip(values, without, held, strict=True)], 20)
    each = without.mean(axis=0)
    error = np.sqrt(19 / 20 * np.square(each - each.mean()).sum())
    wanted = share_interval(0.5, float(error), 20, equal=as_equal(held.mean(axis=0)))
    assert (found.value, found.low, found.high) == pytest.approx((wanted.value, wanted.low, wanted.high))
    draws = mean_of([Drawn(1.0, np.array([1.0, np.nan, 3.0])), Drawn(3.0, np.array([3.0, 2.0, 5.0]))], 20)
    assert (draws.value, draws.low, draws.high) == (2.0, pytest.approx(2.0), pytest.approx(3.9))
