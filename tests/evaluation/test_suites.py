"""Suites by name, beside what each finds alone; baselines; and SAEBench's shape."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from unbraid.activations.documents import Document
from unbraid.evaluation.baselines import (
    principal_components,
    random_directions,
    unit_directions,
    untrained,
    without_training,
)
from unbraid.evaluation.labelled import SuiteResult
from unbraid.evaluation.saebench_suites import (
    absorption_results,
    scr_results,
    sparse_probing_results,
    tpp_results,
)
from unbraid.evaluation.suites import DEFINITIONS, run_suites
from unbraid.manifest.errors import UserError
from unbraid.model.load import LanguageModel
from unbraid.sae.base import SAE
from unbraid.sae.registry import build
from unbraid.stats.bootstrap import Interval

FIELDS = {
    "eval_type_id", "eval_config", "eval_id", "datetime_epoch_millis", "eval_result_metrics",
    "eval_result_details", "sae_bench_commit_hash", "sae_lens_id", "sae_lens_release_id", "sae_lens_version",
    "sae_cfg_dict", "eval_result_unstructured",
}  # fmt: skip
ABOUT = {"release": "mine", "sae_id": "one", "seed": 0, "millis": 1}


@pytest.fixture(scope="module")
def told() -> list[Document]:
    """Three kinds of texts, each with a label and with the place of the words that make it that kind; a
    second label is what they end with."""
    words = ("red ball", "two tablets", "delayed package")
    found: list[Document] = []
    for i in range(360):
        word, end = words[i % 3], ("water", "pan")[i // 3 % 2]
        text = f"the {word} was {i} {end}"
        span = (0, word, 4, 4 + len(word))
        labels = {"what": str(i % 3), "end": end}
        found.append(Document.of_text(text, labels=labels, concepts=[span]))
    return found


@pytest.fixture(scope="module")
def results(lm: LanguageModel, sae: SAE, told: list[Document]) -> dict[str, SuiteResult]:
    other = build(sae.config)
    other.load_state_dict({**sae.state_dict(), "W_dec": sae.W_dec.flip(0)})
    saes = {"one": sae, "two": other.requires_grad_(False)}
    names = ("stability", "concepts", "scr", "tpp", "probing")
    found = run_suites(names, saes, lm, told)
    assert [result.suite for result in found] == list(names)
    return {result.suite: result for result in found}


def test_every_metric_of_every_suite_has_a_definition_of_its_own(results: dict[str, SuiteResult]) -> None:
    ids = [d.id for metrics in DEFINITIONS.values() for d in metrics.values()]
    assert len(ids) == len(set(ids))
    for suite, result in results.items():
        assert result.site == "layers.1.resid_post"
        assert set(result.baselines) < set(result.rows)
        for row in result.rows.values():
            assert set(row) <= set(DEFINITIONS[suite])
            assert all(np.isfinite([i.value, i.low, i.high]).all() for i in row.values())
        json.dumps(result.as_dict(), allow_nan=False)


def test_an_autoencoder_and_its_floors_stand_in_each_table(results: dict[str, SuiteResult]) -> None:
    floor = "untrained topk 96 k=24"
    assert {"one", "two", floor, "neurons", "PCA", "DiffMean", "predict none"} < set(results["probing"].rows)
    like = {
        f"{kind} like {name}" for kind in ("neurons", "PCA", "random directions") for name in ("one", "two")
    }
    beside = {"DiffMean", "linear probe", "predict none"}
    assert set(results["concepts"].rows) == {"one", "two", floor} | like | beside
    for suite in ("tpp", "scr"):
        assert {"neurons", "PCA", "random directions", "DiffMean", "ablate none", "probe direction"} < set(
            results[suite].rows
        )
    (row,) = (name for name in results["stability"].rows if name not in results["stability"].baselines)
    assert results["stability"].rows[row]["pw_mcc"].value == pytest.approx(1, abs=1e-5)  # reordered latents
    # The planted words are the tokens of these texts, which one activation tells apart.
    assert results["concepts"].rows["DiffMean"]["auroc"].value > 0.8


def test_what_does_not_exist_is_refused(lm: LanguageModel, sae: SAE, told: list[Document]) -> None:
    with pytest.raises(UserError, match="no suite 'probe'; choose among probing, tpp"):
        run_suites(["probe"], {"one": sae}, lm, told)
    with pytest.raises(UserError, match="no autoencoder"):
        run_suites(["probing"], {}, lm, told)
    with pytest.raises(UserError, match="no label divides the 3 documents"):
        run_suites(["probing"], {"one": sae}, lm, told[:3])
    with pytest.raises(UserError, match="there are no positions 'some'"):
        run_suites(["probing"], {"one": sae}, lm, told, positions="some")  # type: ignore[arg-type]


def test_sparse_probing_and_tpp_have_saebenchs_fields(results: dict[str, SuiteResult], sae: SAE) -> None:
    probing = sparse_probing_results(results["probing"], "one", sae, **ABOUT)  # type: ignore[arg-type]
    tpp = tpp_results(results["tpp"], "one", sae, **ABOUT)  # type: ignore[arg-type]
    for found, kind in ((probing, "sparse_probing"), (tpp, "tpp")):
        assert set(found) == FIELDS and found["eval_type_id"] == kind
        json.dumps(found, allow_nan=False)
        assert found["eval_result_unstructured"]["intervals"]["one"]
    metrics = probing["eval_result_metrics"]
    assert set(metrics) == {"llm", "sae"}
    for side in ("llm", "sae"):
        assert set(metrics[side]) == {f"{side}_test_accuracy"} | {
            f"{side}_top_{k}_test_accuracy" for k in (1, 2, 5)
        }
    expected = results["probing"].rows["one"]["probe_top_5"].value
    assert metrics["sae"]["sae_top_5_test_accuracy"] == expected
    assert {d["dataset_name"] for d in probing["eval_result_details"]} == {
        "end=water", "what=0", "what=1", "what=2",
    }  # fmt: skip
    assert set(tpp["eval_result_metrics"]["tpp_metrics"]) == {
        f"tpp_threshold_{n}_{part}"
        for n in (2, 5, 10, 20, 50)
        for part in ("total_metric", "intended_diff_only", "unintended_diff_only")
    }


def test_scr_has_saebenchs_fields(results: dict[str, SuiteResult], sae: SAE) -> None:
    found = scr_results(results["scr"], "one", sae, **ABOUT)  # type: ignore[arg-type]
    assert set(found) == FIELDS and found["eval_type_id"] == "scr"
    json.dumps(found, allow_nan=False)
    metrics = found["eval_result_metrics"]["scr_metrics"]
    known = {f"scr_{p}_threshold_{n}" for n in (2, 5, 10, 20, 50) for p in ("metric", "dir1", "dir2")}
    assert {f"scr_metric_threshold_{n}" for n in (2, 5, 10, 20, 50)} <= set(metrics) <= known
    assert metrics["scr_metric_threshold_5"] == results["scr"].rows["one"]["scr_metric_threshold_5"].value
    (pair,) = found["eval_result_details"]  # of what the first two of three values
    assert pair["dataset_name"] == "end=water × what=1" and set(pair) - {"dataset_name"} <= known
    assert "one: random latents" in found["eval_result_unstructured"]["baselines"]


def test_neither_order_nor_batches_nor_company_change_a_row(
    lm: LanguageModel, sae: SAE, told: list[Document], results: dict[str, SuiteResult]
) -> None:
    names = ("concepts", "scr", "tpp", "probing")
    for found in run_suites(names, {"one": sae}, lm, told[::-1], batch_tokens=300):
        before = results[found.suite].rows
        for name, row in found.rows.items():
            assert row.keys() == before[name].keys(), (found.suite, name)
            for metric, now in row.items():
                then = before[name][metric]
                assert (now.value, now.low, now.high) == pytest.approx(
                    (then.value, then.low, then.high), rel=1e-6, abs=1e-6
                ), (found.suite, name, metric)


def test_absorption_has_saebenchs_fields(sae: SAE) -> None:
    names = ("absorption_fraction_score", "full_absorption_score", "num_split_features")
    row = {f"mean_{name}": Interval(0.5, 0.1, 0.9, 20) for name in names}
    letters = {
        f"first letter={a}": {"main": [1] * n, "words": 10, "full": 0.1 * n, "fraction": 0.2 * n}
        for a, n in (("a", 1), ("b", 3))
    }
    result = SuiteResult("absorption", {"one": row}, (), details={"letters": {"one": letters}})
    found = absorption_results(result, "one", sae, **ABOUT)  # type: ignore[arg-type]
    mean = found["eval_result_metrics"]["mean"]
    assert set(found) == FIELDS and found["eval_type_id"] == "absorption_first_letter"
    assert set(mean) == {f"{kind}_{name}" for kind in ("mean", "std_dev") for name in names}
    assert mean["std_dev_num_split_features"] == pytest.approx(2**0.5)
    details = found["eval_result_details"]
    assert [d["first_letter"] for d in details] == ["a", "b"]
    assert set(details[0]) == {
        "first_letter", "mean_absorption_fraction", "full_absorption_rate", "num_full_absorption",
        "num_probe_true_positives", "num_split_features",
    }  # fmt: skip
    assert [d["num_full_absorption"] for d in details] == [1, 3] and details[0][
        "num_probe_true_positives"
    ] == 10


@pytest.mark.parametrize("architecture", ["topk", "relu"])
def test_baselines_fire_as_often(sae: SAE, architecture: str) -> None:
    trained = build(replace(sae.config, architecture=architecture, k=24 if architecture == "topk" else 0))
    trained.load_state_dict({**sae.state_dict(), "b_enc": torch.full_like(sae.b_enc, -0.5)})
    trained.requires_grad_(False)
    x = torch.randn(600, sae.config.d_in, generator=torch.Generator().manual_seed(0)) + 0.1
    l0 = float(trained.encode(x).l0().double().mean())
    low = untrained(trained, x, 0)
    assert float(low.encode(x).l0().double().mean()) == pytest.approx(l0, rel=0.02)
    assert low.config.d_sae == sae.config.d_sae
    np.testing.assert_allclose(low.W_dec.norm(dim=1), 1, atol=1e-5)
    random = random_directions(trained, x, 0)
    rates = (trained.encode_dense(x) > 0).double().mean(dim=0)
    found = (random.encode_dense(x) > 0).double().mean(dim=0)
    below = rates < 0.4  # a direction fires at no more than about half of all tokens
    assert int(below.sum()) > 10
    np.testing.assert_allclose(found[below], rates[below], atol=0.01)


def test_directions_are_orthogonal_or_random() -> None:
    raw = np.random.default_rng(0).normal(size=(30, 5)) * np.array([5, 3, 1, 0.5, 0])
    found = principal_components(raw)
    assert found.shape == (5, 4)  # the last one does not vary
    np.testing.assert_allclose(found.T @ found, np.eye(4), atol=1e-10)
    assert abs(found[0, 0]) > 0.8 > abs(found[0, 1])
    np.testing.assert_allclose(np.linalg.norm(unit_directions(5, 7, 0), axis=0), 1)


def test_neurons_and_components_are_the_largest_coordinates(sae: SAE) -> None:
    x = torch.randn(400, sae.config.d_in, generator=torch.Generator().manual_seed(3)) @ torch.diag(
        torch.linspace(3, 0.1, sae.config.d_in)
    ) + 0.5  # fmt: skip
    found = without_training(sae, x)
    k = round(float(sae.encode(x).l0().double().mean()))
    centred = (x.double() - x.double().mean(dim=0)).numpy()
    _, vectors = np.linalg.eigh(np.cov(centred.T))
    for name, axes in (("neurons", np.eye(sae.config.d_in)), ("PCA", vectors)):
        along = centred @ axes
        kept = np.where(np.abs(along) >= np.sort(np.abs(along), axis=1)[:, [-k]], along, 0)
        wanted = kept @ axes.T + x.double().mean(dim=0).numpy()
        np.testing.assert_allclose(found[name](x).x_hat.numpy(), wanted, atol=2e-3, err_msg=name)
        assert found[name].config.d_sae == 2 * sae.config.d_in
