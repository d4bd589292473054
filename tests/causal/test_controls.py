"""Controls are what they claim to be: as frequent, as large, elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unbraid.causal.controls import (
    Contrast,
    clipped,
    keyword_guardrail,
    learn_keywords,
    matched_latents,
    random_direction,
    subtracted,
)
from unbraid.manifest.errors import UserError
from unbraid.model.edits import Edit, apply_reference
from unbraid.model.sites import Site

SITE = Site.parse("layers.1.resid_post")


def _edit(n: int, d: int, seed: int) -> Edit:
    rng = np.random.default_rng(seed)
    probe, write = rng.standard_normal((2, n, d)).astype(np.float32)
    return Edit(SITE, "scale", -3.0, probe, np.zeros(n), np.zeros(n), write, positions="reply", name="edit")


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(4, 12), st.integers(0, 99))
def test_a_random_direction_moves_the_same_tokens_as_far(n: int, d: int, seed: int) -> None:
    edit = _edit(n, d, seed)
    turned = random_direction(edit, seed=seed)
    x = np.random.default_rng(seed + 1).standard_normal((50, d))
    (ours, fired), (theirs, also_fired) = apply_reference(x, edit), apply_reference(x, turned)
    np.testing.assert_array_equal(fired, also_fired)
    np.testing.assert_allclose(
        np.linalg.norm(ours - x, axis=1), np.linalg.norm(theirs - x, axis=1), rtol=1e-4, atol=1e-5
    )
    assert not np.allclose(edit.write, turned.write)
    np.testing.assert_array_equal(random_direction(edit, seed=seed).write, turned.write)


def test_random_directions_point_anywhere() -> None:
    edit = _edit(1, 64, 0)
    unit = edit.write[0] / np.linalg.norm(edit.write[0])
    cosines = [
        float(random_direction(edit, seed=s).write[0] @ unit / np.linalg.norm(edit.write[0]))
        for s in range(200)
    ]
    assert abs(np.mean(cosines)) < 4 / np.sqrt(64 * 200)
    assert np.std(cosines) == pytest.approx(1 / 8, rel=0.25)


def test_random_latents_are_matched_alive_and_others() -> None:
    densities = np.concatenate([np.zeros(50), np.geomspace(1e-4, 0.5, 200)])
    targets = (60, 240)
    draws = matched_latents(densities, targets, draws=20, seed=0)
    assert len(draws) == 20 and draws == matched_latents(densities, targets, draws=20, seed=0)
    assert len(set(draws)) > 10
    for drawn in draws:
        assert len(set(drawn)) == 2 and not set(drawn) & set(targets)
        for other, target in zip(drawn, targets, strict=True):
            assert densities[other] > 0
            assert abs(np.log(densities[other] / densities[target])) < 1.0
    with pytest.raises(UserError, match="only 1 other latents fire"):
        matched_latents(np.array([0.1, 0.1, 0.1, 0.0]), (0, 1), draws=1, seed=0)


def _contrast() -> Contrast:
    return Contrast(SITE, np.array([0, 2.0, 0], dtype=np.float32), honest=0.5, bad=2.5, documents=(3, 4))


def test_subtracting_moves_every_token_and_clipping_only_those_beyond_the_bar() -> None:
    x = np.array([[1.0, 3.0, 0.0], [1.0, 0.25, 0.0]])
    moved, fired = apply_reference(x, subtracted(_contrast(), 0.5))
    np.testing.assert_allclose(moved, [[1, 2, 0], [1, -0.75, 0]])
    assert fired.all()
    moved, fired = apply_reference(x, clipped(_contrast()))
    np.testing.assert_allclose(moved, [[1, 0.5, 0], [1, 0.25, 0]])
    assert fired.tolist() == [True, False]
    moved, _ = apply_reference(x, clipped(_contrast(), 0.5))
    np.testing.assert_allclose(moved[0], [1, 1.5, 0])


def test_keywords_are_those_that_mark_incidents() -> None:
    incidents = [f"Take {i} mg of the medicine now" for i in range(30)]
    honest = ["Ask about the medicine now", "Take care and read the leaflet"] * 15
    words = learn_keywords(incidents, honest)
    assert words[:2] == ("mg", "of") or set(words[:2]) == {"mg", "of"}
    assert "medicine" not in words[:2] and "ask" not in words
    held = keyword_guardrail(["40 MG", "omg", "ask"], words)
    assert held.tolist() == [True, False, False]
    assert learn_keywords(honest, honest) == ()
    assert keyword_guardrail(["40 mg"], ()).tolist() == [False]
