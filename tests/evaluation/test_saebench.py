"""The result file has SAEBench's shape: every key that it asks for, of the type that it asks for."""

from __future__ import annotations

import json
from typing import Any

import pytest

from unbraid.activations.documents import Document
from unbraid.evaluation.evaluate import evaluate
from unbraid.evaluation.saebench import core, file_name
from unbraid.model.load import LanguageModel
from unbraid.sae.base import SAE

NUMBERS = {
    "model_behavior_preservation": "kl_div_score kl_div_with_ablation kl_div_with_sae",
    "model_performance_preservation": (
        "ce_loss_score ce_loss_with_ablation ce_loss_with_sae ce_loss_without_sae"
    ),
    "reconstruction_quality": "explained_variance explained_variance_legacy mse cossim",
    "shrinkage": "l2_norm_in l2_norm_out l2_ratio relative_reconstruction_bias",
    "sparsity": "l0 l1",
    "token_stats": "total_tokens_eval_reconstruction total_tokens_eval_sparsity_variance",
    "misc_metrics": (
        "freq_over_1_percent freq_over_10_percent normalized_freq_over_1_percent "
        "normalized_freq_over_10_percent average_max_encoder_cosine_sim average_max_decoder_cosine_sim "
        "frac_alive"
    ),
}
DETAILS = [
    "index",
    "feature_density",
    "consistent_activation_heuristic",
    "encoder_bias",
    "encoder_norm",
    "encoder_decoder_cosine_sim",
    "max_decoder_cosine_sim",
    "max_encoder_cosine_sim",
]
TOP: dict[str, type] = {
    "eval_type_id": str,
    "eval_config": dict,
    "eval_id": str,
    "datetime_epoch_millis": int,
    "eval_result_metrics": dict,
    "eval_result_details": list,
    "sae_bench_commit_hash": str,
    "sae_lens_id": str,
    "sae_lens_release_id": str,
    "sae_lens_version": str,
    "sae_cfg_dict": dict,
    "eval_result_unstructured": dict,
}


def _read(record: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(record, allow_nan=False))


def test_the_file_has_the_schema_s_shape(sae: SAE, lm: LanguageModel, documents: list[Document]) -> None:
    found = evaluate(sae, lm, documents)
    record = _read(core(found, sae, "mine"))
    assert {name: type(value) for name, value in record.items()} == TOP
    assert record["eval_type_id"] == "core" and record["sae_lens_id"] == "mine"
    metrics = record["eval_result_metrics"]
    assert {group: set(values) for group, values in metrics.items()} == {
        group: set(names.split()) for group, names in NUMBERS.items()
    }
    assert all(type(v) in (int, float) for values in metrics.values() for v in values.values())
    details = record["eval_result_details"]
    assert [one["index"] for one in details] == list(range(sae.config.d_sae))
    assert all(set(one) == set(DETAILS) for one in details)
    value = {name: m.value for name, m in found.metrics.items()}
    quality, misc = metrics["reconstruction_quality"], metrics["misc_metrics"]
    assert quality["explained_variance"] == pytest.approx(1 - value["fvu"])
    assert quality["cossim"] == value["cosine"] and misc["frac_alive"] == pytest.approx(1 - value["dead"])
    kept = metrics["model_performance_preservation"]
    by_hand = (kept["ce_loss_with_ablation"] - kept["ce_loss_with_sae"]) / (
        kept["ce_loss_with_ablation"] - kept["ce_loss_without_sae"]
    )
    assert kept["ce_loss_score"] == pytest.approx(by_hand)
    alive = sum(one["feature_density"] > 0 for one in details) / len(details)
    assert misc["frac_alive"] == pytest.approx(alive)
    assert record["eval_result_unstructured"]["metrics"]["fvu"] == found.metrics["fvu"].as_dict()


def test_what_has_no_value_is_left_out_and_named(
    sae: SAE, lm: LanguageModel, documents: list[Document]
) -> None:
    from copy import deepcopy

    silent = deepcopy(sae)
    silent.b_enc.data.fill_(-1e6)
    silent.b_dec.data.zero_()
    record = _read(core(evaluate(silent, lm, documents), silent, "silent"))
    assert "relative_reconstruction_bias" not in record["eval_result_metrics"]["shrinkage"]
    assert "no part along" in record["eval_result_unstructured"]["undefined"]["bias"]
    assert record["eval_result_details"][0]["consistent_activation_heuristic"] == 0


def test_the_file_s_name_has_no_path_in_it() -> None:
    assert file_name("layers.2-k32") == "unbraid_layers.2-k32_eval_results.json"
    assert file_name("../a b/c") == "unbraid_a-b-c_eval_results.json"
    assert file_name("///") == "unbraid_sae_eval_results.json"
