"""Results of the suites as SAEBench's JSON objects: its field names, our numbers.

Numbers that we do not measure are left out rather than made up; intervals, seeds and the hashes of our
definitions, which are not SAEBench's, go into `eval_result_unstructured`.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np

from unbraid import __version__
from unbraid.evaluation.definitions import Definition
from unbraid.evaluation.labelled import SuiteResult
from unbraid.evaluation.probing import CEILING, TOP
from unbraid.evaluation.suites import DEFINITIONS
from unbraid.sae.base import SAE

NEURONS = "neurons"


def sparse_probing_results(
    result: SuiteResult, row: str, sae: SAE, *, release: str, sae_id: str, seed: int, millis: int
) -> dict[str, Any]:
    """`sparse_probing` of one row: accuracies of the model's own dimensions (`llm`) and of the latents
    (`sae`)."""
    llm, own = result.rows[NEURONS], result.rows[row]
    metrics = {
        "llm": {"llm_test_accuracy": result.rows[CEILING]["probe_all"].value}
        | {f"llm_top_{k}_test_accuracy": llm[f"probe_top_{k}"].value for k in TOP},
        "sae": {"sae_test_accuracy": own["probe_all"].value}
        | {f"sae_top_{k}_test_accuracy": own[f"probe_top_{k}"].value for k in TOP},
    }
    by_task: Mapping[str, Mapping[str, Mapping[str, float]]] = result.details["tasks"]
    details = [
        {
            "dataset_name": task,
            "llm_test_accuracy": by_task[CEILING]["probe_all"][task],
            "sae_test_accuracy": by_task[row]["probe_all"][task],
            **{f"llm_top_{k}_test_accuracy": by_task[NEURONS][f"probe_top_{k}"][task] for k in TOP},
            **{f"sae_top_{k}_test_accuracy": by_task[row][f"probe_top_{k}"][task] for k in TOP},
        }
        for task in by_task[row]["probe_all"]
    ]
    return _object("sparse_probing", metrics, details, result, row, sae, release, sae_id, seed, millis)


def tpp_results(
    result: SuiteResult, row: str, sae: SAE, *, release: str, sae_id: str, seed: int, millis: int
) -> dict[str, Any]:
    """`tpp` of one row, at every threshold that was measured."""
    metrics = {"tpp_metrics": {name: interval.value for name, interval in result.rows[row].items()}}
    return _object("tpp", metrics, [], result, row, sae, release, sae_id, seed, millis)


def scr_results(
    result: SuiteResult, row: str, sae: SAE, *, release: str, sae_id: str, seed: int, millis: int
) -> dict[str, Any]:
    """`scr` of one row, at every threshold that was measured, and of each pair of labels."""
    metrics = {"scr_metrics": {name: interval.value for name, interval in result.rows[row].items()}}
    by_pair: Mapping[str, Mapping[str, float]] = result.details["pairs"][row]
    details = [{"dataset_name": pair, **found} for pair, found in by_pair.items()]
    return _object("scr", metrics, details, result, row, sae, release, sae_id, seed, millis)


def absorption_results(
    result: SuiteResult, row: str, sae: SAE, *, release: str, sae_id: str, seed: int, millis: int
) -> dict[str, Any]:
    """`absorption_first_letter` of one row: means and standard deviations over letters."""
    letters: Mapping[str, Mapping[str, Any]] = result.details["letters"][row]
    names = {
        "absorption_fraction_score": [found["fraction"] for found in letters.values()],
        "full_absorption_score": [found["full"] for found in letters.values()],
        "num_split_features": [len(found["main"]) for found in letters.values()],
    }
    metrics = {"mean": {f"mean_{name}": result.rows[row][f"mean_{name}"].value for name in names}}
    for name, values in names.items():
        if len(values) > 1:  # of one letter there is no deviation
            metrics["mean"][f"std_dev_{name}"] = float(np.std(values, ddof=1))
    details = [
        {
            "first_letter": task.partition("=")[2],
            "mean_absorption_fraction": found["fraction"],
            "full_absorption_rate": found["full"],
            "num_full_absorption": round(found["full"] * found["words"]),
            "num_probe_true_positives": found["words"],
            "num_split_features": len(found["main"]),
        }
        for task, found in letters.items()
    ]
    return _object(
        "absorption_first_letter", metrics, details, result, row, sae, release, sae_id, seed, millis
    )


def _object(
    kind: str,
    metrics: dict[str, Any],
    details: list[dict[str, Any]],
    result: SuiteResult,
    row: str,
    sae: SAE,
    release: str,
    sae_id: str,
    seed: int,
    millis: int,
) -> dict[str, Any]:
    definitions: Mapping[str, Definition] = DEFINITIONS[result.suite]
    rows = {
        name: {m: {**interval.as_dict(), "definition": definitions[m].id} for m, interval in found.items()}
        for name, found in result.rows.items()
        if name == row or name in result.baselines
    }
    config = sae.config
    return {
        "eval_type_id": kind,
        "eval_config": {"random_seed": seed, "site": result.site},
        # The same measurement has the same name, whenever it is written down.
        "eval_id": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{kind}/{release}/{sae_id}/{seed}/{rows}")),
        "datetime_epoch_millis": millis,
        "eval_result_metrics": metrics,
        "eval_result_details": details,
        "sae_bench_commit_hash": f"none: unbraid {__version__}",
        "sae_lens_id": sae_id,
        "sae_lens_release_id": release,
        "sae_lens_version": f"none: unbraid {__version__}",
        "sae_cfg_dict": {
            "architecture": config.architecture, "d_in": config.d_in, "d_sae": config.d_sae,
            "hook_name": config.site, "model_name": config.model_name, "dtype": config.dtype,
        },
        "eval_result_unstructured": {
            "seed": seed, "intervals": rows, "baselines": list(result.baselines),
            "detectable": dict(result.detectable), "notes": list(result.notes),
        },
    }  # fmt: skip
