"""The table of foreign formats, one row a tool: their names for our tensors and settings.

Read from each tool's source: sparsify 1.3, dictionary_learning 0.1, OpenAI's sparse_autoencoder, OpenSAE and
Llamascopium as of 2026 and lm-saes as of Llama Scope (2024); the others from how SAELens 6.54 reads them.
"""

from __future__ import annotations

from unbraid.manifest.errors import UserError
from unbraid.sae.formats.folds import (
    EMBEDDING,
    Found,
    centre_input,
    dataset_norm,
    decoder_norms,
    embedding_scale,
    exponential,
    one_threshold,
)
from unbraid.sae.formats.table import Field, Format, Must, Variant

PER_TOKEN = (
    "it normalises every token by itself, which cannot be folded into the weights; such an autoencoder is "
    "not supported"
)
GLU = "its encoder is a gated linear unit, which is not supported"
OURS = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
LINEAR = {
    "W_enc": "encoder.weight.T",
    "b_enc": "encoder.bias",
    "W_dec": "decoder.weight.T",
    "b_dec": "decoder.bias",
}
THRESHOLD = {"threshold": "threshold"}

_SPARSIFY = {**LINEAR, "W_dec": "W_dec", "b_dec": "b_dec"}
_SPARSIFY_SKIP = {**_SPARSIFY, "W_skip": "W_skip"}
# The folder is called after a module: autoencoders read its output, transcoders its input as well. `site`,
# `target_site` and `model_name` are additions of ours.
_MODULE = Field("path", r"((?:layers|h)\.\d+(?:\.\w+)?)/[^/]+$")
_SPARSIFY_ACROSS = {
    "site": (
        Field("site"),
        Field("path", r"(?:layers|h)\.(\d+)/[^/]+$", r"layers.\1.resid_pre"),
        Field("path", r"((?:layers|h)\.\d+\.\w+)/[^/]+$", r"\1.input"),
    ),
    "target_site": (Field("target_site"), _MODULE),
}
SPARSIFY = Format(
    "sparsify",
    weights=("sae.safetensors",),
    config="cfg.json",
    marks=("expansion_factor", "normalize_decoder", "d_in"),
    kind=(Field("activation", default="topk"), Field("transcode"), Field("skip_connection")),
    variants={
        "topk": Variant("topk", _SPARSIFY),
        "topk transcode": Variant("topk_transcoder", _SPARSIFY, centred=False, fields=_SPARSIFY_ACROSS),
        "topk transcode skip_connection": Variant(
            "topk_skip_transcoder", _SPARSIFY_SKIP, centred=False, fields=_SPARSIFY_ACROSS
        ),
        # Before February 2025 transcoders did not say that they are, and read x − b_dec.
        "topk skip_connection": Variant(
            "topk_skip_transcoder",
            _SPARSIFY_SKIP,
            centred=False,
            folds=(centre_input,),
            fields=_SPARSIFY_ACROSS,
        ),
    },
    fields={
        "k": (Field("k"),),
        "d_in": (Field("d_in"),),
        "d_out": (Field("d_in"),),
        "d_sae": (Field("num_latents"),),
        "site": (Field("site"), _MODULE),
        "model_name": (Field("model_name"),),
    },
    must=(Must("signed", (None, False), "it lets negative codes through, which is not supported"),),
)

_DICTIONARY_TOPK = {**LINEAR, "b_dec": "b_dec"}
DICTIONARY_LEARNING = Format(
    "dictionary_learning",
    weights=("ae.pt",),
    config="config.json",
    marks=("trainer.dict_class",),
    kind=(Field("trainer.dict_class"),),
    variants={
        "AutoEncoderTopK": Variant("topk", _DICTIONARY_TOPK),
        "BatchTopKSAE": Variant("jumprelu", _DICTIONARY_TOPK | THRESHOLD),
        "MatryoshkaBatchTopKSAE": Variant("jumprelu", OURS | THRESHOLD),
        "JumpReluAutoEncoder": Variant("jumprelu", OURS | THRESHOLD, centred=False),
        # Its own loader gives this one's decoder rows length 1.
        "AutoEncoder": Variant("relu", {**LINEAR, "b_dec": "bias"}, folds=(decoder_norms,)),
        "AutoEncoderNew": Variant("relu", LINEAR, centred=False),
        "GatedAutoEncoder": Variant(
            "gated",
            {
                "W_enc": "encoder.weight.T",
                "b_enc": "gate_bias",
                "r_mag": "r_mag",
                "b_mag": "mag_bias",
                "W_dec": "decoder.weight.T",
                "b_dec": "decoder_bias",
            },
        ),
    },
    fields={
        "k": (Field("trainer.k"),),
        "d_in": (Field("trainer.activation_dim"),),
        "d_sae": (Field("trainer.dict_size"),),
        "site": (Field("trainer.submodule_name", r"^(resid_post)_layer_(\d+)$", r"layers.\2.\1"),),
        "model_name": (Field("trainer.lm_name"),),
    },
    # TopK stores a threshold that its encode does not use.
    ignored=("k", "threshold", "group_sizes"),
)

