"""An evaluation as the result file of SAEBench's `core`, so that its tools can show ours beside theirs.

Our definitions stand under its names where they mean the same; what differs is listed in docs/EVALUATION.md.
It has no place for intervals, which are in `eval_result_unstructured`. A metric without a value is left out
and named there, never encoded as a number.
"""

from __future__ import annotations

import re
import time
from dataclasses import asdict
from typing import Any

import unbraid
from unbraid.evaluation.evaluate import Evaluation
from unbraid.manifest.identity import content_id
from unbraid.sae.base import SAE

RELEASE = "unbraid"

# Where each of our metrics stands there.
_PLACES: dict[str, dict[str, str]] = {
    "model_behavior_preservation": {
        "kl_div_score": "kl_score_zero",
        "kl_div_with_ablation": "kl_zero",
        "kl_div_with_sae": "kl_sae",
    },
    "model_performance_preservation": {
        "ce_loss_score": "recovered_zero",
        "ce_loss_with_ablation": "ce_zero",
        "ce_loss_with_sae": "ce_sae",
        "ce_loss_without_sae": "ce_clean",
    },
    "reconstruction_quality": {
        "explained_variance": "fvu",
        "explained_variance_legacy": "ev_legacy",
        "mse": "mse",
        "cossim": "cosine",
    },
    "shrinkage": {
        "l2_norm_in": "norm_in",
        "l2_norm_out": "norm_out",
        "l2_ratio": "l2_ratio",
        "relative_reconstruction_bias": "bias",
    },
    "sparsity": {"l0": "l0", "l1": "l1"},
    "misc_metrics": {
        "freq_over_1_percent": "dense_1",
        "freq_over_10_percent": "dense_10",
        "normalized_freq_over_1_percent": "dense_share_1",
        "normalized_freq_over_10_percent": "dense_share_10",
        "average_max_encoder_cosine_sim": "max_encoder_cosine",
        "average_max_decoder_cosine_sim": "max_decoder_cosine",
        "frac_alive": "dead",
    },
}
_LESS_THAN_ONE = ("explained_variance", "frac_alive")
"""What they count from the other end: 1 minus ours."""
_DETAILS = {
    "encoder_bias": "encoder_bias",
    "encoder_norm": "encoder_norm",
    "encoder_decoder_cosine_sim": "encoder_decoder_cosine",
    "max_decoder_cosine_sim": "max_decoder_cosine",
    "max_encoder_cosine_sim": "max_encoder_cosine",
}


def file_name(sae_id: str, release: str = RELEASE) -> str:
    """{release}_{sae_id}_eval_results.json, without what a file cannot be called."""
    return f"{release}_{re.sub(r'[^0-9A-Za-z.-]+', '-', sae_id).strip('-.') or 'sae'}_eval_results.json"


def core(found: Evaluation, sae: SAE, sae_id: str, release: str = RELEASE) -> dict[str, Any]:
    """The result file's content, JSON values."""
    metrics: dict[str, dict[str, float | int]] = {}
    for group, places in _PLACES.items():
        metrics[group] = {}
        for theirs, ours in places.items():
            if ours in found.metrics:
                value = found.metrics[ours].value
                metrics[group][theirs] = 1 - value if theirs in _LESS_THAN_ONE else value
    metrics["token_stats"] = {
        "total_tokens_eval_reconstruction": found.tokens,
        "total_tokens_eval_sparsity_variance": found.tokens,
    }
    counts, geometry = found.details.latents, found.details.geometry
    fired, windows = counts.fired.tolist(), counts.windows.tolist()
    columns = {theirs: geometry[ours].tolist() for theirs, ours in _DETAILS.items() if ours in geometry}
    details = [
        {
            "index": j,
            "feature_density": density,
            # Firings in a window where it fires at all; 0 for a latent that never does.
            "consistent_activation_heuristic": fired[j] / windows[j] if windows[j] else 0.0,
            **{name: column[j] for name, column in columns.items()},
        }
        for j, density in enumerate(counts.density.tolist())
    ]
    record = found.as_dict()
    return {
        "eval_type_id": "core",
        "eval_config": {
            "model_name": found.model,
            "context_size": found.context,
            "exclude_special_tokens_from_reconstruction": True,
            "compute_kl": True,
            "compute_ce_loss": True,
            "compute_l2_norms": True,
            "compute_sparsity_metrics": True,
            "compute_variance_metrics": True,
            "compute_featurewise_density_statistics": True,
            "compute_featurewise_weight_based_metrics": True,
        },
        "eval_id": content_id(record),
        "datetime_epoch_millis": int(time.time() * 1000),
        "eval_result_metrics": metrics,
        "eval_result_details": details,
        "sae_bench_commit_hash": f"not run, written by unbraid {unbraid.__version__}",
        "sae_lens_id": sae_id,
        "sae_lens_release_id": release,
        "sae_lens_version": "not run",
        "sae_cfg_dict": {**asdict(sae.config), "options": dict(sae.config.options)},
        "eval_result_unstructured": record,
    }
