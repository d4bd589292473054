"""Other tools' files, written here in their layout, against their formulas, in their layout too."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from unbraid.manifest.errors import IntegrityError, UserError
from unbraid.model.sites import Site
from unbraid.sae.base import SAE
from unbraid.sae.formats.detect import detect
from unbraid.sae.formats.foreign import FORMATS

D, F, K = 6, 16, 3
NORM = 7.0
"""Mean norm of the data, where a format stores one."""


def _weights() -> dict[str, Tensor]:
    """E (d, F), e (F,), W (F, d) with rows of unequal length, b (d,), t (F,) above 0, S (d, d); always the
    same.
    """
    g = torch.Generator().manual_seed(3)
    w = {"E": (D, F), "e": (F,), "W": (F, D), "b": (D,), "t": (F,), "S": (D, D)}
    out = {name: torch.randn(shape, generator=g) for name, shape in w.items()}
    return {**out, "t": out["t"].abs() / 2 + 0.05}


P = _weights()


def _x() -> Tensor:
    return 2 * torch.randn(60, D, generator=torch.Generator().manual_seed(4))


def _top(p: Tensor) -> Tensor:
    values, indices = p.topk(K, dim=-1)
    return torch.zeros_like(p).scatter(-1, indices, values.relu())


def _jump(p: Tensor, threshold: Tensor | float) -> Tensor:
    return p.relu() * (p > threshold)


def _put(folder: Path, tensors: Mapping[str, Any], weights: str, config: Any = None, name: str = "") -> Path:
    """Write a tool's files and return the folder."""
    path = folder / weights
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({n: t.contiguous() for n, t in tensors.items()}, path)
    elif path.suffix == ".npz":
        np.savez(path, **{n: t.numpy() for n, t in tensors.items()})
    else:
        torch.save(OrderedDict(tensors), path)
    if config is not None:
        (folder / name).write_text(json.dumps(config))
    return folder


LINEAR = {"encoder.weight": P["E"].T, "encoder.bias": P["e"], "decoder.weight": P["W"].T, "b_dec": P["b"]}
MATRICES = {"W_enc": P["E"], "b_enc": P["e"], "W_dec": P["W"], "b_dec": P["b"]}
CENTRED = (_x() - P["b"]) @ P["E"] + P["e"]
PLAIN = _x() @ P["E"] + P["e"]
LENGTHS = P["W"].norm(dim=1)


def _dictionary(folder: Path, kind: str, tensors: Mapping[str, Any]) -> Path:
    trainer = {"dict_class": kind, "activation_dim": D, "dict_size": F, "k": K, "layer": 2, "lm_name": "tiny"}
    trainer["submodule_name"] = "resid_post_layer_2"
    return _put(folder, tensors, "ae.pt", {"trainer": trainer, "buffer": {"ctx_len": 8}}, "config.json")


def _llama(folder: Path, **changes: Any) -> Path:
    config = {
        "d_model": D,
        "d_sae": F,
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.4,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": NORM, "out": NORM},
        "apply_decoder_bias_to_pre_encoder": False,
        "sparsity_include_decoder_norm": True,
        "use_glu_encoder": False,
        "hook_point_in": "blocks.2.hook_resid_post",
        "hook_point_out": "blocks.2.hook_resid_post",
        "top_k": K,
    } | changes
    tensors = {**LINEAR, "decoder.bias": P["b"]}
    del tensors["b_dec"]
    return _put(folder, tensors, "checkpoints/final.safetensors", config, "hyperparams.json")


def _llama_codes(act_fn: str) -> Tensor:
    """As its loader does: raw units, rows of length 1, then one threshold."""
    scale = math.sqrt(D) / NORM
    p = ((_x() * scale) @ P["E"] + P["e"]) / scale * LENGTHS
    return {"jumprelu": _jump(p, 0.4), "topk": _top(p), "relu": p.relu()}[act_fn]


def _scopium(folder: Path, act_fn: str, **changes: Any) -> Path:
    hook = "blocks.2.hook_resid_post"
    config = {
        "sae_type": "sae",
        "d_model": D,
        "expansion_factor": F / D,
        "act_fn": act_fn,
        "top_k": K,
        "norm_activation": "dataset-wise",
        "sparsity_include_decoder_norm": True,
        "hook_point_in": hook,
        "hook_point_out": hook,
    } | changes
    tensors = {"W_E": P["E"], "b_E": P["e"], "W_D": P["W"], "b_D": P["b"]}
    tensors[f"dataset_average_activation_norm.{hook}"] = torch.tensor(NORM)
    if act_fn == "jumprelu":
        tensors["activation_function.log_jumprelu_threshold"] = P["t"].log()
    return _put(folder, tensors, "sae_weights.safetensors", config, "config.json")


