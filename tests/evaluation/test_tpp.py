"""TPP and removal: planted classes, and plain computations of both."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from unbraid.activations.documents import Document
from unbraid.evaluation.labelled import Pooled, Reading, pool, split_documents, tasks
from unbraid.evaluation.removal import DEFINITIONS as REMOVAL
from unbraid.evaluation.removal import cross_entropies, matched, removal
from unbraid.evaluation.tpp import (
    DEFINITIONS,
    Basis,
    ablated,
    effects,
    fit_probe,
    perturbation,
    strongest,
    tpp,
)
from unbraid.manifest.errors import UserError
from unbraid.model.load import LanguageModel
from unbraid.model.sites import Site
from unbraid.sae.base import SAE
from unbraid.sae.registry import build

from .planted import labelled, one_latent_a_colour

DOCUMENTS = labelled(400)
POOLED, ONE_EACH = one_latent_a_colour(DOCUMENTS)
SITE = Site.parse("layers.1.resid_post")


def _tpp(pooled: Pooled, sae: SAE) -> dict[str, float]:
    found = tpp(pooled, {"sae": sae}, (), DOCUMENTS, 0, thresholds=(2, 5), reseeds=3)
    assert set(found.rows["sae"]) <= set(DEFINITIONS) and "sae" not in found.baselines
    directions = {"neurons", "PCA", "random directions", "DiffMean", "probe direction"}
    assert directions | {"ablate none"} == set(found.baselines)
    assert all(i.value == i.low == i.high == 0 for i in found.rows["ablate none"].values())
    assert all(i.low <= i.value <= i.high and i.n == 3 for row in found.rows.values() for i in row.values())
    return {metric: interval.value for metric, interval in found.rows["sae"].items()}


def test_latents_that_are_the_classes_are_removed_one_by_one() -> None:
    good = _tpp(POOLED, ONE_EACH)
    # Without its latent a class looks like none of the three: its own probe loses all its positives.
    assert good["tpp_threshold_2_intended_diff_only"] > 0.4
    assert good["tpp_threshold_2_total_metric"] > 0.2
    for n in (2, 5):
        parts = [good[f"tpp_threshold_{n}_{p}_diff_only"] for p in ("intended", "unintended")]
        assert good[f"tpp_threshold_{n}_total_metric"] == pytest.approx(parts[0] - parts[1])

    def changed(**weights: torch.Tensor) -> SAE:
        import copy

        sae = copy.deepcopy(ONE_EACH)
        sae.load_state_dict({**sae.state_dict(), **weights})
        return sae

    W = ONE_EACH.W_dec
    turn = torch.randperm(len(W), generator=torch.Generator().manual_seed(1))
    permuted = _tpp(POOLED, changed(W_dec=W[turn]))
    shrunk = _tpp(POOLED, changed(W_dec=W * 0.1))
    codes = POOLED.latents["sae"].toarray()
    other = replace(POOLED, latents={"sae": csr_array(np.random.default_rng(0).permutation(codes))})
    key = "tpp_threshold_2_total_metric"
    assert max(permuted[key], shrunk[key], _tpp(other, ONE_EACH)[key]) < good[key]


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 6))
def test_perturbation_is_the_plain_computation(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    raw = POOLED.raw + rng.normal(size=POOLED.raw.shape)
    codes = np.maximum(rng.normal(size=(len(raw), 6)), 0)
    write = rng.normal(size=(6, raw.shape[1]))
    group = tasks(DOCUMENTS, split_documents(DOCUMENTS, 0), 0)
    probes = [fit_probe(raw, task) for task in group]
    found = perturbation(raw, [Basis(csr_array(codes), write, False)] * 3, group, probes, n)
    drop = np.zeros((3, 3))
    for i, (task, probe) in enumerate(zip(group, probes, strict=True)):
        rows, yes = task.rows["select"], task.positive["select"]
        gap = codes[rows[yes]].mean(axis=0) - codes[rows[~yes]].mean(axis=0)
        effect = [max(gap[j], 0) * float(write[j] @ probe.weight) for j in range(6)]
        chosen = [j for j in sorted(range(6), key=lambda j: -effect[j])[:n] if effect[j] != 0]
        for j, (other, reader) in enumerate(zip(group, probes, strict=True)):
            kept, positive = other.rows["test"], other.positive["test"]
            x = raw[kept] - sum((np.outer(codes[kept, k], write[k]) for k in chosen), np.zeros(raw.shape[1]))
            before = ((raw[kept] @ reader.weight + reader.bias > 0) == positive).mean()
            drop[i, j] = before - ((x @ reader.weight + reader.bias > 0) == positive).mean()
    own = np.eye(3, dtype=bool)
    assert found["intended_diff_only"].value == pytest.approx(drop[own].mean())
    assert found["unintended_diff_only"].value == pytest.approx(drop[~own].mean())
    total = found["total_metric"]
    assert total.value == pytest.approx(drop[own].mean() - drop[~own].mean())
    assert np.flatnonzero(total.pull).size and abs(total.pull.sum()) < 1e-12


def test_tpp_needs_a_label_with_three_values() -> None:
    two = labelled(200, ("red", "green"))
    with pytest.raises(UserError, match="three or more values"):
        tpp(one_latent_a_colour(two)[0], {}, (), two, 0)


def test_random_latents_fire_about_as_often_and_are_none_of_the_chosen() -> None:
    fired = np.repeat([1000.0, 10.0, 0.0], 20)
    found = matched(np.array([0, 25, 1]), fired, 0)
    assert fired[found].tolist() == [1000.0, 10.0, 1000.0]
    assert len(set(found) | {0, 25, 1}) == 6
    assert len(matched(np.arange(3), np.ones(3), 0)) == 0


def _spoken(count: int) -> list[Document]:
    words = ("red ball", "two tablets", "delayed package")
    return [
        Document.of_text(
            f"the {words[i % 3]} was {words[i % 3]} {i} and a pan", labels={"colour": str(i % 3)}
        )
        for i in range(count)
    ]


def test_cross_entropies_are_those_of_each_document_by_itself(lm: LanguageModel) -> None:
    documents = _spoken(5)
    rows = np.array([3, 0, 4])
    found = cross_entropies(
        lm, documents, rows, Reading(SITE, batch_tokens=40), {"same": lambda x: x, "zero": torch.zeros_like}
    )
    np.testing.assert_array_equal(found["same"], found[""])
    for place, row in enumerate(rows):
        alone = cross_entropies(lm, documents, np.array([row]), Reading(SITE), {"zero": torch.zeros_like})
        for name in ("", "tokens", "zero"):
            assert found[name][place] == pytest.approx(alone[name][0], rel=1e-4), name
    assert (found["zero"] != found[""]).all()
    from unbraid.activations.text import tokenise

    window = tokenise(lm, documents[0], 256)
    ids = torch.tensor(window.input_ids)
    with torch.no_grad():
        said = lm.model(input_ids=ids[None]).logits[0].log_softmax(-1)
    plain = ~torch.tensor(window.special_mask)
    kept = plain[:-1] & plain[1:]
    loss = -said[:-1].gather(1, ids[1:, None])[:, 0][kept].sum()
    assert found[""][1] == pytest.approx(float(loss), rel=1e-4) and found["tokens"][1] == kept.sum()


def test_removal_keeps_to_its_price_and_names_what_it_did(lm: LanguageModel, sae: SAE) -> None:
    documents = _spoken(200)
    reading = Reading(SITE)
    pooled = pool(lm, documents, {"sae": sae}, reading)
    found = removal(pooled, {"sae": sae}, (), lm, documents, reading, 0, cost=1e9, resamples=50)
    directions = {"neurons", "PCA", "random directions", "DiffMean", "probe direction"}
    assert set(found.rows) == {"sae", "sae: random latents", "ablate none"} | directions
    assert set(found.baselines) == set(found.rows) - {"sae"}
    assert all(i.value == i.low == i.high == 0 for i in found.rows["ablate none"].values())
    assert all(set(row) == set(REMOVAL) for row in found.rows.values())
    assert set(found.details["doses"]["sae"].values()) == {"20 latents"}  # any price is paid
    for way in ("DiffMean", "probe direction"):
        assert found.rows[way]["removal_target_probe"].value > 0.3, way
    none = removal(pooled, {"sae": sae}, (), lm, documents, reading, 0, cost=-1e9, resamples=50)
    assert set(none.details["doses"]["sae"].values()) == {"no dose is cheap enough"}
    assert all(i.value == 0 for row in none.rows.values() for i in row.values())


def test_an_autoencoder_that_writes_less_removes_less(lm: LanguageModel, sae: SAE) -> None:
    documents, reading = _spoken(200), Reading(SITE)
    shrunk = build(sae.config)
    shrunk.load_state_dict({**sae.state_dict(), "W_dec": sae.W_dec * 0.05})
    saes = {"good": sae, "shrunk": shrunk.requires_grad_(False)}
    pooled = pool(lm, documents, saes, reading)
    found = removal(pooled, saes, (), lm, documents, reading, 0, cost=1e9, resamples=20).rows
    value = {name: found[name]["removal_target_probe"].value for name in saes}
    assert value["good"] > 0.3 > 0.1 > value["shrunk"]


def test_what_is_ablated_in_the_model_is_what_is_ablated_in_the_means(lm: LanguageModel, sae: SAE) -> None:
    documents, reading = _spoken(200), Reading(SITE)
    pooled = pool(lm, documents, {"sae": sae}, reading)
    task = tasks(documents, split_documents(documents, 0), 0)[0]
    basis = Basis(pooled.latents["sae"], sae.W_dec.double().numpy(), False)
    latents = strongest(effects(basis, task, fit_probe(pooled.raw, task)), 5)
    from unbraid.evaluation.labelled import read_tokens
    from unbraid.evaluation.removal import _ablation  # pyright: ignore[reportPrivateUsage]

    dose = _ablation(pooled, sae, basis, latents)
    sums = np.zeros_like(pooled.raw)
    for batch in read_tokens(lm, documents, reading):
        np.add.at(sums, batch.document, dose.change(batch.x).double().numpy())
    rows = task.rows["test"]
    expected = sums[rows] / pooled.tokens[rows, None]
    np.testing.assert_allclose(dose.means(rows), expected, atol=1e-4)
    np.testing.assert_allclose(ablated(pooled.raw, basis, rows, latents), expected, atol=1e-4)


def test_directions_that_are_taken_away_are_so_in_the_model_as_in_the_means(
    lm: LanguageModel, sae: SAE
) -> None:
    from unbraid.evaluation.labelled import read_tokens
    from unbraid.evaluation.removal import _ways  # pyright: ignore[reportPrivateUsage]

    documents, reading = _spoken(200), Reading(SITE)
    pooled = pool(lm, documents, {"sae": sae}, reading)
    task = tasks(documents, split_documents(documents, 0), 0)[0]
    probe = fit_probe(pooled.raw, task)
    ways = _ways(pooled, {"sae": sae}, task, probe, 0)
    rows, select = task.rows["test"], task.rows["select"]
    centre = pooled.raw[select].mean(axis=0)
    for way in ("neurons", "PCA", "random directions", "probe direction", "ablate none"):
        dose = ways[way][-1]
        sums = np.zeros_like(pooled.raw)
        for batch in read_tokens(lm, documents, reading):
            np.add.at(sums, batch.document, dose.change(batch.x).double().numpy())
        expected = sums[rows] / pooled.tokens[rows, None]
        np.testing.assert_allclose(dose.means(rows), expected, atol=1e-3, err_msg=way)
    # One neuron: the coordinate whose means differ most, by the probe's weight, is put at its mean.
    yes = task.positive["select"]
    gap = pooled.raw[select[yes]].mean(axis=0) - pooled.raw[select[~yes]].mean(axis=0)
    neuron = int(np.argmax(gap * probe.weight))
    wanted = pooled.raw[rows].copy()
    wanted[:, neuron] = centre[neuron]
    np.testing.assert_allclose(ways["neurons"][0].means(rows), wanted, atol=1e-9)
