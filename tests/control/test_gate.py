"""Intent gates: they separate, keep their stated recall, and are what `model.apply` decides by."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unbraid.control.gate import (
    choose_threshold,
    gate_rates,
    last_prompt_activations,
    load_gate,
    save_gate,
    train_gate,
)
from unbraid.manifest.errors import IntegrityError, UserError
from unbraid.model.edits import Edit, Gate
from unbraid.model.generate import generate
from unbraid.model.load import LanguageModel
from unbraid.model.sites import Site

SITE = Site(1, "resid_post")


def prompts(last: str, count: int, offset: int = 0) -> list[list[dict[str, str]]]:
    """Prompts of different lengths that end in a word of one kind."""
    return [
        [{"role": "user", "content": "the order " * ((i + offset) % 5) + f"number {i + offset} {last}"}]
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def trained(lm: LanguageModel) -> tuple[Gate, dict[str, Any]]:
    return train_gate(
        lm,
        SITE,
        prompts("dose of ibuprofen", 40),
        prompts("refund for the package", 40),
        held_out_positive=prompts("dose of ibuprofen", 30, 100),
        held_out_negative=prompts("refund for the package", 30, 100),
        seed=1,
    )


def test_separates_unseen_prompts(lm: LanguageModel, trained: tuple[Gate, dict[str, Any]]) -> None:
    gate, facts = trained
    assert facts["selection"]["recall"]["value"] >= 0.99
    rates = gate_rates(
        lm, gate, prompts("dose of ibuprofen", 30, 200), prompts("refund for the package", 30, 200)
    )
    assert rates["recall"]["value"] >= 0.95
    assert rates["false_open"]["value"] <= 0.1
    for rate in rates.values():
        assert 0 <= rate["low"] <= rate["value"] <= rate["high"] <= 1 and rate["n"] == 30


def test_training_is_deterministic(lm: LanguageModel, trained: tuple[Gate, dict[str, Any]]) -> None:
    again, facts = train_gate(
        lm,
        SITE,
        prompts("dose of ibuprofen", 40),
        prompts("refund for the package", 40),
        held_out_positive=prompts("dose of ibuprofen", 30, 100),
        held_out_negative=prompts("refund for the package", 30, 100),
        seed=1,
    )
    assert again.to_json() == trained[0].to_json() and facts == trained[1]


def test_standardisation_is_folded_in(lm: LanguageModel) -> None:
    """One dot product gives what scaler and regression give one after the other."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    positive, negative = prompts("dose", 12), prompts("refund", 15)
    gate, _ = train_gate(lm, SITE, positive, negative, held_out_positive=positive, held_out_negative=negative)
    x = last_prompt_activations(lm, [*positive, *negative], SITE).astype(np.float64)
    labels = np.arange(len(x)) < len(positive)
    scaler = StandardScaler().fit(x)
    model = LogisticRegression(C=1.0, class_weight="balanced", max_iter=2000)
    model.fit(scaler.transform(x), labels)
    np.testing.assert_allclose(
        x @ gate.weight + gate.bias, model.decision_function(scaler.transform(x)), atol=1e-3
    )


def test_activations_do_not_depend_on_the_batch(lm: LanguageModel) -> None:
    some = prompts("dose", 9)
    together = last_prompt_activations(lm, some, SITE)
    alone = np.concatenate([last_prompt_activations(lm, [p], SITE) for p in some])
    np.testing.assert_allclose(together, alone, atol=1e-4)


def test_the_engine_decides_as_the_scores_say(
    lm: LanguageModel, trained: tuple[Gate, dict[str, Any]]
) -> None:
    gate = trained[0]
    mixed = [*prompts("dose of ibuprofen", 5, 300), *prompts("refund for the package", 5, 300)]
    scores = last_prompt_activations(lm, mixed, SITE) @ gate.weight + gate.bias
    d = lm.d_in
    edit = Edit(
        SITE, "add", 0.0, np.ones((1, d)), np.zeros(1), np.full(1, -np.inf), np.ones((1, d)), gate=gate
    )
    replies = generate(lm, mixed, max_new_tokens=2, temperature=0, edits=[edit])
    assert [r.edits[0].gated == 0 for r in replies] == list(scores > gate.threshold)


@settings(deadline=None, max_examples=80)
@given(
    scores=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=60),
    recall=st.floats(0.5, 1.0),
    margin=st.floats(0.0, 2.0),
)
def test_threshold_keeps_the_recall(scores: list[float], recall: float, margin: float) -> None:
    values = np.array(scores)
    threshold = choose_threshold(values, recall=recall, margin=margin)
    assert (values > threshold).mean() >= recall - 1e-9
    assert math.isfinite(threshold)
    assert threshold <= choose_threshold(values, recall=recall, margin=0.0)


def test_save_and_load(tmp_path: Path, trained: tuple[Gate, dict[str, Any]]) -> None:
    gate, facts = trained
    manifest = save_gate(gate, tmp_path / "gate", model_id="m" * 64, facts=facts, inputs={"probes": "p" * 64})
    again, read = load_gate(tmp_path / "gate")
    assert again.to_json() == gate.to_json()
    assert read == manifest and read.inputs == {"model": "m" * 64, "probes": "p" * 64}


def test_a_changed_gate_is_refused(tmp_path: Path, trained: tuple[Gate, dict[str, Any]], flip: Any) -> None:
    save_gate(trained[0], tmp_path / "gate", model_id="m", facts={})
    flip(tmp_path / "gate" / "gate.safetensors", -1)
    with pytest.raises(IntegrityError, match=r"gate\.safetensors"):
        load_gate(tmp_path / "gate")


def test_another_kind_of_artifact_is_refused(sae_folder: Path) -> None:
    with pytest.raises(UserError, match="of kind sae, not gate"):
        load_gate(sae_folder)


@pytest.mark.parametrize("empty", ["positive", "negative", "held_out_positive", "held_out_negative"])
def test_empty_sets_are_named(lm: LanguageModel, empty: str) -> None:
    sets: dict[str, Any] = {
        name: prompts("x", 2) for name in ("positive", "negative", "held_out_positive", "held_out_negative")
    }
    sets[empty] = []
    with pytest.raises(UserError, match=empty.replace("_", "[- ]").replace("held[- ]out[- ]", "held-out ")):
        train_gate(
            lm,
            SITE,
            sets["positive"],
            sets["negative"],
            held_out_positive=sets["held_out_positive"],
            held_out_negative=sets["held_out_negative"],
        )


def test_recall_outside_its_range_is_refused(lm: LanguageModel) -> None:
    some = prompts("x", 2)
    with pytest.raises(UserError, match=r"recall is 1\.5"):
        train_gate(lm, SITE, some, some, held_out_positive=some, held_out_negative=some, recall=1.5)
