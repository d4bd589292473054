"""Put a function at a site: to look at the activation there, or to change it for all that comes after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from unbraid.model.layout import (
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
    layout.require(site, edit=True)
    if site.kind != "resid_mid":
        return _at(layout, site, lambda x: step(x, x))

    # resid_mid has two readers, the next norm and the residual connection: both get it through attn_out.
    assert site.layer is not None
    entering: list[Tensor] = []

    def on_enter(_: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> None:
        entering[:] = [layer_input(args, kwargs)]

    layer = layout.of(site).layers[site.layer]
    return [
        layer.register_forward_pre_hook(on_enter, with_kwargs=True),
        *_at(
            layout,
            Site(site.layer, "attn_out", site.stack),
            lambda carrier: step(entering.pop() + carrier, carrier),
        ),
    ]


def watch(layout: Layout, site: Site, see: Callable[[Tensor], None]) -> list[Any]:
    """Call `see` with the activation (B, T, d) at a site in every forward pass; returns its hooks."""
    place = layout.place(site)

    def look(x: Tensor) -> None:
        see(x.clone() if place.overwritten else x)

    # Where no norm stands before the MLP, its input shows two sites: an edit of mlp_in must not be seen here.
    return _at(layout, site, look, first=site.kind == "resid_mid")


def _at(
    layout: Layout, site: Site, function: Callable[[Tensor], Tensor | None], *, first: bool = False
) -> list[Any]:
    """Hooks that call a function with the activation (B, T, d); what it returns takes its place."""
    place = layout.place(site)
    handles: list[Any] = []
    rows: list[int] = []  # B, in families that run the rows' tokens together

    def changed(x: Tensor) -> Tensor | None:
        if not place.flat:
            return function(x)
        new = function(x.unflatten(0, (rows[0], -1)))
        return None if new is None else new.flatten(0, 1)

    def on_input(_: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> Any:
        new = changed(layer_input(args, kwargs))
        return None if new is None else with_layer_input(args, kwargs, new)

    def on_output(_: nn.Module, __: Any, output: Any) -> Any:
        new = changed(first_tensor(output))
        return None if new is None else with_first_tensor(output, new)

    if place.flat:
        assert site.layer is not None

        def on_enter(_: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> None:
            rows[:] = [len(layer_input(args, kwargs))]

        layer = layout.of(site).layers[site.layer]
        handles.append(layer.register_forward_pre_hook(on_enter, with_kwargs=True))
    if place.side == "input":
        handles.append(place.module.register_forward_pre_hook(on_input, with_kwargs=True, prepend=first))
    else:
        handles.append(place.module.register_forward_hook(on_output))
    return handles
