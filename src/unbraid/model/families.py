"""Find a model's sites: the layers by what the library says of them, their parts by name, all by numbers.

A kind of site is offered only where its defining identity held, in every layer, in a forward pass of the
model itself: resid_pre + attn_out = resid_mid and resid_mid + mlp_out = resid_post, or for parallel sublayers
resid_pre + attn_out + mlp_out = resid_post, or with a norm after each sum.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from unbraid.manifest.errors import UserError
from unbraid.model.layout import Arguments, Layout, Place
from unbraid.model.sites import KINDS, Site, SiteKind, Stack

Side = Literal["input", "output"]


@dataclass(frozen=True)
class BlockNames:
    """The submodules of a layer that hold its inner sites."""

    attn_out: str
    """Its output is added to the residual stream."""
    mlp_in: str
    """Its input is what enters the MLP."""
    mlp_out: str
    """Its output is added to the residual stream."""
    resid_mid: str | None = None
    """Its input is the stream between the two; None where there is no such place."""
    cross_out: str | None = None
    """Its output is added to the residual stream between the two, in a decoder that reads an encoder."""
    attn_norm: str | None = None
    """The norm of resid_pre + attn_out, where the stream itself is normalised."""
    mlp_norm: str | None = None
    """The norm of that + mlp_out."""


# A layer's row is the first whose modules it has and whose numbers hold in it.
BLOCKS: tuple[BlockNames, ...] = (
    # Gemma 2 and 3, OLMo 2 and 3 normalise what a sublayer puts out, and have the plain names too.
    BlockNames("post_attention_layernorm", "mlp", "post_feedforward_layernorm", "pre_feedforward_layernorm"),
    BlockNames("post_attention_layernorm", "mlp", "post_feedforward_layernorm", "mlp"),
    # Llama, Mistral, Mixtral, Qwen, SmolLM, Gemma 1.
    BlockNames("self_attn", "mlp", "mlp", "post_attention_layernorm"),
    # GPT-2, GPT-Neo; GPT-NeoX; ViT.
    BlockNames("attn", "mlp", "mlp", "ln_2"),
    BlockNames("attention", "mlp", "mlp", "post_attention_layernorm"),
    BlockNames("attention", "mlp", "mlp", "layernorm_after"),
    # BLOOM, whose sublayers put out the sum with the residual stream; Falcon.
    BlockNames("self_attention.dense", "mlp", "mlp.dense_4h_to_h", "post_attention_layernorm"),
    BlockNames("self_attention.dense", "mlp", "mlp.dense_4h_to_h"),
    # OPT; its 350m normalises the stream itself, as BERT does.
    BlockNames("self_attn", "fc1", "fc2", "final_layer_norm"),
    BlockNames("self_attn", "fc1", "fc2", attn_norm="self_attn_layer_norm", mlp_norm="final_layer_norm"),
    BlockNames(
        "attention.output.dense",
        "intermediate",
        "output.dense",
        attn_norm="attention.output.LayerNorm",
        mlp_norm="output.LayerNorm",
    ),
    # T5: decoder, encoder.
    BlockNames(
        "layer.0.SelfAttention",
        "layer.2.DenseReluDense",
        "layer.2.DenseReluDense",
        "layer.1.layer_norm",
        cross_out="layer.1.EncDecAttention",
    ),
    BlockNames(
        "layer.0.SelfAttention", "layer.1.DenseReluDense", "layer.1.DenseReluDense", "layer.1.layer_norm"
    ),
    # Parallel sublayers: GPT-J; Phi, Cohere.
    BlockNames("attn", "mlp", "mlp"),
    BlockNames("self_attn", "mlp", "mlp"),
)
_LAYERS = ("layers", "h", "layer", "blocks", "block")
_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "final_norm", "layernorm")
_PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense", "o")

_UNKNOWN = "no known module of its layers has outputs that add up to the residual stream"
_INNER: tuple[SiteKind, ...] = ("attn_z", "attn_out", "resid_mid", "mlp_in", "mlp_out")
_ABSENT: dict[SiteKind, str] = {
    "resid_mid": "attention and MLP read the same stream side by side",
    "attn_z": "no output projection of the attention was found",
    "cross_out": "its layers read no encoder",
    "router": "its layers have no mixture of experts",
    "final_norm": "no norm after the layers gives the model's last hidden state",
}


def discover(model: nn.Module) -> Layout:
    """Find the layers of a Hugging Face transformer and which sites it really has.

    Runs two forward passes of eight tokens (of one image). Raises UserError when no stack of layers is found.
    """
    base: Any = getattr(model, "base_model", model)
    get_unembed = getattr(model, "get_output_embeddings", None)
    unembed = get_unembed() if callable(get_unembed) else None
    if not getattr(model.config, "is_encoder_decoder", False):
        decoder = _decoder(model)
        return _layout(model, decoder, decoder, "", cast("nn.Module | None", unembed))
    encoder, decoder = base.get_encoder(), base.get_decoder()
    other = _layout(model, base, encoder, "encoder", None)
    return _layout(model, base, decoder, "decoder", cast("nn.Module | None", unembed), other)


def _decoder(model: nn.Module) -> nn.Module:
    get_decoder = getattr(model, "get_decoder", None)
    for candidate in (
        get_decoder() if callable(get_decoder) else None,
        getattr(model, "base_model", None),
        model,
    ):
        if isinstance(candidate, nn.Module) and _find_layers(candidate) is not None:
            return candidate
    raise UserError(f"no stack of layers found in {type(model).__name__}; load a Hugging Face transformer")


def _find_layers(stack: nn.Module) -> nn.ModuleList | None:
    """The outermost list of modules that the library can checkpoint, else one with a usual name."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    lists = [m for m in stack.modules() if isinstance(m, nn.ModuleList) and len(m)]
    usual = [getattr(stack, name, None) for name in _LAYERS]
    for layers in lists:
        if isinstance(layers[0], GradientCheckpointingLayer):
            return layers
    return next((layers for layers in lists if any(layers is u for u in usual)), None)