# The files of autoencoders and transcoders are alike; what they read only the repository's name says.
_GEMMA_AUTOENCODER = Variant("jumprelu", OURS | THRESHOLD, centred=False, folds=(embedding_scale,))
GEMMA_SCOPE = Format(
    "Gemma Scope",
    weights=("params.npz",),
    config="",
    marks=("W_enc", "W_dec", "b_enc", "b_dec", "threshold"),
    kind=(Field("path", rf"gemma-scope-[^/]*-(res|mlp|att|transcoders)\b|{EMBEDDING}", r"\1\2"),),
    refused={
        "": "only the name of its repository says whether this is an autoencoder or a transcoder; keep it in "
        "a folder of that name, such as gemma-scope-2b-pt-res or gemma-scope-2b-pt-transcoders"
    },
    variants={
        **dict.fromkeys(("res", "mlp", "att", "embedding"), _GEMMA_AUTOENCODER),
        # They read what the norm before the MLP divides, before its gain, which no module puts out.
        "transcoders": Variant(
            "jumprelu_transcoder",
            OURS | THRESHOLD,
            centred=False,
            fields={
                "site": (Field("path", r"/layer_(\d+)/", r"blocks.\1.ln2.hook_normalized"),),
                "target_site": (Field("path", r"/layer_(\d+)/", r"layers.\1.mlp_out"),),
            },
        ),
    },
    fields={
        "site": (
            Field("path", r"gemma-scope-[^/]*-res\b.*/layer_(\d+)/", r"layers.\1.resid_post"),
            Field("path", r"gemma-scope-[^/]*-mlp\b.*/layer_(\d+)/", r"layers.\1.mlp_out"),
            Field("path", EMBEDDING, "layers.0.resid_pre"),
        )
    },
)

_GEMMA = {**OURS, "W_enc": "w_enc", "W_dec": "w_dec", **THRESHOLD}


def _gemma_site(at: str) -> tuple[Field, ...]:
    """A module's output by its Hugging Face name, ours where it is a site of ours."""
    return (
        Field(at, r"layers\.(\d+)\.output$", r"layers.\1.resid_post"),
        Field(at, r"layers\.(\d+)\.post_feedforward_layernorm\.output$", r"layers.\1.mlp_out"),
        Field(at),
    )


GEMMA_SCOPE_2 = Format(
    "Gemma Scope 2",
    weights=("params.safetensors",),
    config="config.json",
    marks=("architecture", "hf_hook_point_in"),
    kind=(Field("architecture"), Field("affine_connection")),
    variants={
        "jump_relu": Variant("jumprelu", _GEMMA, centred=False),
        "jump_relu transcoder": Variant("jumprelu_transcoder", _GEMMA, centred=False),
        "jump_relu affine_connection transcoder": Variant(
            "jumprelu_skip_transcoder", _GEMMA | {"W_skip": "affine_skip_connection.T"}, centred=False
        ),
    },
    fields={
        "site": _gemma_site("hf_hook_point_in"),
        "target_site": _gemma_site("hf_hook_point_out"),
        "model_name": (Field("model_name"),),
    },
    must=(
        Must(
            "type",
            (None, "sae", "transcoder"),
            "only autoencoders and transcoders of one layer (sae, transcoder) of this format are supported",
        ),
    ),
    same=("hf_hook_point_in", "hf_hook_point_out"),
)

