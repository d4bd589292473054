"""SAELens's folder: cfg.json and sae_weights.safetensors (versions 6, and 5 for reading).

Weights: W_enc (d_in, d_sae), b_enc (d_sae,), W_dec (d_sae, d_out), b_dec (d_out,), for JumpReLU also
threshold (d_sae,), for Gated b_gate, b_mag and r_mag, for skip transcoders W_skip (d_out, d_in). What
SAELens has no place for stands beside them: a TopK autoencoder's measured thresholds in
thresholds.safetensors. SAELens is the default export: its own loader reads what is written here.
Architectures that SAELens does not have are written alike, under our names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save as to_bytes

from unbraid.manifest.errors import IntegrityError, UserError
from unbraid.manifest.files import write_bytes, write_json
from unbraid.model.sites import Site
from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.formats.files import read_json, read_safetensors
from unbraid.sae.formats.folds import Found, State, scale_input, unit_decoder
from unbraid.sae.formats.table import assemble, shapes
from unbraid.sae.matching_pursuit import MatchingPursuitOptions
from unbraid.sae.options import check_options, plain
from unbraid.sae.registry import ARCHITECTURES

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
THRESHOLDS = "thresholds.safetensors"
SCALE = "activation_scaler.json"
"""What a training checkpoint of SAELens keeps beside weights that expect scaled activations."""
SAELENS_VERSION = "6.54.12"
"""The version whose format is written; its loader takes anything below 6 for the older format."""


@dataclass(frozen=True)
class Form:
    """How one architecture is called and stored."""

    theirs: str
    """Its name in cfg.json."""
    tensors: tuple[str, ...]
    """Tensors in the weights file, by our names."""
    renamed: Mapping[str, str] = field(default_factory=dict[str, str])
    """Their names where they differ from ours."""


_COMMON = ("W_enc", "b_enc", "W_dec", "b_dec")
_JUMP = (*_COMMON, "threshold")
FORMS: dict[str, Form] = {
    "topk": Form("topk", _COMMON),
    "relu": Form("standard", _COMMON),
    "jumprelu": Form("jumprelu", _JUMP),
    "gated": Form("gated", (*_COMMON, "b_mag", "r_mag"), {"b_enc": "b_gate"}),
    "matching_pursuit": Form("matching_pursuit", ("W_dec", "b_dec")),
    "jumprelu_transcoder": Form("jumprelu_transcoder", _JUMP),
    "jumprelu_skip_transcoder": Form("jumprelu_skip_transcoder", (*_JUMP, "W_skip")),
}
READ_AS = {"transcoder": "jumprelu_transcoder", "skip_transcoder": "jumprelu_skip_transcoder"}
"""Their transcoders fire where the pre-activation exceeds 0: thresholds of 0."""
FOLDED = ("topk", "relu", "jumprelu")
"""Architectures for which a constant scale of the input folds into W_enc, W_dec and b_dec."""
PURSUIT = ("residual_threshold", "stop_on_duplicate_support")
"""Options of matching pursuit, fields of cfg.json by the same names."""


def form_of(architecture: str) -> Form:
    """How an architecture is stored: the table's row, or all its tensors under our names."""
    if architecture in FORMS:
        return FORMS[architecture]
    return Form(architecture, ())


def save(sae: SAE, folder: Path) -> None:
    """Write an autoencoder into `folder`, which is made if it is missing; every file is replaced atomically.

    Raises UserError for an architecture that only exists during training (BatchTopK: give it its
    threshold first).
    """
    config = sae.config
    if sae.training_only:
        raise UserError(f"architecture {config.architecture!r} cannot be saved; give it its threshold first")
    form = form_of(config.architecture)
    state = {name: tensor.detach().contiguous().cpu() for name, tensor in sae.state_dict().items()}
    names = form.tensors or tuple(state)
    write_bytes(folder / WEIGHTS, to_bytes({form.renamed.get(name, name): state[name] for name in names}))
    if "threshold" in state and "threshold" not in names:
        write_bytes(folder / THRESHOLDS, to_bytes({"threshold": state["threshold"]}))
    write_json(folder / CONFIG, _record(config, form))


def load(folder: Path) -> SAE:
    """Read an autoencoder in SAELens's format.

    Raises UserError, naming the file and field, when the folder has none or it is of a kind that is not
    supported, and IntegrityError when a file is cut off or its tensors do not fit the configuration.
    """
    record = _modern(read_json(folder / CONFIG))
    config = _config(record, folder / CONFIG)
    form = form_of(config.architecture)
    weights = read_safetensors(folder / WEIGHTS)
    if record["architecture"] in READ_AS:
        weights.setdefault("threshold", torch.zeros(config.d_sae))
    names = form.tensors or tuple(shapes(config, folder / CONFIG))
    theirs = {name: form.renamed.get(name, name) for name in names}
    missing = [name for name in theirs.values() if name not in weights]
    if missing:
        raise IntegrityError(f"{folder / WEIGHTS} lacks the tensor {missing[0]}; fetch or make it again")
    state = {ours: weights[name].float() for ours, name in theirs.items()}
    if "threshold" not in names and (folder / THRESHOLDS).is_file():
        state["threshold"] = read_safetensors(folder / THRESHOLDS)["threshold"]

    def fold(state: State) -> None:
        _fold_normalisation(state, record, config, folder)
        if record.get("rescale_acts_by_decoder_norm"):
            unit_decoder(state)

    return assemble(config, state, folder / WEIGHTS, fold)