def _layout(
    model: nn.Module,
    whole: nn.Module,
    stack: nn.Module,
    name: Stack,
    unembed: nn.Module | None,
    encoder: Layout | None = None,
) -> Layout:
    """The layout of one stack; `whole` is what has to run for the stack to run."""
    layers = _find_layers(stack)
    assert layers is not None
    norms = (getattr(stack, norm, None) for norm in _FINAL_NORMS)
    final_norm = next((norm for norm in norms if isinstance(norm, nn.Module)), None)
    parameters = tuple(inspect.signature(stack.forward).parameters)
    text: Any = cast(Any, model).config.get_text_config(decoder=True)
    rows = [row for row in BLOCKS if all(_has(layers[0], part) for part in _parts(row))]
    projections = [_projection(layer) for layer in layers]
    routers = [_router(model, layer) for layer in layers]

    with _Record() as record:
        for layer, projection, router in zip(layers, projections, routers, strict=True):
            parts = {part for row in rows for part in _parts(row) if _has(layer, part)}
            for module in (layer, projection, router, *map(layer.get_submodule, sorted(parts))):
                record.keep(module)
        record.keep(final_norm)
        record.keep(stack)
        batch = _batch(whole)
        _run(model, whole, batch)

    places: dict[Site, Place] = {}

    def add(layer: int | None, kind: SiteKind, module: nn.Module, side: Side) -> None:
        kept = record.seen.get((module, side))
        if kept is not None:
            places[Site(layer, kind, name)] = Place(
                module, side, kept.value.shape[-1], kept.value.ndim == 2, kept.overwritten
            )

    forms = ((row, _kinds(record, layers, row)) for row in rows)
    row, kinds = next(((row, kinds) for row, kinds in forms if kinds), (None, ()))
    for number, (layer, projection, router) in enumerate(zip(layers, projections, routers, strict=True)):
        add(number, "resid_pre", layer, "input")
        add(number, "resid_post", layer, "output")
        for kind in kinds:
            module = layer.get_submodule(getattr(row, kind))
            add(number, kind, module, "input" if kind in ("resid_mid", "mlp_in") else "output")
        if row is not None and projection is not None and _projects(record, projection, layer, row):
            add(number, "attn_z", projection, "input")
        if router is not None:
            add(number, "router", router, "output")
    if final_norm is not None and record.same(final_norm, stack):
        add(None, "final_norm", final_norm, "output")

    found = {site.kind for site in places}
    why = dict(_ABSENT)
    if row is None:
        why |= dict.fromkeys(_INNER, _UNKNOWN)
    elif row.attn_norm is not None:
        why["resid_mid"] = "its layers normalise the stream itself, after each sum"
    return Layout(
        decoder=stack,
        layers=layers,
        places=dict(sorted(places.items(), key=lambda item: item[0].depth)),
        missing={kind: why[kind] for kind in KINDS if kind not in found},
        final_norm=final_norm,
        unembed=unembed,
        parameters=parameters,
        heads=cast("int | None", getattr(text, "num_attention_heads", None)),
        positions=whole is stack and "position_ids" in parameters and _counts(record, whole, batch),
        stack=name,
        encoder=encoder,
    )


