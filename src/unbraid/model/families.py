"""Where the sites are in each family of models: found by name, then checked with numbers before use."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from unbraid.manifest.errors import UserError
from unbraid.model.sites import Site, SiteKind

Arguments = dict[str, Any]


@dataclass(frozen=True)
class BlockNames:
    """The submodules of a decoder layer that hold the three inner sites."""

    attn: str
    """Its output is added to the residual stream as attn_out."""
    mid: str
    """Its input is resid_mid."""
    mlp: str
    """Its output is added to the residual stream as mlp_out."""


# The first row whose three names a layer has is used. Families that normalise what a sublayer puts out come
# first, for they have the plain names too.
BLOCKS: tuple[BlockNames, ...] = (
    BlockNames(
        "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
    ),  # Gemma 2, 3
    BlockNames("post_attention_layernorm", "mlp", "post_feedforward_layernorm"),  # OLMo 2, 3
    BlockNames("self_attn", "post_attention_layernorm", "mlp"),  # Llama, Mistral, Qwen, Gemma 1
    BlockNames("attn", "ln_2", "mlp"),  # GPT-2, GPT-Neo
    BlockNames("attention", "post_attention_layernorm", "mlp"),  # GPT-NeoX without parallel sublayers
    BlockNames(
        "self_attn", "mlp", "mlp"
    ),  # parallel sublayers: no resid_mid, which the check below finds out
    BlockNames("attn", "mlp", "mlp"),
)
_LAYERS = ("layers", "h", "layer", "blocks", "block")
_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "final_norm")


@dataclass(frozen=True, eq=False)
class Layout:
    """The parts of a model that this room touches."""

    decoder: nn.Module
    """The stack of layers with its embedding and final norm; every forward pass goes through it."""
    layers: nn.ModuleList
    """The decoder layers."""
    names: BlockNames | None
    """Names of the inner sites' modules; None where the family is not known that far."""
    final_norm: nn.Module | None
    """The norm before the unembedding."""
    unembed: nn.Module | None
    """The map from the last activation to logits, weight (vocabulary, d)."""
    kinds: frozenset[SiteKind]
    """The kinds of sites whose defining identities hold numerically in this model."""
    parameters: tuple[str, ...]
    """Names of the parameters of the decoder's forward, in order."""

    def attn(self, layer: int) -> nn.Module:
        """The module whose output is attn_out."""
        return self._inner(layer, "attn")

    def mid(self, layer: int) -> nn.Module:
        """The module whose input is resid_mid."""
        return self._inner(layer, "mid")

    def mlp(self, layer: int) -> nn.Module:
        """The module whose output is mlp_out."""
        return self._inner(layer, "mlp")

    def _inner(self, layer: int, role: str) -> nn.Module:
        assert self.names is not None, "require() is asked first"
        return self.layers[layer].get_submodule(getattr(self.names, role))

    def require(self, site: Site) -> None:
        """Raise UserError unless the model has this site."""
        if site.layer >= len(self.layers):
            raise UserError(f"site {site} does not exist: the model's layers are 0 to {len(self.layers) - 1}")
        if site.kind not in self.kinds:
            raise UserError(
                f"site {site} does not exist in this model; it has the kinds {', '.join(sorted(self.kinds))}"
            )


def discover(model: nn.Module) -> Layout:
    """Find the layers of a Hugging Face causal language model and which kinds of sites it really has.

    Runs one forward pass of four tokens. Raises UserError when no stack of decoder layers is found.
    """
    decoder = _decoder(model)
    layers = _layers(decoder)
    names = next((names for names in BLOCKS if all(_has(layers[0], n) for n in vars(names).values())), None)
    norms = (getattr(decoder, name, None) for name in _FINAL_NORMS)
    final_norm = next((norm for norm in norms if isinstance(norm, nn.Module)), None)
    get_unembed = getattr(model, "get_output_embeddings", None)
    kinds: set[SiteKind] = {"resid_pre", "resid_post"}
    if names is not None:
        kinds |= _inner_kinds(decoder, layers, names)
    return Layout(
        decoder=decoder,
        layers=layers,
        names=names,
        final_norm=final_norm,
        unembed=None if get_unembed is None else get_unembed(),
        kinds=frozenset(kinds),
        parameters=tuple(inspect.signature(decoder.forward).parameters),
    )