LAYERS = "params_layer_*.safetensors"
"""Files of Gemma Scope 2's cross-layer transcoders and crosscoders, which are refused: the former may have
skip connections, the latter latents that read one layer each."""

NORMS = Must("norm_activation", (None, "none", "inference", "dataset-wise"), PER_TOKEN)
NO_GLU = Must("use_glu_encoder", (None, False), GLU)
_LLAMA_NORM = dataset_norm(lambda found: [found.number("dataset_average_activation_norm.in")])
_LLAMA_CENTRED = "apply_decoder_bias_to_pre_encoder"
# The threshold was measured on raw activations with decoder rows of length 1, so it is set last.
_LLAMA_FOLDS = (_LLAMA_NORM, decoder_norms)
LLAMA_SCOPE = Format(
    "Llama Scope",
    weights=("checkpoints/final.safetensors",),
    config="hyperparams.json",
    marks=("d_model", "hook_point_in"),
    kind=(Field("act_fn"),),
    variants={
        "jumprelu": Variant(
            "jumprelu", LINEAR, _LLAMA_CENTRED, (*_LLAMA_FOLDS, one_threshold("jump_relu_threshold"))
        ),
        "topk": Variant("topk", LINEAR, _LLAMA_CENTRED, _LLAMA_FOLDS),
        "relu": Variant("relu", LINEAR, _LLAMA_CENTRED, _LLAMA_FOLDS),
    },
    fields={
        "k": (Field("top_k"),),
        "d_in": (Field("d_model"),),
        "d_sae": (Field("d_sae"),),
        "site": (Field("hook_point_in"),),
    },
    must=(NORMS, NO_GLU),
    same=("hook_point_in", "hook_point_out"),
)


def _stored_norms(found: Found) -> list[float]:
    """Llamascopium keeps the data's mean norms among the weights, under the hooks' names."""
    several = found.get("sae_type") == "crosscoder"
    hooks = found.text("hook_points").split(",") if several else [found.text("hook_point_in")]
    names = [f"dataset_average_activation_norm.{hook}" for hook in hooks]
    for name in names:
        if name not in found.tensors or not 0 < float(found.tensors[name]) < float("inf"):
            raise UserError(
                f"{found.weights} lacks {name!r}, which norm_activation 'dataset-wise' needs; fetch it again"
            )
    return [float(found.tensors[name]) for name in names]


# Before version 2 the matrices were those of linear layers. The gate compares a code times its row's length,
# in the units of the scaled input.
_SCOPIUM = {
    "W_enc": "W_E | encoder.weight.T",
    "b_enc": "b_E | encoder.bias",
    "W_dec": "W_D | decoder.weight.T",
    "b_dec": "b_D | decoder.bias | 0",
}
_SCOPIUM_THRESHOLD = {"threshold": "activation_function.log_jumprelu_threshold | log_jumprelu_threshold"}
_SCOPIUM_FOLDS = (decoder_norms, dataset_norm(_stored_norms))
# A crosscoder's sites share one pre-activation, but the gate compares it times the row's length at each site.
# With ReLU lengths change nothing, and a latent has one code for all.
_SCOPIUM_SITES = {"W_enc": "W_E", "b_enc": "b_E", "W_dec": "W_D", "b_dec": "b_D"}
_SCOPIUM_GATES = (
    "its act_fn decides at each site of a crosscoder by itself, so that a latent can fire at some and not at "
    "others, which is not supported; choose a crosscoder whose act_fn is relu"
)
LLAMASCOPIUM = Format(
    "Llamascopium",
    weights=("sae_weights.safetensors", "checkpoints/final.safetensors"),
    config="config.json",
    marks=("sae_type", "d_model"),
    kind=(Field("act_fn", default="relu"), Field("sae_type", "(crosscoder)")),
    refused=dict.fromkeys(("jumprelu crosscoder", "topk crosscoder", "batchtopk crosscoder"), _SCOPIUM_GATES),
    variants={
        "relu": Variant("relu", _SCOPIUM, _LLAMA_CENTRED, _SCOPIUM_FOLDS),
        "topk": Variant("topk", _SCOPIUM, _LLAMA_CENTRED, _SCOPIUM_FOLDS),
        "jumprelu": Variant(
            "jumprelu", _SCOPIUM | _SCOPIUM_THRESHOLD, _LLAMA_CENTRED, (exponential, *_SCOPIUM_FOLDS)
        ),
        "relu crosscoder": Variant(
            "crosscoder",
            _SCOPIUM_SITES,
            centred=False,
            folds=(dataset_norm(_stored_norms),),
            fields={"site": (Field("hook_points"),)},
        ),
    },
    fields={
        "k": (Field("top_k"),),
        "d_in": (Field("d_model"),),
        "site": (Field("hook_point_in"),),
    },
    must=(
        Must(
            "sae_type",
            ("sae", "crosscoder"),
            "only plain autoencoders and crosscoders (sae, crosscoder) of this format are supported",
        ),
        NORMS,
        NO_GLU,
    ),
    same=("hook_point_in", "hook_point_out"),
    ignored=("dataset_average_activation_norm.*",),
)

