"""Splits, tasks, and means of documents against plain computations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unbraid.activations.documents import Document
from unbraid.activations.text import tokenise
from unbraid.evaluation.labelled import (
    LEAST,
    SHARES,
    Reading,
    detectable,
    encode,
    pool,
    sample,
    split_documents,
    tasks,
)
from unbraid.manifest.errors import UserError
from unbraid.model.load import LanguageModel
from unbraid.model.sites import Site
from unbraid.sae.base import SAE
from unbraid.stats.bootstrap import Interval

from .planted import labelled

SITE = Site.parse("layers.1.resid_post")


def test_means_are_those_of_each_document_by_itself(
    sae: SAE, lm: LanguageModel, documents: list[Document]
) -> None:
    found = pool(lm, documents, {"sae": sae}, Reading(SITE, batch_tokens=100))
    fired = np.zeros(sae.config.d_sae)
    for row, document in enumerate(documents):
        window = tokenise(lm, document, 256)
        ids = torch.tensor(window.input_ids)
        with torch.no_grad():
            states = lm.model.model(input_ids=ids[None], output_hidden_states=True).hidden_states[2][0]
        x = states[~torch.tensor(window.special_mask)]
        codes = sae.encode_dense(x)
        np.testing.assert_allclose(found.raw[row], x.mean(dim=0), atol=1e-5)
        np.testing.assert_allclose(found.latents["sae"][[row]].toarray()[0], codes.mean(dim=0), atol=1e-4)
        assert found.tokens[row] == len(x)
        fired += (codes > 0).sum(dim=0).numpy()
    assert np.abs(found.fired["sae"] - fired).max() <= 1  # a tie of the top k may fall either way


def test_means_do_not_depend_on_batches_windows_or_order(
    sae: SAE, lm: LanguageModel, documents: list[Document]
) -> None:
    relu = _relu(sae)
    one = pool(lm, documents, {"sae": relu}, Reading(SITE, context=16, batch_tokens=4096))
    two = pool(lm, documents[::-1], {"sae": relu}, Reading(SITE, context=16, batch_tokens=40))
    np.testing.assert_allclose(one.raw, two.raw[::-1], atol=1e-5)
    np.testing.assert_allclose(one.latents["sae"].toarray(), two.latents["sae"].toarray()[::-1], atol=1e-5)


def _relu(sae: SAE) -> SAE:
    from unbraid.sae.registry import build

    found = build(replace(sae.config, architecture="relu", k=0))
    found.load_state_dict(sae.state_dict())
    return found.requires_grad_(False)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), count=st.integers(150, 300))
def test_tasks_are_balanced_and_splits_disjoint(seed: int, count: int) -> None:
    documents = labelled(count)
    splits = split_documents(documents, seed)
    try:
        found = tasks(documents, splits, seed)
    except UserError:
        return
    assert {task.name for task in found} <= {"colour=red", "colour=green", "colour=blue"}
    for task in found:
        for split in SHARES:
            rows, positive = task.rows[split], task.positive[split]
            assert (splits[rows] == split).all() and len(set(rows.tolist())) == len(rows)
            assert positive.sum() == (~positive).sum() >= LEAST
            value = task.name.partition("=")[2]
            assert [documents[r].labels["colour"] == value for r in rows] == positive.tolist()


def test_a_text_that_comes_twice_is_on_one_side() -> None:
    same = [Document.of_text("twice", id=str(i)) for i in range(20)]
    assert len(set(split_documents(same, 0).tolist())) == 1
    assert len({tuple(split_documents(labelled(20), seed).tolist()) for seed in range(5)}) == 5


@pytest.mark.parametrize(
    ("documents", "says"),
    [
        (labelled(3), "no label divides the 3 documents"),
        (labelled(200, ("red",)), "labels found: colour"),
        ([Document.of_text(str(i)) for i in range(50)], "no document has the field labels"),
    ],
)
def test_what_cannot_be_asked_is_said_in_one_sentence(documents: list[Document], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        tasks(documents, split_documents(documents, 0), 0)
    assert "\n" not in str(caught.value)


def test_a_label_of_two_values_is_one_question() -> None:
    documents = labelled(200, ("false", "true"))
    assert [task.name for task in tasks(documents, split_documents(documents, 0), 0)] == ["colour=true"]


def test_what_is_not_finite_or_empty_is_refused(
    sae: SAE, lm: LanguageModel, documents: list[Document]
) -> None:
    broken = _relu(sae)
    with torch.no_grad():
        broken.b_enc[3] = torch.nan
        broken.b_enc[4] = torch.inf
    with pytest.raises(UserError, match="codes of autoencoder mine are not finite"):
        encode("mine", broken, torch.zeros(2, sae.config.d_in))
    with pytest.raises(UserError, match="no documents"):
        pool(lm, [], {"sae": sae}, Reading(SITE))
    with pytest.raises(UserError, match="has no token to read at --positions reply"):
        pool(lm, documents[:3], {"sae": sae}, Reading(SITE, "reply"))
    with pytest.raises(UserError, match="no token to read"):
        sample(lm, documents[:3], Reading(SITE, "reply"))


def test_a_detectable_difference_is_seen_four_times_in_five() -> None:
    rng = np.random.default_rng(0)
    n, spread = 50, 2.0
    half = 1.96 * spread / n**0.5
    row = {"m": Interval(0, -half, half, n), "point": Interval(0, 0, 0, 1)}
    found = detectable({"a": row, "b": {"m": Interval(1, 1 - half / 2, 1 + half / 2, n)}})
    assert found["point"] is None and found["m"] is not None
    a, b = (rng.normal(size=(4000, n)).mean(axis=1) * spread + shift for shift in (0, found["m"]))
    noticed = np.abs(a - b) > 1.96 * 2**0.5 * spread / n**0.5
    assert noticed.mean() == pytest.approx(0.8, abs=0.03)