def _early_scopium(folder: Path) -> Path:
    """Version 1: linear layers, the threshold at the top, and a choice about centring."""
    hook = "dataset_average_activation_norm.blocks.2.hook_resid_post"
    _scopium(folder, "jumprelu", apply_decoder_bias_to_pre_encoder=False)
    tensors = {
        **LINEAR,
        "decoder.bias": P["b"],
        hook: torch.tensor(NORM),
        "log_jumprelu_threshold": P["t"].log(),
    }
    del tensors["b_dec"]
    return _put(folder, tensors, "sae_weights.safetensors")


def _scopium_codes(act_fn: str) -> tuple[Tensor, Tensor]:
    """Its encode and decode on scaled input; codes in raw units times their row's length."""
    scale = math.sqrt(D) / NORM
    p = (_x() * scale) @ P["E"] + P["e"]
    gate = {"relu": p > 0, "topk": _top(p * LENGTHS) > 0, "jumprelu": p * LENGTHS > P["t"]}[act_fn]
    f = p.relu() * gate
    return f * LENGTHS / scale, (f @ P["W"] + P["b"]) / scale


SITES = ("blocks.1.hook_resid_post", "blocks.2.hook_resid_post")
STACKED = {  # two sites of D / 2 dimensions, each with a part of the encoder's bias of its own
    "W_E": P["E"].view(2, D // 2, F),
    "b_E": torch.stack([P["e"], P["t"]]),
    "W_D": P["W"].view(F, 2, D // 2).transpose(0, 1),
    "b_D": P["b"].view(2, D // 2),
}


def _scopium_crosscoder(
    folder: Path, tensors: Mapping[str, Tensor] = STACKED, norms: tuple[float, float] = (NORM, 3.0), **to: Any
) -> Path:
    config = {
        "sae_type": "crosscoder",
        "d_model": D // 2,
        "expansion_factor": F / (D // 2),
        "act_fn": "relu",
        "top_k": K,
        "norm_activation": "dataset-wise",
        "sparsity_include_decoder_norm": True,
        "hook_points": SITES,
    } | to
    stored = {
        f"dataset_average_activation_norm.{s}": torch.tensor(n) for s, n in zip(SITES, norms, strict=True)
    }
    return _put(folder, {**tensors, **stored}, "sae_weights.safetensors", config, "config.json")


def _scopium_crosscoder_codes(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Its encode and decode of sites scaled by `scale` (2,): what is gated at each site is the sum over all
    times the length of the decoder row there. Codes in units of the mean scale.
    """
    W_E, b_E, W_D, b_D = (STACKED[name] for name in ("W_E", "b_E", "W_D", "b_D"))
    x = _x().view(-1, 2, D // 2) * scale[:, None]
    p = (torch.einsum("nsd,sdf->nsf", x, W_E) + b_E).sum(dim=1, keepdim=True)
    lengths = W_D.norm(dim=2)
    f = (p * lengths).relu() / lengths  # (n, 2, F)
    torch.testing.assert_close(f[:, 0], f[:, 1])
    x_hat = (torch.einsum("nsf,sfd->nsd", f, W_D) + b_D) / scale[:, None]
    return f[:, 0] / scale.mean(), x_hat.flatten(1)


def _sparsify(folder: Path, hookpoint: str = "layers.2", **changes: Any) -> Path:
    config = {
        "activation": "topk",
        "expansion_factor": 32,
        "normalize_decoder": True,
        "num_latents": F,
        "k": K,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": D,
    } | changes
    tensors = {**LINEAR, "W_dec": P["W"]} | ({"W_skip": P["S"].T} if config["skip_connection"] else {})
    del tensors["decoder.weight"]
    return _put(folder / hookpoint, tensors, "sae.safetensors", config, "cfg.json")


def _opensae(folder: Path, **changes: Any) -> Path:
    config = {"architectures": ["OpenSae"], "hidden_size": D, "feature_size": F, "k": K, "activation": "topk"}
    config |= {"input_normalize": False, "input_hookpoint": "layers.2", "output_hookpoint": "layers.2"}
    tensors = {**LINEAR, "W_dec": P["W"]}
    del tensors["decoder.weight"]
    return _put(folder, tensors, "model.safetensors", config | changes, "config.json")


def _gemma(folder: Path, kind: str) -> Path:
    place = folder / f"gemma-scope-2b-pt-{kind}/layer_2/width_16k/average_l0_9"
    return _put(place, MATRICES | {"threshold": P["t"]}, "params.npz")


def _gemma2(folder: Path, **changes: Any) -> Path:
    hook = "model.layers.2.output"
    config = {"architecture": "jump_relu", "model_name": "tiny", "affine_connection": False, "type": "sae"}
    config |= {"hf_hook_point_in": hook, "hf_hook_point_out": hook, "width": F, "l0": K} | changes
    tensors = {name.lower(): value for name, value in MATRICES.items()} | {"threshold": P["t"]}
    tensors |= {"affine_skip_connection": P["S"]} if config["affine_connection"] else {}
    return _put(folder, tensors, "params.safetensors", config, "config.json")


GEMMA_IN = "model.layers.2.pre_feedforward_layernorm.output"


def _gemma2_transcoder(folder: Path, **changes: Any) -> Path:
    hooks = {"hf_hook_point_in": GEMMA_IN, "hf_hook_point_out": GEMMA_IN.replace("pre_", "post_")}
    return _gemma2(folder, **({"type": "transcoder"} | hooks | changes))


def _gemma2_layers(folder: Path) -> Path:
    """A cross-layer transcoder of two layers."""
    tensors = {"w_enc": P["E"], "b_enc": P["e"], "b_dec": P["b"], "threshold": P["t"]}
    for layer in range(2):
        W = torch.stack([P["W"], P["W"] * (layer == 0)], dim=1)
        _put(folder, tensors | {"w_dec": W}, f"params_layer_{layer}.safetensors")
    return folder


def _openai(folder: Path, activation: str = "ReLU") -> Path:
    tensors: dict[str, Any] = {
        "pre_bias": P["b"],
        "latent_bias": P["e"],
        "stats_last_nonzero": torch.zeros(F),
    }
    tensors |= {"encoder.weight": P["E"].T, "decoder.weight": P["W"].T}
    tensors |= {"activation": activation, "activation_state_dict": OrderedDict()}
    return _put(folder / "resid_delta_mlp_v4" / "autoencoders", tensors, "2.pt")


def _goodfire(folder: Path) -> Path:
    names = {"encoder.weight": "encoder_linear.weight", "encoder.bias": "encoder_linear.bias"}
    names |= {"decoder.weight": "decoder_linear.weight", "b_dec": "decoder_linear.bias"}
    return _put(folder, {names[n]: t for n, t in LINEAR.items()}, "tiny-SAE-l2.pth")


def _qwen(folder: Path) -> Path:
    tensors = {**MATRICES, "W_enc": P["E"].T, "W_dec": P["W"].T}
    return _put(folder / f"SAE-Res-tiny-W16K-L0_{K}", tensors, "layer2.sae.pt")


def _plain_decode(codes: Tensor) -> Tensor:
    return codes @ P["W"] + P["b"]


@dataclass(frozen=True, eq=False)
class Case:
    """A tool's files, and what the tool makes of `_x()`."""

    format: str
    write: Callable[[Path], Path]
    architecture: str
    codes: Tensor
    x_hat: Tensor
    site: str = "layers.2.resid_post"
    target_site: str = ""


SKIPPED = _x() @ P["S"]


def _across(format: str, write: Callable[[Path], Path], codes: Tensor, **other: Any) -> Case:
    """A transcoder."""
    kind = "topk" if format == "sparsify" else "jumprelu"
    skip = other.pop("skip", False)
    x_hat = _plain_decode(codes) + (SKIPPED if skip else 0)
    sites = {"site": GEMMA_IN, "target_site": "layers.2.mlp_out"} | other
    return Case(
        format, write, f"{kind}_skip_transcoder" if skip else f"{kind}_transcoder", codes, x_hat, **sites
    )


def _case(format: str, write: Callable[[Path], Path], architecture: str, codes: Tensor, **other: Any) -> Case:
    return Case(format, write, architecture, codes, _plain_decode(codes), **other)


K_AND_THRESHOLD = {"k": torch.tensor(K), "threshold": torch.tensor(0.4)}
SCALE = math.sqrt(D)
CASES = {
    "sparsify": _case("sparsify", _sparsify, "topk", _top(CENTRED)),
    "sparsify transcoder": _across(
        "sparsify",
        lambda f: _sparsify(f, "h.2.mlp", transcode=True),
        _top(PLAIN),
        site="h.2.mlp.input",
        target_site="h.2.mlp",
    ),
    "sparsify skip transcoder": _across(
        "sparsify",
        lambda f: _sparsify(f, transcode=True, skip_connection=True),
        _top(PLAIN),
        skip=True,
        site="layers.2.resid_pre",
        target_site="layers.2",
    ),
    "sparsify skip transcoder, early": _across(
        "sparsify",
        lambda f: _sparsify(f, "layers.2.mlp", transcode=None, activation=None, skip_connection=True),
        _top(CENTRED),
        skip=True,
        site="layers.2.mlp.input",
        target_site="layers.2.mlp",
    ),
    "dictionary topk": _case(
        "dictionary_learning",
        lambda f: _dictionary(f, "AutoEncoderTopK", LINEAR | K_AND_THRESHOLD),
        "topk",
        _top(CENTRED),
    ),
    "dictionary batchtopk": _case(
        "dictionary_learning",
        lambda f: _dictionary(f, "BatchTopKSAE", LINEAR | K_AND_THRESHOLD),
        "jumprelu",
        _jump(CENTRED, 0.4),
    ),
    "dictionary matryoshka": _case(
        "dictionary_learning",
        lambda f: _dictionary(
            f, "MatryoshkaBatchTopKSAE", MATRICES | K_AND_THRESHOLD | {"group_sizes": torch.tensor([4, 12])}
        ),
        "jumprelu",
        _jump(CENTRED, 0.4),
    ),
    "dictionary jumprelu": _case(
        "dictionary_learning",
        lambda f: _dictionary(f, "JumpReluAutoEncoder", MATRICES | {"threshold": P["t"]}),
        "jumprelu",
        _jump(PLAIN, P["t"]),
    ),
    "dictionary standard": Case(
        "dictionary_learning",
        lambda f: _dictionary(
            f, "AutoEncoder", {("bias" if n == "b_dec" else n): t for n, t in LINEAR.items()}
        ),
        "relu",
        CENTRED.relu() * LENGTHS,  # its loader gives rows length 1
        _plain_decode(CENTRED.relu()),
    ),
    "dictionary new": _case(
        "dictionary_learning",
        lambda f: _dictionary(
            f, "AutoEncoderNew", {("decoder.bias" if n == "b_dec" else n): t for n, t in LINEAR.items()}
        ),
        "relu",
        PLAIN.relu(),
    ),
    "dictionary gated": _case(
        "dictionary_learning",
        lambda f: _dictionary(
            f,
            "GatedAutoEncoder",
            {
                "encoder.weight": P["E"].T,
                "decoder.weight": P["W"].T,
                "decoder_bias": P["b"],
                "gate_bias": P["e"],
                "r_mag": P["t"],
                "mag_bias": -P["t"],
            },
        ),
        "gated",
        ((CENTRED - P["e"]) * P["t"].exp() - P["t"]).relu() * (CENTRED > 0),
    ),
    "gemma scope": _case(
        "Gemma Scope",
        lambda f: _gemma(f, "res"),
        "jumprelu",
        _jump(PLAIN, P["t"]),
    ),
    "gemma scope transcoder": _across(
        "Gemma Scope",
        lambda f: _gemma(f, "transcoders"),
        _jump(PLAIN, P["t"]),
        site="blocks.2.ln2.hook_normalized",
    ),
    "gemma scope, MLP": _case(
        "Gemma Scope",
        lambda f: _gemma(f, "mlp"),
        "jumprelu",
        _jump(PLAIN, P["t"]),
        site="layers.2.mlp_out",
    ),
    "gemma scope, embeddings": Case(
        "Gemma Scope",
        lambda f: _put(f / "embedding/width_4k/l0_9", MATRICES | {"threshold": P["t"]}, "params.npz"),
        "jumprelu",
        _jump(_x() / SCALE @ P["E"] + P["e"], P["t"]),
        SCALE * _plain_decode(_jump(_x() / SCALE @ P["E"] + P["e"], P["t"])),
        site="layers.0.resid_pre",
    ),
    "gemma scope 2": _case("Gemma Scope 2", _gemma2, "jumprelu", _jump(PLAIN, P["t"])),
    "gemma scope 2 transcoder": _across("Gemma Scope 2", _gemma2_transcoder, _jump(PLAIN, P["t"])),
    "gemma scope 2 affine": _across(
        "Gemma Scope 2",
        lambda f: _gemma2_transcoder(f, affine_connection=True),
        _jump(PLAIN, P["t"]),
        skip=True,
    ),
    **{
        f"llama scope {act}": Case(
            "Llama Scope",
            lambda f, act=act: _llama(f, act_fn=act),
            act,
            _llama_codes(act),
            _llama_codes(act) @ (P["W"] / LENGTHS[:, None]) + P["b"] * NORM / math.sqrt(D),
        )
        for act in ("jumprelu", "topk", "relu")
    },
    **{
        f"llamascopium {act}": Case(
            "Llamascopium", lambda f, act=act: _scopium(f, act), act, *_scopium_codes(act)
        )
        for act in ("relu", "topk", "jumprelu")
    },
    "llamascopium, early": Case("Llamascopium", _early_scopium, "jumprelu", *_scopium_codes("jumprelu")),
    "llamascopium crosscoder": Case(
        "Llamascopium",
        _scopium_crosscoder,
        "crosscoder",
        *_scopium_crosscoder_codes(math.sqrt(D / 2) / torch.tensor([NORM, 3.0])),
        site=",".join(SITES),
    ),
    "llamascopium crosscoder of raw activations": Case(  # what it stores as norms is then whatever was there
        "Llamascopium",
        lambda f: _scopium_crosscoder(f, norms=(math.nan, 0.0), norm_activation="inference"),
        "crosscoder",
        *_scopium_crosscoder_codes(torch.ones(2)),
        site=",".join(SITES),
    ),
    "openai": _case("OpenAI", _openai, "relu", CENTRED.relu(), site="layers.2.mlp_out"),
    "opensae": _case("OpenSAE", _opensae, "topk", _top(CENTRED)),
    "qwen scope": _case("Qwen Scope", _qwen, "topk", _top(PLAIN)),
    "goodfire": _case("Goodfire", _goodfire, "relu", PLAIN.relu()),
}


def test_every_row_of_the_table_has_a_case() -> None:
    assert {case.format for case in CASES.values()} == {row.name for row in FORMATS}
    for row in FORMATS:
        tested = [case.architecture for case in CASES.values() if case.format == row.name]
        assert {variant.architecture for variant in row.variants.values()} == set(tested)


@pytest.mark.parametrize("name", CASES)
def test_codes_and_reconstructions_are_the_tools_own(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    folder = case.write(tmp_path)
    assert detect(folder).format == case.format
    sae = SAE.from_pretrained(folder)
    assert (sae.config.architecture, sae.config.d_in, sae.config.d_sae) == (case.architecture, D, F)
    if case.target_site:
        assert (sae.config.site, sae.config.target_site) == (case.site, case.target_site)
        assert sae.config.d_out == D and Site.parse(case.target_site).layer == 2
    elif "," in case.site:
        assert (sae.config.site, sae.config.blocks) == (case.site, (D // 2, D // 2))
    else:
        assert str(sae.site) == case.site
    torch.testing.assert_close(sae.encode_dense(_x()), case.codes, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(_x()).x_hat, case.x_hat, rtol=1e-5, atol=1e-5)
    assert 0 < float((case.codes > 0).double().mean()) < 1


@pytest.mark.parametrize("name", CASES)
def test_what_was_read_survives_our_own_format(name: str, tmp_path: Path) -> None:
    sae = SAE.from_pretrained(CASES[name].write(tmp_path / "theirs"))
    sae.save_pretrained(tmp_path / "ours")
    again = SAE.from_pretrained(tmp_path / "ours")
    for name in ("site", "target_site", "model_name", "architecture", "d_out", "blocks"):
        assert getattr(again.config, name) == getattr(sae.config, name)
    assert torch.equal(again.encode_dense(_x()), sae.encode_dense(_x()))
    assert torch.equal(again(_x()).x_hat, sae(_x()).x_hat)


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "sparsify groupmax": (lambda f: _sparsify(f, activation="groupmax"), "activation.*'groupmax'"),
    "sparsify groupmax transcoder": (
        lambda f: _sparsify(f, activation="groupmax", transcode=True),
        "'groupmax transcode'",
    ),
    "sparsify signed": (lambda f: _sparsify(f, signed=True), "negative"),
    "dictionary crosscoder": (lambda f: _dictionary(f, "CrossCoder", LINEAR), "'CrossCoder'"),
    "gemma scope without its repository's name": (
        lambda f: _put(f / "layer_2/width_16k/l0_9", MATRICES | {"threshold": P["t"]}, "params.npz"),
        "params.npz: only the name of its repository",
    ),
    "gemma scope 2 across layers": (lambda f: _gemma2_transcoder(f, type="clt"), "type is 'clt'"),
    "gemma scope 2 in a file a layer": (
        _gemma2_layers,
        "cross-layer transcoder or crosscoder of Gemma Scope 2",
    ),
    "gemma scope 2, one layer of several": (
        lambda f: _gemma2_layers(f) / "params_layer_1.safetensors",
        "cross-layer transcoder or crosscoder of Gemma Scope 2",
    ),
    "gemma scope 2 autoencoder with a skip": (
        lambda f: _gemma2(f, affine_connection=True),
        "'jump_relu affine_connection'",
    ),
    "llama scope by token": (lambda f: _llama(f, norm_activation="token-wise"), "every token by itself"),
    "llama scope transcoder": (lambda f: _llama(f, hook_point_out="blocks.2.hook_mlp_out"), "transcoder"),
    "llama scope glu": (lambda f: _llama(f, use_glu_encoder=True), "gated linear"),
    "llama scope without norm": (lambda f: _llama(f, dataset_average_activation_norm=None), "norm.in"),
    "llamascopium transcoder across layers": (lambda f: _scopium(f, "relu", sae_type="clt"), "sae_type"),
    **{
        f"llamascopium {act} crosscoder": (
            lambda f, act=act: _scopium_crosscoder(f, act_fn=act),
            "act_fn decides at each site",
        )
        for act in ("jumprelu", "topk", "batchtopk")
    },
    "llamascopium crosscoder by token": (
        lambda f: _scopium_crosscoder(f, norm_activation="token-wise"),
        "every token by itself",
    ),
    "llamascopium crosscoder without norm": (
        lambda f: _scopium_crosscoder(f, norms=(NORM, 0.0)),
        r"norm.blocks\.2",
    ),
    "llamascopium crosscoder of one site": (
        lambda f: _scopium_crosscoder(f, {n: t[:1] for n, t in STACKED.items()}, hook_points=SITES[:1]),
        "two sites or more",
    ),
    "llamascopium batchtopk": (lambda f: _scopium(f, "batchtopk"), "'batchtopk'"),
    "openai topk": (lambda f: _openai(f, "TopK"), "TopK.*every token by itself"),
    "opensae normalising": (lambda f: _opensae(f, input_normalize=True), "every token by itself"),
    "opensae normalising by default": (lambda f: _opensae(f, input_normalize=None), "every token by itself"),
    "opensae jumprelu": (lambda f: _opensae(f, activation="jumprelu"), "'jumprelu'"),
    "qwen scope without k": (
        lambda f: _put(f, MATRICES | {"W_enc": P["E"].T, "W_dec": P["W"].T}, "layer2.sae.pt"),
        "give k",
    ),
    "dictionary of no known class": (lambda f: _dictionary(f, ["x"], LINEAR), "dict_class"),  # type: ignore
    "nothing": (lambda f: f, "cfg.json"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_had_exactly_is_refused_in_a_sentence(name: str, tmp_path: Path) -> None:
    write, word = REFUSED[name]
    with pytest.raises(UserError, match=word) as caught:
        SAE.from_pretrained(write(tmp_path))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", CASES)
def test_missing_surplus_and_misshapen_tensors_are_named(name: str, tmp_path: Path) -> None:
    """Whatever is done to one tensor, the reader says so, and never gives another autoencoder."""
    case = CASES[name]
    folder = case.write(tmp_path)
    source = detect(folder)
    assert source.row is not None
    tensors, extras = _all(source.weights)
    decoder = next(n for n in tensors if tensors[n].ndim >= 2 and n.lower().startswith(("dec", "w_d")))
    lost = {n: t for n, t in tensors.items() if n != decoder}
    surplus = "W_skip" if "W_skip" not in tensors else "W_more"
    for changed, word in (
        (lost, "lacks|known format"),
        ({**tensors, decoder: tensors[decoder][:-1]}, "shape"),
        ({**tensors, surplus: torch.zeros(D, D)}, surplus),
        ({**tensors, decoder: tensors[decoder] * float("nan")}, "not numbers"),
    ):
        _put(source.weights.parent, {**changed, **extras}, source.weights.name)
        with pytest.raises((IntegrityError, UserError), match=word) as caught:
            SAE.from_pretrained(folder)
        assert str(tmp_path) in str(caught.value)


def _all(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from unbraid.sae.formats.files import read_tensors

    return read_tensors(path)


def test_a_width_that_contradicts_the_configuration_is_an_integrity_error(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="d_sae 16"):
        SAE.from_pretrained(_sparsify(tmp_path, num_latents=17))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"W_E": P["E"]}, r"W_E has shape \(6, 16\) where a matrix for each of 2 sites"),
        ({name: torch.cat([t, t[:1]]) for name, t in STACKED.items()}, "for each of 2 sites"),
        ({"b_E": STACKED["b_E"].repeat(2, 1)}, r"b_enc has shape \(4, 16\) where \(2, 16\)"),
        ({"W_D": P["W"].view(2, F, D // 2).flatten(0, 1)}, r"W_dec has shape \(32, 3\) where \(2, 16, 3\)"),
        ({"b_D": P["b"]}, r"b_dec has shape \(6,\) where \(2, 3\)"),
    ],
)
def test_a_crosscoder_of_another_shape_is_an_integrity_error(
    changes: Mapping[str, Tensor], word: str, tmp_path: Path
) -> None:
    with pytest.raises(IntegrityError, match=word):
        SAE.from_pretrained(_scopium_crosscoder(tmp_path, {**STACKED, **changes}))


def test_a_crosscoder_whose_sites_have_another_size_than_its_configuration_says(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=r"d_in 3 but .*config\.json says '6'"):
        SAE.from_pretrained(_scopium_crosscoder(tmp_path, d_model=D))


def test_a_skip_connection_that_is_missing_or_not_announced_is_named(tmp_path: Path) -> None:
    announced = _sparsify(tmp_path / "a", transcode=True, skip_connection=True)
    plain = _sparsify(tmp_path / "b", transcode=True)
    both = [folder / "sae.safetensors" for folder in (announced, plain)]
    (skip, _), (none, _) = map(_all, both)
    save_file(none, both[0])
    with pytest.raises(IntegrityError, match="lacks the tensor W_skip"):
        SAE.from_pretrained(announced)
    save_file(skip, both[1])
    with pytest.raises(UserError, match="'W_skip', which is no part of a topk_transcoder"):
        SAE.from_pretrained(plain)


def test_a_transcoder_of_another_size_than_its_configuration_says(tmp_path: Path) -> None:
    folder = _sparsify(tmp_path, skip_connection=True)
    path = folder / "sae.safetensors"
    tensors, _ = _all(path)
    narrow = {"W_dec": tensors["W_dec"][:, :4].clone(), "b_dec": tensors["b_dec"][:4].clone()}
    save_file(tensors | narrow | {"W_skip": tensors["W_skip"][:4].clone()}, path)
    with pytest.raises(IntegrityError, match=r"d_out 4 but .*cfg\.json says '6'"):
        SAE.from_pretrained(folder)


def test_saelens_reads_gemmas_first_transcoders_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through its own loader of the Hub's files, which is given local ones."""
    sae_lens = pytest.importorskip("sae_lens", reason="the oracle of Gemma Scope's transcoders")
    loaders = pytest.importorskip("sae_lens.loading.pretrained_sae_loaders")
    folder = CASES["gemma scope transcoder"].write(tmp_path)
    monkeypatch.setattr(loaders, "hf_hub_download", lambda filename, **_: str(tmp_path / filename))
    config, state, _ = loaders.gemma_2_transcoder_huggingface_loader(
        "gemma-scope-2b-pt-transcoders", str(folder), cfg_overrides={"d_in": D, "d_out": D, "d_sae": F}
    )
    theirs = sae_lens.SAE.from_dict(config)
    theirs.load_state_dict(state)
    ours = SAE.from_pretrained(folder)
    assert ours.config.architecture == theirs.cfg.architecture()
    assert ours.config.site == config["hook_name"]
    assert Site.parse(config["hook_name_out"]) == Site.parse(ours.config.target_site)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode_dense(_x()), theirs.encode(_x()), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours(_x()).x_hat, theirs(_x()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gemma scope 2 transcoder", "gemma scope 2 affine"])
def test_saelens_reads_gemmas_transcoders_alike(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through its own loader of the Hub's files, which is given local ones."""
    sae_lens = pytest.importorskip("sae_lens", reason="the oracle of Gemma Scope 2's transcoders")
    loaders = pytest.importorskip("sae_lens.loading.pretrained_sae_loaders")
    folder = "transcoder_all/layer_2_width_16_l0_small"
    CASES[name].write(tmp_path / folder)
    weights = _all(tmp_path / folder / "params.safetensors")[0]

    def download(repo_id: str, filename: str, subfolder: str = "", **_: Any) -> str:
        return str(tmp_path / subfolder / filename)

    monkeypatch.setattr(loaders, "hf_hub_download", download)
    monkeypatch.setattr(
        loaders, "get_safetensors_tensor_shapes", lambda *_: {n: list(t.shape) for n, t in weights.items()}
    )
    config, state, _ = loaders.gemma_3_sae_huggingface_loader("google/gemma-scope-2-1b-pt", folder)
    theirs = sae_lens.SAE.from_dict(config)
    theirs.load_state_dict(state)
    ours = SAE.from_pretrained(tmp_path / folder)
    assert ours.config.architecture == theirs.cfg.architecture()
    with torch.no_grad():
        torch.testing.assert_close(ours.encode_dense(_x()), theirs.encode(_x()), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours(_x()).x_hat, theirs(_x()), rtol=1e-5, atol=1e-5)


def test_one_of_several_layers_is_named_by_its_file(tmp_path: Path) -> None:
    folder = _qwen(tmp_path)
    (folder / "layer3.sae.pt").write_bytes((folder / "layer2.sae.pt").read_bytes())
    with pytest.raises(UserError, match="name one"):
        SAE.from_pretrained(folder)
    assert str(SAE.from_pretrained(folder / "layer3.sae.pt").site) == "layers.3.resid_post"
    with pytest.raises(UserError, match="k is 3, not 4"):
        SAE.from_pretrained(folder / "layer3.sae.pt", k=4)


def test_weights_in_parts_are_put_together(tmp_path: Path) -> None:
    whole = SAE.from_pretrained(_opensae(tmp_path))
    path = tmp_path / "model.safetensors"
    tensors, _ = _all(path)
    path.unlink()
    parts = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
    for part in set(parts.values()):
        save_file({n: tensors[n] for n in parts if parts[n] == part}, tmp_path / part)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": parts}))
    again = SAE.from_pretrained(tmp_path)
    assert torch.equal(again.W_enc, whole.W_enc) and len(detect(tmp_path).files) == 4
    index.write_text(json.dumps({"weight_map": dict.fromkeys(parts, "../elsewhere.safetensors")}))
    with pytest.raises(UserError, match="outside"):
        SAE.from_pretrained(tmp_path)


def test_sparsify_is_written_and_read_again(random_sae: Callable[..., SAE], tmp_path: Path) -> None:
    from dataclasses import replace

    from unbraid.sae.formats import sparsify

    sae = random_sae("topk")
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(1))
    for centred in (True, False):  # sparsify always centres: the difference is folded
        sae.config = replace(sae.config, apply_b_dec_to_input=centred)
        sparsify.save(sae, tmp_path / str(centred))
        again = SAE.from_pretrained(tmp_path / str(centred))
        torch.testing.assert_close(again.encode_dense(x), sae.encode_dense(x).detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(again(x).x_hat, sae(x).x_hat.detach(), rtol=1e-5, atol=1e-5)
        assert again.config.site == sae.config.site and again.config.model_name == "tiny"
    with pytest.raises(UserError, match="not relu"):
        sparsify.save(random_sae("relu"), tmp_path / "relu")


@pytest.mark.parametrize("name", ["topk_transcoder", "topk_skip_transcoder"])
def test_sparsifys_transcoders_are_written_and_read_again(
    random_sae: Callable[..., SAE], name: str, tmp_path: Path
) -> None:
    from dataclasses import replace

    from unbraid.sae.formats import sparsify

    sae = random_sae(name)
    sae.config = replace(sae.config, site="layers.1.resid_mid", target_site="layers.1.mlp_out", d_out=12)
    sparsify.save(sae, tmp_path)
    again = SAE.from_pretrained(tmp_path)
    assert replace(again.config, metadata={}) == replace(sae.config, model_id="")
    assert {n: t.tolist() for n, t in again.state_dict().items()} == {
        n: t.tolist() for n, t in sae.state_dict().items()
    }
    sae.config = replace(sae.config, d_out=7)
    with pytest.raises(UserError, match="from 12 to 7"):
        sparsify.save(sae, tmp_path)


def test_the_path_counts_from_where_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma Scope's embeddings are told by their path, which may be relative, but not by any folder above."""
    tensors = MATRICES | {"threshold": P["t"]}
    folder = _put(tmp_path / "embedding" / "width_4k" / "l0_9", tensors, "params.npz")
    whole = SAE.from_pretrained(folder)
    monkeypatch.chdir(folder)
    assert torch.equal(SAE.from_pretrained(Path("params.npz")).W_enc, whole.W_enc)
    plain = _gemma(tmp_path / "embedding", "res")
    assert torch.equal(SAE.from_pretrained(plain).W_enc, P["E"])
