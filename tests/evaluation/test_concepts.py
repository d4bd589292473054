"""Concepts on planted tokens: latents that are the concepts, split ones, absorbed ones, and none at all."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csc_array

from unbraid.activations.documents import Document
from unbraid.evaluation import concepts as concepts_module
from unbraid.evaluation import tokens as token_module
from unbraid.evaluation.concepts import ConceptRow, best_latent_p_values, concepts, join_order
from unbraid.evaluation.detectors import best_bar
from unbraid.evaluation.labelled import Reading, SuiteResult, Tokens, split_documents
from unbraid.manifest.errors import UserError
from unbraid.model.sites import Site
from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.registry import build
from unbraid.stats.bootstrap import wilson
from unbraid.stats.effects import auroc
from unbraid.stats.permutation import familywise_p_value, max_statistic_null

D, NAMES, LENGTH = 8, ("drug", "tone"), 12
READING = Reading(Site.parse("layers.1.resid_post"))


def _documents(count: int) -> list[Document]:
    """Texts of words; a word `drug…` is the concept drug, and so on. All have a drug, half have no tone."""
    rng = np.random.default_rng(0)
    found: list[Document] = []
    for i in range(count):
        kinds = rng.choice(["word", "drug", "word", "tone" if i % 2 else "word"], size=LENGTH)
        kinds[0] = "drug"
        words = [f"{kind}{i}" for kind in kinds]
        text, spans = "", list[tuple[int, str, int, int]]()
        for kind, word in zip(kinds, words, strict=True):
            text += " " * bool(text)
            if kind != "word":
                spans.append((0, str(kind), len(text), len(text) + len(word)))
            text += word
        found.append(Document.of_text(text, concepts=spans))
    return found


DOCUMENTS = _documents(160)


def _read_tokens(lm: object, documents: list[Document], reading: object) -> Iterator[Tokens]:
    """One token a word: its concept's basis vector, a part of the drugs on one more, and noise."""
    for number, document in enumerate(documents):
        words = (document.text or "").split()
        rng = np.random.default_rng(zlib.crc32((document.text or "").encode()))
        x = rng.normal(size=(len(words), D)).astype(np.float32) * 0.05
        concepts_ = [frozenset([n for n in NAMES if word.startswith(n)]) for word in words]
        for row, here in enumerate(concepts_):
            if "drug" in here:
                x[row, 0] += 1
                x[row, 3 + row % 2] += 1  # two kinds of drugs
            if "tone" in here:
                x[row, 1] += 1
        piece: Any = SimpleNamespace(
            window=SimpleNamespace(concepts=tuple(concepts_)), keep=np.ones(len(words), dtype=np.bool_)
        )
        yield Tokens(torch.from_numpy(x), np.full(len(words), number), [piece])


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_module, "read_tokens", _read_tokens)


def _sae(W: np.ndarray, bias: float = -0.5) -> SAE:
    sae = build(SAEConfig("relu", D, len(W), site="layers.1.resid_post", apply_b_dec_to_input=False))
    with torch.no_grad():
        sae.W_dec.copy_(torch.from_numpy(W).float())
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_enc.fill_(bias)
    return sae.requires_grad_(False)


def _run(**saes: SAE) -> tuple[SuiteResult, dict[str, dict[str, ConceptRow]]]:
    layout: Any = SimpleNamespace(layout=SimpleNamespace(width=lambda site: D))
    result, rows = concepts(saes, (), layout, DOCUMENTS, READING, 0, resamples=200)
    return result, {name: {row.concept: row for row in found} for name, found in rows.items()}


def _value(row: ConceptRow, metric: str) -> float:
    return row.metrics[metric].value


def test_latents_that_are_the_concepts_are_pure_and_complete() -> None:
    result, rows = _run(good=_sae(np.eye(D)[[5, 0, 6, 1]]))
    for concept, latent in (("drug", 1), ("tone", 3)):
        row = rows["good"][concept]
        assert row.latent == latent and row.joined == (latent,)
        for metric in ("purity", "completeness", "auroc", "split_purity", "split_completeness"):
            found = row.metrics[metric]  # nothing varies, which is not to say that nothing ever will
            assert (found.value, found.low, found.high) == (
                1.0,
                pytest.approx(wilson(found.n, found.n)[0]),
                1.0,
            )
        assert _value(row, "absorbed") == 0.0 and _value(row, "split") == 1.0
        assert row.metrics["purity"].n > 30
    assert rows["good"]["tone"].p_value is not None and rows["good"]["tone"].p_value <= 0.01
    assert rows["good"]["drug"].p_value is None  # every document has one, so labels cannot be exchanged
    assert result.rows["good"]["purity"].value == 1.0 and result.rows["good"]["found"].value == 1.0
    assert result.rows["DiffMean"]["auroc"].value > 0.99
    assert result.baselines == ("DiffMean", "linear probe", "predict none")
    for name in ("DiffMean", "linear probe"):  # directions along which these concepts are wholly apart
        assert all(result.rows[name][m].value > 0.98 for m in ("purity", "completeness", "auroc"))
    nothing = {metric: i.value for metric, i in result.rows["predict none"].items()}
    assert nothing == {"completeness": 0.0, "auroc": 0.5}  # of what never fires there is no purity