OPENAI = Format(
    "OpenAI",
    weights=("*.pt",),
    config="",
    marks=("encoder.weight", "pre_bias", "latent_bias"),
    kind=(Field("activation", default="ReLU"),),
    variants={
        "ReLU": Variant(
            "relu",
            {
                "W_enc": "encoder.weight.T",
                "b_enc": "latent_bias",
                "W_dec": "decoder.weight.T",
                "b_dec": "pre_bias",
            },
        )
    },
    fields={"site": (Field("path", r"resid_delta_mlp(?:_v4)?/.*?(\d+)\.pt$", r"layers.\1.mlp_out"),)},
    must=(Must("activation", (None, "ReLU"), f"the TopK autoencoders of OpenAI: {PER_TOKEN}"),),
    ignored=("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square"),
)

OPENSAE = Format(
    "OpenSAE",
    weights=("model.safetensors",),
    config="config.json",
    marks=("feature_size", "hidden_size"),
    kind=(Field("activation", default="topk"),),
    # Its JumpReLU lets the largest latent fire where none passes the threshold, which ours does not.
    variants={"topk": Variant("topk", {**LINEAR, "W_dec": "W_dec", "b_dec": "b_dec"})},
    fields={
        "k": (Field("k"),),
        "d_in": (Field("hidden_size"),),
        "d_sae": (Field("feature_size"),),
        "site": (Field("input_hookpoint"),),
        "model_name": (Field("model_name"),),
    },
    must=(Must("input_normalize", (False,), PER_TOKEN),),
    same=("input_hookpoint", "output_hookpoint"),
)

QWEN_SCOPE = Format(
    "Qwen Scope",
    weights=("layer*.sae.pt",),
    config="",
    marks=("W_enc", "b_enc", "W_dec", "b_dec"),
    variants={
        "": Variant("topk", OURS | {"W_enc": "W_enc.T", "W_dec": "W_dec.T"}, centred=False),
    },
    fields={
        "k": (Field("path", r"SAE-Res-[^/]*-L0_(\d+)"),),
        "site": (Field("path", r"layer(\d+)\.sae\.pt$", r"layers.\1.resid_post"),),
        "model_name": (Field("path", r"SAE-Res-(.+?)-W\d+K-"),),
    },
)

GOODFIRE = Format(
    "Goodfire",
    weights=("*.pt", "*.pth"),
    config="",
    marks=("encoder_linear.weight", "decoder_linear.weight"),
    variants={
        "": Variant(
            "relu",
            {
                "W_enc": "encoder_linear.weight.T",
                "b_enc": "encoder_linear.bias",
                "W_dec": "decoder_linear.weight.T",
                "b_dec": "decoder_linear.bias",
            },
            centred=False,
        )
    },
    fields={
        "site": (Field("path", r"-SAE-l(\d+)\.pth?$", r"layers.\1.resid_post"),),
        "model_name": (Field("path", r"([^/]+)-SAE-l\d+\.pth?$"),),
    },
)

FORMATS: tuple[Format, ...] = (
    SPARSIFY,
    DICTIONARY_LEARNING,
    GEMMA_SCOPE,
    GEMMA_SCOPE_2,
    LLAMA_SCOPE,
    LLAMASCOPIUM,
    OPENAI,
    OPENSAE,
    QWEN_SCOPE,
    GOODFIRE,
)
"""All but SAELens's own, which is `formats.saelens`."""