class _Kept:
    """A copy of a tensor as it passed, and the tensor itself."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.value = tensor.clone()

    @property
    def overwritten(self) -> bool:
        """Whether the model has written into the tensor since."""
        return not torch.equal(self.tensor, self.value)


class _Record:
    """Inputs and outputs of modules in one forward pass."""

    def __init__(self) -> None:
        self.seen: dict[tuple[nn.Module, Side], _Kept] = {}
        self._hooks: dict[nn.Module, tuple[Any, Any]] = {}

    def __enter__(self) -> _Record:
        return self

    def __exit__(self, *_: object) -> None:
        for hooks in self._hooks.values():
            for hook in hooks:
                hook.remove()

    def keep(self, module: nn.Module | None) -> None:
        """Record this module."""
        if module is not None and module not in self._hooks:
            self._hooks[module] = (
                module.register_forward_pre_hook(self._on_input, with_kwargs=True),
                module.register_forward_hook(self._on_output),
            )

    def same(self, one: nn.Module, other: nn.Module, side: Side = "output") -> bool:
        """Whether one module's output is bit for bit another's output or input."""
        a, b = self.seen.get((one, "output")), self.seen.get((other, side))
        return a is not None and b is not None and torch.equal(a.value, b.value)

    def _on_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> None:
        given = args[0] if args else kwargs.get("hidden_states")
        if isinstance(given, Tensor):
            self.seen[module, "input"] = _Kept(given)

    def _on_output(self, module: nn.Module, _: Any, output: Any) -> None:
        given = getattr(output, "last_hidden_state", output)
        first = given[0] if isinstance(given, tuple) and given else given
        if isinstance(first, Tensor):
            self.seen[module, "output"] = _Kept(first)


def _parts(row: BlockNames) -> list[str]:
    return [part for part in vars(row).values() if part is not None]


def _has(layer: nn.Module, name: str) -> bool:
    try:
        layer.get_submodule(name)
    except AttributeError:
        return False
    return True


def _projection(layer: nn.Module) -> nn.Module | None:
    """The output projection of a layer's own attention: it reads the heads' results, one after the other."""
    for name, module in layer.named_modules():
        path, _, last = name.rpartition(".")
        if (
            last in _PROJECTIONS
            and "att" in path.lower()
            and isinstance(getattr(module, "weight", None), Tensor)
        ):
            return module
    return None


def _router(model: nn.Module, layer: nn.Module) -> nn.Module | None:
    """The module whose first output the library records as router logits."""
    recorded = (getattr(model, "_can_record_outputs", None) or {}).get("router_logits")
    kind = getattr(recorded, "target_class", recorded)
    if not isinstance(kind, type) or getattr(recorded, "index", 0) != 0:
        return None
    return next((module for module in layer.modules() if isinstance(module, kind)), None)


def _batch(whole: Any) -> dict[str, Tensor]:
    """Two rows of four tokens, or two images."""
    device = next(whole.parameters()).device
    if getattr(whole, "main_input_name", "") == "pixel_values":
        config = whole.config
        sides = config.image_size if isinstance(config.image_size, list | tuple) else [config.image_size] * 2
        pixels = torch.arange(
            2 * config.num_channels * sides[0] * sides[1], dtype=torch.float32, device=device
        )
        return {"pixel_values": pixels.sin().reshape(2, config.num_channels, *sides).to(whole.dtype)}
    ids = torch.arange(8, device=device).reshape(2, 4) % whole.config.get_text_config().vocab_size
    return {"input_ids": ids, **({"decoder_input_ids": ids} if whole.config.is_encoder_decoder else {})}


@torch.no_grad()
def _run(model: nn.Module, whole: nn.Module, batch: dict[str, Tensor]) -> Any:
    """The output of one forward pass."""
    try:
        return whole(**batch)
    except (TypeError, KeyError, IndexError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{type(model).__name__} cannot be run on {' and '.join(batch)}: {reason}") from error


def _counts(record: _Record, stack: nn.Module, batch: dict[str, Tensor]) -> bool:
    """Whether positions from 0 are what the stack counts by itself; some families begin elsewhere."""
    last = record.seen[stack, "output"].value
    places = torch.arange(4, device=last.device).expand(2, 4)
    counted = _run(stack, stack, {**batch, "position_ids": places}).last_hidden_state
    return torch.allclose(counted, last, atol=1e-3, rtol=1e-3)


def _kinds(record: _Record, layers: nn.ModuleList, row: BlockNames) -> tuple[SiteKind, ...]:
    """Which of a row's sites satisfy the identities in every layer; none where neither form holds."""
    forms = {_form(record, layer, row) for layer in layers}
    outer: tuple[SiteKind, ...] = ("attn_out", "mlp_in", "mlp_out")
    if None in forms:
        return ()
    if forms == {"sequential"}:
        return (*outer, "resid_mid", *(("cross_out",) if row.cross_out else ()))
    return outer


