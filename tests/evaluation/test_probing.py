"""Sparse probing on planted latents, beside permuted, noised and shrunk ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from unbraid.evaluation.labelled import Pooled, SuiteResult, split_documents, tasks
from unbraid.evaluation.probing import CEILING, DEFINITIONS, NONE, accuracy, probe, probing, top
from unbraid.manifest.errors import UserError

from .planted import labelled, one_latent_a_colour

DOCUMENTS = labelled(400)
POOLED, _ = one_latent_a_colour(DOCUMENTS)


def _with(codes: np.ndarray) -> Pooled:
    return replace(POOLED, latents={"sae": csr_array(codes)})


def _value(found: SuiteResult, row: str, metric: str) -> float:
    return found.rows[row][metric].value


@pytest.fixture(scope="module")
def good() -> SuiteResult:
    return probing(POOLED, (), DOCUMENTS, seed=0)


def test_a_latent_that_is_the_label_is_read_without_fault(good: SuiteResult) -> None:
    for metric in DEFINITIONS:
        assert _value(good, "sae", metric) == 1.0
    assert _value(good, NONE, "probe_top_1") == pytest.approx(0.5)  # as many of either answer
    assert _value(good, CEILING, "probe_all") > 0.95 and _value(good, "DiffMean", "probe_top_1") > 0.95
    assert set(good.baselines) == {"neurons", "PCA", "random directions", "DiffMean", CEILING, NONE}
    assert set(good.detectable) == set(DEFINITIONS)
    for row in good.rows.values():
        assert all(i.low <= i.value <= i.high for i in row.values())
        assert next(iter(row.values())).n > 30


def test_codes_of_other_documents_are_worth_nothing(good: SuiteResult) -> None:
    rng = np.random.default_rng(0)
    codes = POOLED.latents["sae"].toarray()
    permuted = probing(_with(codes[rng.permutation(len(codes))]), (), DOCUMENTS, seed=0)
    assert 0.35 < _value(permuted, "sae", "probe_top_1") < 0.65
    noised = probing(_with(np.maximum(codes + rng.normal(size=codes.shape) * 2, 0)), (), DOCUMENTS, seed=0)
    assert 0.6 < _value(noised, "sae", "probe_top_1") < _value(good, "sae", "probe_top_1")
    shrunk = probing(_with(codes * 0.01), (), DOCUMENTS, seed=0)  # the units of a latent do not matter
    assert shrunk.rows["sae"] == good.rows["sae"]


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**31), k=st.integers(1, 5))
def test_the_choice_is_the_largest_difference_of_means_on_select_alone(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(len(DOCUMENTS), 7))
    task = tasks(DOCUMENTS, split_documents(DOCUMENTS, 1), 1)[0]
    rows, positive = task.rows["select"], task.positive["select"]
    gaps = [
        abs(np.mean([features[r, j] for r, p in zip(rows, positive, strict=True) if p])
            - np.mean([features[r, j] for r, p in zip(rows, positive, strict=True) if not p]))
        for j in range(7)
    ]  # fmt: skip
    assert top(features, task, k).tolist() == np.argsort(gaps)[::-1][:k].tolist()
    elsewhere = features.copy()
    elsewhere[np.setdiff1d(np.arange(len(features)), rows)] = 99.0
    assert top(elsewhere, task, k).tolist() == top(csr_array(features), task, k).tolist()


def test_the_accuracy_is_the_mean_over_tasks_whatever_their_sizes() -> None:
    documents = labelled(400, ("red", "green", "blue", "blue"))
    asked = tasks(documents, split_documents(documents, 0), 0)
    correct = [np.arange(len(task.rows["test"])) % (i + 2) == 0 for i, task in enumerate(asked)]
    found = accuracy(correct, asked, 0)
    assert found.value == pytest.approx(np.mean([c.mean() for c in correct]))
    assert found.n == len(set(np.concatenate([task.rows["test"] for task in asked]).tolist()))


def test_a_probe_sees_nothing_of_the_test_labels() -> None:
    task = tasks(DOCUMENTS, split_documents(DOCUMENTS, 0), 0)[0]
    turned = replace(task, positive={**task.positive, "test": ~task.positive["test"]})
    features = POOLED.raw
    assert (probe(features, task) == ~probe(features, turned)).all()


def test_too_few_documents_are_one_sentence() -> None:
    few = labelled(3)
    with pytest.raises(UserError, match="no label divides the 3 documents"):
        probing(one_latent_a_colour(few)[0], (), few, seed=0)