def _fold_normalisation(state: State, record: dict[str, Any], config: SAEConfig, folder: Path) -> None:
    """Fold a constant scale of the input into the weights, as SAELens does at the end of training.

    Raises UserError where the scale is not in the folder, and for normalisations that are not constant.
    """
    how = record.get("normalize_activations")
    if how in (None, False, "none"):
        return
    if how not in (True, "expected_average_only_in"):
        raise UserError(
            f"{folder / CONFIG}: normalize_activations is {how!r}, which is not one constant scale; such "
            "an autoencoder is not supported"
        )
    if config.architecture not in FOLDED:
        raise UserError(
            f"{folder / CONFIG}: normalize_activations is {how!r}, which is supported for "
            f"{', '.join(FOLDED)} alone; fold the scale into the weights with SAELens first"
        )
    if not (folder / SCALE).is_file():
        raise UserError(
            f"{folder / CONFIG}: normalize_activations is {how!r} but {SCALE} with the scale is missing; "
            "fold the scale into the weights with SAELens first"
        )
    scale = read_json(folder / SCALE)
    scale_input(state, Found(folder / WEIGHTS, folder / SCALE, {}, scale).number("scaling_factor"))


def _record(config: SAEConfig, form: Form) -> dict[str, Any]:
    """What stands in cfg.json."""
    metadata = {
        **config.metadata,
        "sae_lens_version": SAELENS_VERSION,
        "model_name": config.model_name,
        "model_id": config.model_id,
        "hook_name": _hook_name(config.site),
        "site": config.site,
    }
    if config.target_site:
        metadata |= {"hook_name_out": _hook_name(config.target_site), "target_site": config.target_site}
    if config.blocks:
        metadata["blocks"] = list(config.blocks)
    if config.options:
        metadata["options"] = dict(config.options)
    record: dict[str, Any] = {
        "architecture": form.theirs,
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": config.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata,
    }
    if config.d_out:
        record["d_out"] = config.d_out
    if form.theirs == "topk":
        record |= {"k": config.k, "rescale_acts_by_decoder_norm": False}
    elif form.theirs == "matching_pursuit":
        options = plain(check_options(MatchingPursuitOptions, config.options, form.theirs))
        record |= {"max_iterations": config.k, **{name: options[name] for name in PURSUIT}}
    elif config.architecture not in FORMS and config.k:
        record["k"] = config.k
    return record


def _hook_name(site: str) -> str:
    """TransformerLens' name of a site, with commas where they are several; a name that we do not know, from a
    foreign file, stays as it is.
    """
    try:
        return ",".join(Site.parse(name).transformer_lens for name in site.split(",")) if site else ""
    except UserError:
        return site


def _config(record: dict[str, Any], path: Path) -> SAEConfig:
    theirs = str(record.get("architecture"))
    ours = {form.theirs: name for name, form in FORMS.items()} | READ_AS
    ours |= {
        name: name for name, kind in ARCHITECTURES.items() if name not in ours and not kind.training_only
    }
    if theirs not in ours:
        raise UserError(
            f"{path}: architecture {theirs!r} is not supported; it must be one of {', '.join(ours)}"
        )
    metadata = cast("dict[str, Any]", record.get("metadata") or {})
    known = {"model_name", "model_id", "site", "hook_name", "sae_lens_version"}
    known |= {"target_site", "hook_name_out", "blocks", "options"}
    try:
        options = dict(metadata.get("options") or {})
        k = int(record.get("k") or 0)
        if theirs == "matching_pursuit":
            options |= {name: record[name] for name in PURSUIT}
            k = min(int(record.get("max_iterations") or record["d_in"]), int(record["d_sae"]))
        return SAEConfig(
            architecture=ours[theirs],
            d_in=int(record["d_in"]),
            d_sae=int(record["d_sae"]),
            k=k if ARCHITECTURES[ours[theirs]].uses_k else 0,
            site=str(metadata.get("site") or metadata.get("hook_name") or ""),
            model_name=str(metadata.get("model_name") or ""),
            model_id=str(metadata.get("model_id") or ""),
            apply_b_dec_to_input=bool(record.get("apply_b_dec_to_input", True)),
            metadata={name: value for name, value in metadata.items() if name not in known},
            d_out=int(record.get("d_out") or 0),
            target_site=str(metadata.get("target_site") or metadata.get("hook_name_out") or ""),
            blocks=tuple(int(size) for size in metadata.get("blocks") or ()),
            options=options,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} lacks a field or has a wrong one ({error}); mend it or fetch it again"
        ) from error


def _modern(record: dict[str, Any]) -> dict[str, Any]:
    """A configuration from before version 6 in today's words; today's unchanged."""
    if "metadata" in record:
        return record
    record = dict(record)
    kwargs = cast("dict[str, Any]", record.get("activation_fn_kwargs") or {})
    function = record.get("activation_fn_str") or record.get("activation_fn") or "relu"
    if function == "topk" and "k" in kwargs:
        record |= {"architecture": "topk", "k": kwargs["k"]}
    elif function != "relu":
        record["architecture"] = str(function)
    record.setdefault("architecture", "standard")
    names = ("model_name", "hook_name", "context_size", "dataset_path", "prepend_bos")
    record["metadata"] = {name: record[name] for name in names if name in record}
    record["metadata"].setdefault("hook_name", record.get("hook_point"))
    return record
