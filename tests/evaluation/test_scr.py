"""SCR: a bias that is known, and a plain computation of the score."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from unbraid.activations.documents import Document
from unbraid.evaluation.labelled import Pooled, SuiteResult, split_documents
from unbraid.evaluation.scr import DEFINITIONS, GAP, biases, effects, pairs, scr
from unbraid.evaluation.tpp import Basis, fit_probe, strongest
from unbraid.manifest.errors import UserError
from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.registry import build

D_IN = 8


def _documents(count: int = 400) -> list[Document]:
    return [
        Document.of_text(
            f"text number {i}",
            labels={"job": ("nurse", "professor")[i % 2], "sex": ("female", "male")[i // 2 % 2]},
        )
        for i in range(count)
    ]


def _planted(documents: list[Document], loud: float = 4.0, noise: float = 0.4) -> tuple[Pooled, SAE]:
    """`job` is dimension 0, `sex` is dimension 1 and `loud` times as strong: a probe that may read either
    reads the sex. Latents 0 and 1 are these two, and 8 and 9 their opposites."""
    rng = np.random.default_rng(0)
    raw = rng.normal(size=(len(documents), D_IN)) * noise
    codes = np.zeros((len(documents), 2 * D_IN))
    for row, document in enumerate(documents):
        for place, (name, yes, size) in enumerate((("job", "professor", 1.0), ("sex", "male", loud))):
            up = document.labels[name] == yes
            raw[row, place] += size if up else -size
            codes[row, place if up else D_IN + place] = size
    sae = build(SAEConfig("relu", D_IN, 2 * D_IN, site="layers.0.resid_post"))
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([torch.eye(D_IN), -torch.eye(D_IN)]))
        sae.W_enc.copy_(sae.W_dec.T)
    fired = (codes > 0).sum(axis=0).astype(np.float64)
    one = np.ones(len(documents), dtype=np.int64)
    return Pooled(raw, {"sae": csr_array(codes)}, {"sae": fired}, one), sae.requires_grad_(False)


DOCUMENTS = _documents()
POOLED, BOTH = _planted(DOCUMENTS)
TWO = "scr_metric_threshold_2"


def _scr(pooled: Pooled, sae: SAE, thresholds: tuple[int, ...] = (2, 5)) -> SuiteResult:
    return scr(pooled, {"sae": sae}, (), DOCUMENTS, 0, thresholds=thresholds, reseeds=3)


def test_without_the_latents_of_the_bias_the_probe_reads_what_it_should() -> None:
    found = _scr(POOLED, BOTH)
    directions = {"neurons", "PCA", "random directions", "DiffMean", "probe direction"}
    assert set(found.baselines) == directions | {
        "sae: random latents",
        "ablate none",
    }  # of the other four that fire
    assert all(set(row) <= set(DEFINITIONS) for row in found.rows.values())
    assert all(i.value == i.low == i.high == 0 for i in found.rows["ablate none"].values())
    good = found.rows["sae"]
    # The two latents of sex are all that speaks of it: nothing but the job is left for the probe to read.
    assert good[TWO].value > 0.9 and good[TWO].n == 3
    assert found.rows["probe direction"][TWO].value > 0.8 > found.rows["random directions"][TWO].value
    (lost,) = found.details["bias"].values()
    assert all(run["dir1_before"] < 0.7 and run["dir1_oracle"] > 0.95 for run in lost)
    assert good["scr_dir1_threshold_2"] == good[TWO]  # the job is what it reads worse


def test_an_autoencoder_that_is_worse_removes_less() -> None:
    good = _scr(POOLED, BOTH).rows["sae"][TWO].value

    def changed(W_dec: torch.Tensor) -> float:
        sae = copy.deepcopy(BOTH)
        sae.load_state_dict({**sae.state_dict(), "W_dec": W_dec})
        return _scr(POOLED, sae).rows["sae"][TWO].value

    W, generator = BOTH.W_dec, torch.Generator().manual_seed(1)
    permuted = changed(W[torch.randperm(len(W), generator=generator)])
    drawn = np.mean([changed(torch.randn(W.shape, generator=generator) / D_IN**0.5) for _ in range(4)])
    noisy = changed(W + 0.3 * torch.randn(W.shape, generator=generator))
    codes = POOLED.latents["sae"].toarray()
    shuffled = np.random.default_rng(0).permutation(codes)
    other = replace(POOLED, latents={"sae": csr_array(shuffled)})
    unrelated = _scr(other, BOTH).rows["sae"][TWO].value
    shrunk = [changed(W * share) for share in (0.05, 0.5)]
    assert max(permuted, drawn, unrelated) < 0.5 and noisy < good + 1e-9
    assert shrunk[0] < shrunk[1] + 1e-9 and shrunk[0] < 0.5 < good
    assert changed(-W) < 0.05  # what is ablated is added: the bias doubles


def test_random_latents_stand_beside_an_autoencoder_and_free_nothing() -> None:
    rng = np.random.default_rng(3)
    codes = np.hstack([POOLED.latents["sae"].toarray(), (rng.random((len(DOCUMENTS), 40)) < 0.5) * 0.2])
    wide = build(SAEConfig("relu", D_IN, 2 * D_IN + 40, site="layers.0.resid_post"))
    with torch.no_grad():
        wide.W_dec.copy_(torch.cat([BOTH.W_dec, torch.randn(40, D_IN, generator=torch.Generator())]))
    fired = {"sae": (codes > 0).sum(axis=0).astype(np.float64)}
    found = _scr(replace(POOLED, latents={"sae": csr_array(codes)}, fired=fired), wide.requires_grad_(False))
    random = found.rows["sae: random latents"][TWO].value
    assert "sae: random latents" in found.baselines and "sae" not in found.baselines
    assert abs(random) < 0.2 < 0.9 < found.rows["sae"][TWO].value
    floor = scr(POOLED, {"sae": BOTH}, ["sae"], DOCUMENTS, 0, thresholds=(2,), reseeds=1)
    assert "sae" in floor.baselines and "sae: random latents" not in floor.rows


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 6))
def test_the_score_is_the_plain_computation(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    raw = POOLED.raw + rng.normal(size=POOLED.raw.shape) * 0.3
    codes, write = np.maximum(rng.normal(size=(len(raw), 6)), 0), rng.normal(size=(6, D_IN))
    splits = split_documents(DOCUMENTS, seed)
    (pair,) = pairs(DOCUMENTS, splits, seed)
    probes = [fit_probe(raw, task) for task in pair.labels]
    bias, other = biases(raw, pair, probes)
    basis = Basis(csr_array(codes), write, False)
    latents = strongest(effects(basis, bias.removed, bias.reader), n)
    found = bias.score(raw, basis, latents)

    job = np.array([d.labels["job"] == "professor" for d in DOCUMENTS])
    sex = np.array([d.labels["sex"] == "male" for d in DOCUMENTS])
    rows = {split: task_rows for split, task_rows in pair.labels[0].rows.items()}
    for split, chosen in rows.items():  # of each of the four kinds as many, and all of this split
        assert len({int(((job == a) & (sex == b))[chosen].sum()) for a in (0, 1) for b in (0, 1)}) == 1
        assert set(splits[chosen]) == {split} and len(set(chosen)) == len(chosen)
    agreeing = pair.agreeing.rows["fit"]
    assert (job == sex)[agreeing].all() and set(splits[agreeing]) == {"fit"}
    assert len(agreeing) == 2 * job[agreeing].sum() <= len(rows["fit"])

    def right(probe, x, truth, at) -> float:
        return float(np.mean([(x[i] @ probe.weight + probe.bias > 0) == truth[i] for i in at]))

    gap = codes[[i for i in rows["select"] if sex[i]]].mean(axis=0) - codes[
        [i for i in rows["select"] if not sex[i]]
    ].mean(axis=0)
    effect = [abs(gap[j] * float(write[j] @ probes[1].weight)) for j in range(6)]
    best = sorted(range(6), key=lambda j: -effect[j])[:n]
    assert latents.tolist() == best
    after = right(bias.probe, raw - codes[:, best] @ write[best], job, rows["test"])
    before, oracle = (right(p, raw, job, rows["test"]) for p in (bias.probe, probes[0]))
    assert (bias.before, bias.oracle) == (before, oracle)
    assert (other.before, other.oracle) == tuple(
        right(p, raw, sex, rows["test"]) for p in (bias.probe, probes[1])
    )
    assert bias.on_select == right(bias.probe, raw, job, rows["select"])
    assert found.value == pytest.approx((after - before) / (oracle - before))
    nothing = bias.score(raw, basis, latents[:0])
    assert nothing.value == 0 and not nothing.pull.any()

    # What a document pulls is what the score moves by as it counts for more.
    tested, moved = rows["test"], np.zeros(len(raw))
    hits = [
        np.array([(x[i] @ p.weight + p.bias > 0) == job[i] for i in tested], dtype=float)
        for p, x in ((bias.probe, raw - codes[:, best] @ write[best]), (bias.probe, raw), (probes[0], raw))
    ]
    for place, document in enumerate(tested):
        weight = np.ones(len(tested))
        weight[place] += 1e-6
        a, b, o = (np.average(hit, weights=weight) for hit in hits)
        moved[document] = ((a - b) / (o - b) - found.value) / 1e-6
    np.testing.assert_allclose(found.pull, moved, atol=1e-5)


def test_labels_of_several_values_are_taken_two_by_two() -> None:
    jobs = ("architect", "nurse", "professor", "surgeon", "teacher")
    documents = [
        Document.of_text(f"text {i}", labels={"job": jobs[i % 5], "sex": ("f", "m")[i // 5 % 2]})
        for i in range(1000)
    ]
    found = pairs(documents, split_documents(documents, 0), 0)
    assert [pair.name for pair in found] == ["job=nurse × sex=m", "job=surgeon × sex=m"]


def test_two_labels_that_never_differ_are_refused() -> None:
    same = [Document.of_text(f"text {i}", labels={"a": "01"[i % 2], "b": "01"[i % 2]}) for i in range(400)]
    with pytest.raises(
        UserError, match="each of two values of the one with each of two of the other"
    ) as said:
        scr(POOLED, {}, (), same, 0)
    assert "labels found: a, b" in str(said.value) and "\n" not in str(said.value)
    with pytest.raises(UserError, match="labels found: none"):
        scr(POOLED, {}, (), [Document.of_text("x")] * 400, 0)


def test_where_the_bias_costs_nothing_there_is_no_score_and_a_note_says_so() -> None:
    pooled, sae = _planted(DOCUMENTS, loud=0.0)  # there is no trace of the sex, so the job is what is read
    found = scr(pooled, {"sae": sae}, (), DOCUMENTS, 0, thresholds=(2,), reseeds=2)
    assert all("scr_dir1_threshold_2" not in row for row in found.rows.values())
    assert f"costs less than {GAP:g} of accuracy: job=professor × sex=male (dir1, 2 of 2 s" in found.notes[0]
    json.dumps(found.as_dict(), allow_nan=False)