def test_a_concept_over_two_latents_is_split() -> None:
    _, rows = _run(split=_sae(np.eye(D)[[3, 4, 1]]))
    row = rows["split"]["drug"]
    assert set(row.joined) == {0, 1} and _value(row, "split") == 2.0
    assert _value(row, "purity") == 1.0 and 0.35 < _value(row, "completeness") < 0.65
    assert _value(row, "split_completeness") == 1.0 and _value(row, "absorbed") == 0.0


def test_a_latent_that_is_silent_where_another_has_its_direction_is_absorbed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    general, special = np.eye(D)[0], np.eye(D)[0] + np.eye(D)[3]
    sae = _sae(np.stack([general, special / np.linalg.norm(special), np.eye(D)[1]]))
    with torch.no_grad():
        sae.W_enc[:, 0] = torch.from_numpy(general - 2 * np.eye(D)[3]).float()  # silent on one kind of drug
        sae.W_enc[:, 1] = torch.from_numpy(np.eye(D)[3]).float()
        sae.b_enc[:2] = torch.tensor([-0.25, -0.1])
    monkeypatch.setattr(concepts_module, "GAIN", 2.0)  # nothing joins, as if it were about something else
    _, rows = _run(absorbing=sae)
    row = rows["absorbing"]["drug"]
    assert len(row.joined) == 1
    assert _value(row, "absorbed") == pytest.approx(1 - _value(row, "completeness"), abs=1e-9)
    assert 0.3 < _value(row, "absorbed") < 0.7


def test_worse_autoencoders_are_worse() -> None:
    good = np.eye(D)[[0, 1, 5, 6]]
    noise = np.random.default_rng(0).normal(size=good.shape)
    random = noise / np.linalg.norm(noise, axis=1, keepdims=True)
    result, _ = _run(
        good=_sae(good), noised=_sae(good + 0.35 * noise), random=_sae(random, -0.2),
        shrunk=_sae(good * 0.9), silent=_sae(good * 0.01),
    )  # fmt: skip

    def f(name: str, metric: str) -> float:
        return result.rows[name][metric].value

    assert f("good", "completeness") >= f("noised", "completeness") and f("good", "auroc") >= f(
        "noised", "auroc"
    )
    assert f("good", "purity") + f("good", "completeness") > f("random", "purity") + f(
        "random", "completeness"
    )
    assert f("good", "auroc") > f("random", "auroc")
    assert f("silent", "completeness") == 0.0 and "purity" not in result.rows["silent"]
    assert f("silent", "auroc") == 0.5
    assert f("shrunk", "purity") == 1.0


def test_every_number_is_that_of_a_plain_count() -> None:
    sae = _sae(np.random.default_rng(3).normal(size=(10, D)), -0.1)
    _, rows = _run(it=sae)
    splits = split_documents(DOCUMENTS, 0)
    for concept in NAMES:
        row = rows["it"][concept]
        values, labels = [], []
        for batch, split in zip(_read_tokens(None, DOCUMENTS, None), splits, strict=True):
            if split == "test":
                values.append(sae.encode_dense(batch.x)[:, row.latent].numpy())
                labels += [concept in here for here in batch.concepts()]
        value, label = np.concatenate(values), np.array(labels)
        assert row.tokens == label.sum()
        assert _value(row, "completeness") == pytest.approx((label & (value > 0)).sum() / label.sum())
        assert _value(row, "purity") == pytest.approx((label & (value > 0)).sum() / (value > 0).sum())
        assert _value(row, "auroc") == pytest.approx(float(auroc(value, label)), abs=1e-6)
        assert all(i.low <= i.value <= i.high for i in row.metrics.values())