def first_tensor(output: Any) -> Tensor:
    """The activation in a module's output, which is a tensor in some families and a tuple in others."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return output[0]
    raise TypeError(
        f"a module put out {type(output).__name__}, neither a tensor nor a tuple that starts with one"
    )


def with_first_tensor(output: Any, activation: Tensor) -> Any:
    """The same output with its activation replaced."""
    if isinstance(output, Tensor):
        return activation
    return (activation, *cast("tuple[Any, ...]", output)[1:])


def layer_input(args: tuple[Any, ...], kwargs: Arguments) -> Tensor:
    """The activation that a layer or norm was called with, by place or by name."""
    return cast(Tensor, args[0] if args else kwargs["hidden_states"])


def with_layer_input(
    args: tuple[Any, ...], kwargs: Arguments, activation: Tensor
) -> tuple[tuple[Any, ...], Arguments]:
    """The same call with its activation replaced."""
    if args:
        return (activation, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": activation}


def _decoder(model: nn.Module) -> nn.Module:
    get_decoder = getattr(model, "get_decoder", None)
    for candidate in (
        get_decoder() if callable(get_decoder) else None,
        getattr(model, "base_model", None),
        model,
    ):
        if isinstance(candidate, nn.Module) and _find_layers(candidate) is not None:
            return candidate
    raise UserError(
        f"no stack of decoder layers found in {type(model).__name__}; load a decoder-only Hugging Face model"
    )


def _layers(decoder: nn.Module) -> nn.ModuleList:
    layers = _find_layers(decoder)
    assert layers is not None
    return layers


def _find_layers(decoder: nn.Module) -> nn.ModuleList | None:
    for name in _LAYERS:
        layers = getattr(decoder, name, None)
        if isinstance(layers, nn.ModuleList) and len(layers):
            return layers
    return None


def _has(layer: nn.Module, name: str) -> bool:
    return isinstance(getattr(layer, name, None), nn.Module)


@torch.no_grad()
def _inner_kinds(decoder: nn.Module, layers: nn.ModuleList, names: BlockNames) -> set[SiteKind]:
    """Which inner sites satisfy mid = pre + attn_out and post = mid + mlp_out in every layer."""
    seen: list[dict[str, Tensor]] = [{} for _ in layers]
    hooks: list[Any] = []

    def keep_input(layer: int, role: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> None:
            seen[layer][role] = layer_input(args, kwargs).float()

        return hook

    def keep_output(layer: int, role: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            seen[layer][role] = first_tensor(output).float()

        return hook

    try:
        for i, layer in enumerate(layers):
            hooks.append(layer.register_forward_pre_hook(keep_input(i, "pre"), with_kwargs=True))
            hooks.append(layer.register_forward_hook(keep_output(i, "post")))
            mid = layer.get_submodule(names.mid)
            hooks.append(mid.register_forward_pre_hook(keep_input(i, "mid"), with_kwargs=True))
            hooks.append(layer.get_submodule(names.attn).register_forward_hook(keep_output(i, "attn")))
            hooks.append(layer.get_submodule(names.mlp).register_forward_hook(keep_output(i, "mlp")))
        device = next(decoder.parameters()).device
        decoder(input_ids=torch.tensor([[0, 1, 2, 3]], device=device), use_cache=False)
    except (TypeError, KeyError, IndexError, RuntimeError):
        return set()  # an unusual layer: its input and output remain usable
    finally:
        for hook in hooks:
            hook.remove()

    # Half precision rounds each sum to 8 or 11 bits; a missing or scaled term is off by far more.
    tolerance = 1e-4 if next(decoder.parameters()).dtype in (torch.float32, torch.float64) else 3e-2

    def same(a: Tensor, b: Tensor) -> bool:
        return a.shape == b.shape and bool((a - b).norm() <= tolerance * b.norm())

    if any(len(s) < 5 for s in seen):
        return set()
    mid = all(same(s["pre"] + s["attn"], s["mid"]) for s in seen)
    if mid and all(same(s["mid"] + s["mlp"], s["post"]) for s in seen):
        return {"attn_out", "resid_mid", "mlp_out"}
    if all(same(s["pre"] + s["attn"] + s["mlp"], s["post"]) for s in seen):
        return {"attn_out", "mlp_out"}
    return set()