def _form(record: _Record, layer: nn.Module, row: BlockNames) -> Literal["sequential", "other"] | None:
    """How a layer's sites add up: with the stream between the sublayers, in another way, or not at all."""

    def seen(part: str | None, side: Side) -> Tensor | None:
        module = layer if part is None else layer.get_submodule(part)
        kept = record.seen.get((module, side))
        return None if kept is None else kept.value

    pre, post = seen(None, "input"), seen(None, "output")
    attn, mlp = seen(row.attn_out, "output"), seen(row.mlp_out, "output")
    if pre is None or post is None or attn is None or mlp is None or mlp.numel() != pre.numel():
        return None
    if row.attn_norm is not None and row.mlp_norm is not None:
        mid = layer.get_submodule(row.attn_norm)(pre + attn)
        whole = layer.get_submodule(row.mlp_norm)(mid + mlp.view_as(pre))
        return "other" if _sums(post, whole) else None
    mid = seen(row.resid_mid, "input") if row.resid_mid else None
    cross = [c for c in (seen(row.cross_out, "output") if row.cross_out else None,) if c is not None]
    if mid is not None and _sums(mid, pre, attn) and _sums(post, mid, *cross, mlp):
        return "sequential"
    return "other" if _sums(post, pre, attn, mlp) else None


def _sums(whole: Tensor, *terms: Tensor) -> bool:
    """Whether terms (…, d) add up to the whole at every token, but for the rounding of their type."""
    wide = torch.promote_types(whole.dtype, torch.float32)
    total = whole.flatten(0, -2).to(wide)
    parts = [term.reshape(total.shape).to(wide) for term in terms]
    size = torch.stack([part.norm(dim=-1) for part in (total, *parts)]).sum(dim=0)
    off = (total - torch.stack(parts).sum(dim=0)).norm(dim=-1)
    return bool((off <= 4 * torch.finfo(whole.dtype).eps * size).all())


def _projects(record: _Record, projection: nn.Module, layer: nn.Module, row: BlockNames) -> bool:
    """Whether a projection's output is attn_out, or what a norm then makes attn_out of."""
    attn = layer.get_submodule(row.attn_out)
    return record.same(projection, attn) or record.same(projection, attn, "input")