def test_detectors_are_those_of_plain_moments() -> None:
    result, _ = _run(it=_sae(np.eye(D)))
    splits = split_documents(DOCUMENTS, 0)
    x, labels = dict[str, list[np.ndarray]](), dict[str, list[bool]]()
    for batch, split in zip(_read_tokens(None, DOCUMENTS, None), splits.tolist(), strict=True):
        x.setdefault(split, []).append(batch.x.double().numpy())
        labels.setdefault(split, []).extend("drug" in here for here in batch.concepts())
    rows, there = (
        {split: np.concatenate(v) for split, v in x.items()},
        {s: np.array(v) for s, v in labels.items()},
    )
    chosen, label = rows["select"], there["select"]
    gap = chosen[label].mean(axis=0) - chosen[~label].mean(axis=0)
    covariance = np.cov(chosen.T, bias=True)
    ridge = 1e-3 * np.trace(covariance) / D * np.eye(D)
    mean = {name: [] for name in ("DiffMean", "linear probe")}
    for name, direction in (("DiffMean", gap), ("linear probe", np.linalg.solve(covariance + ridge, gap))):
        fit, test = (
            (rows[s] - chosen.mean(axis=0)) @ (direction / np.linalg.norm(direction)) for s in ("fit", "test")
        )
        f1 = [
            2 * ((fit >= bar) & there["fit"]).sum() / ((fit >= bar).sum() + there["fit"].sum()) for bar in fit
        ]
        lowest = fit[int(np.argmax(f1))]
        fires = test >= (lowest + fit[fit < lowest].max()) / 2
        mean[name] = [
            (fires & there["test"]).sum() / fires.sum(),
            (fires & there["test"]).sum() / there["test"].sum(),
            float(auroc(test, there["test"])),
        ]
    columns = result.details["detectors"]
    for name, wanted in mean.items():
        found = [columns[name]["drug"][m] for m in ("purity", "completeness", "auroc")]
        assert found == pytest.approx(wanted, abs=1e-6), name


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 30))
def test_the_bar_is_the_one_with_the_best_f1(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    scores, label = rng.integers(0, 6, n).astype(np.float64), rng.random(n) < 0.5

    def f1(bar: float) -> float:
        fires = scores >= bar
        return 2 * (fires & label).sum() / max(fires.sum() + label.sum(), 1)

    assert f1(best_bar(scores, label)) == pytest.approx(max(f1(bar) for bar in scores))


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 10**6))
def test_the_null_is_the_one_of_the_statistics(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = np.maximum(rng.normal(size=(30, 7)), 0)
    labels = rng.random((30, 3)) < 0.4
    labels[:, 2] = True
    latents = rng.integers(0, 7, size=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(concepts_module, "LATENTS_AT_ONCE", 3)
        found = best_latent_p_values(csc_array(scores), labels, latents, 40, seed)
    for c in range(2):
        null = max_statistic_null(scores, labels[:, c], permutations=40, seed=seed)
        expected = familywise_p_value(auroc(scores[:, latents[c]], labels[:, c]), null)
        assert found[c] == pytest.approx(float(expected))
    assert found[2] is None


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), m=st.integers(1, 5))
def test_latents_join_by_the_f1_of_any(seed: int, m: int) -> None:
    rng = np.random.default_rng(seed)
    fires, label = rng.random((25, m)) < 0.3, rng.random(25) < 0.4
    order = join_order(fires, label)
    assert sorted(order) == list(range(m)) and order[0] == 0

    def f1(columns: list[int]) -> float:
        joint = fires[:, columns].any(axis=1)
        return 2 * (joint & label).sum() / max(joint.sum() + label.sum(), 1)

    for step in range(1, m):
        best = max(f1([*order[:step], j]) for j in range(m) if j not in order[:step])
        assert f1(order[: step + 1]) == pytest.approx(best)


def test_rare_concepts_are_named_and_none_is_an_error() -> None:
    layout: Any = SimpleNamespace(layout=SimpleNamespace(width=lambda site: D))
    sae = {"it": _sae(np.eye(D))}
    with pytest.raises(UserError, match="no concept stands in 10 of the 3 documents"):
        concepts(sae, (), layout, DOCUMENTS[:3], READING, 0)
    with pytest.raises(UserError, match="no document has the field concepts"):
        concepts(sae, (), layout, [Document.of_text(str(i)) for i in range(50)], READING, 0)
    once = [*DOCUMENTS[:-1], Document.of_text("drug1 rare", concepts=[(0, "rare", 6, 10), (0, "drug", 0, 5)])]
    result, _ = concepts(sae, (), layout, once, READING, 0, resamples=50)
    assert result.notes == ("left out, in fewer than 10 documents of a split: rare",)
