"""Put a function at a site: to look at the activation there, or to change it for all that comes after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from unbraid.model.families import (
    Arguments,
    Layout,
    first_tensor,
    layer_input,
    with_first_tensor,
    with_layer_input,
)
from unbraid.model.sites import Site

Step = Callable[[Tensor, Tensor], "Tensor | None"]
"""Given the activation x (B, T, d) at a site and the tensor that carries it there, the new carrier or None.

The two are the same tensor except at resid_mid, where attn_out carries x = resid_pre + attn_out.
"""


def install(layout: Layout, site: Site, step: Step) -> list[Any]:
    """Put a step that may change the activation at its site; returns the handles of its hooks."""
    layer = layout.layers[site.layer]

    def on_input(_: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> Any:
        x = layer_input(args, kwargs)
        changed = step(x, x)
        return None if changed is None else with_layer_input(args, kwargs, changed)

    def on_output(_: nn.Module, __: Any, output: Any) -> Any:
        x = first_tensor(output)
        changed = step(x, x)
        return None if changed is None else with_first_tensor(output, changed)

    match site.kind:
        case "resid_pre":
            return [layer.register_forward_pre_hook(on_input, with_kwargs=True)]
        case "resid_post":
            return [layer.register_forward_hook(on_output)]
        case "mlp_out":
            return [layout.mlp(site.layer).register_forward_hook(on_output)]
        case "attn_out":
            return [layout.attn(site.layer).register_forward_hook(on_output)]
        case "resid_mid":
            pass

    # resid_mid has two readers, the next norm and the residual connection: both get it through attn_out.
    entering: list[Tensor] = []

    def on_enter(_: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> None:
        entering[:] = [layer_input(args, kwargs)]

    def on_attn(_: nn.Module, __: Any, output: Any) -> Any:
        carrier = first_tensor(output)
        changed = step(entering.pop() + carrier, carrier)
        return None if changed is None else with_first_tensor(output, changed)

    return [
        layer.register_forward_pre_hook(on_enter, with_kwargs=True),
        layout.attn(site.layer).register_forward_hook(on_attn),
    ]


def watch(layout: Layout, site: Site, see: Callable[[Tensor], None]) -> Any:
    """Call `see` with the activation (B, T, d) at a site in every forward pass; returns the hook's handle."""

    def on_input(_: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> None:
        see(layer_input(args, kwargs))

    def on_output(_: nn.Module, __: Any, output: Any) -> None:
        see(first_tensor(output))

    if site.kind == "resid_pre":
        return layout.layers[site.layer].register_forward_pre_hook(on_input, with_kwargs=True)
    if site.kind == "resid_mid":
        return layout.mid(site.layer).register_forward_pre_hook(on_input, with_kwargs=True)
    module = {"attn_out": layout.attn, "mlp_out": layout.mlp, "resid_post": layout.layers.__getitem__}[
        site.kind
    ]
    return module(site.layer).register_forward_hook(on_output)
