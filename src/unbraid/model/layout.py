"""Where a model's sites are: for each the module that shows it, on which side, and how wide it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from torch import Tensor, nn

from unbraid.manifest.errors import UserError
from unbraid.model.sites import KINDS, Site, SiteKind, Stack

Arguments = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Place:
    """How one site is reached."""

    module: nn.Module
    """The module whose input or output is the activation."""
    side: Literal["input", "output"]
    """Which of the two."""
    width: int
    """Numbers a token."""
    flat: bool = False
    """The model has the tokens of all rows one after the other there, (B·T, width)."""
    overwritten: bool = False
    """The model later writes into this tensor, so what is kept has to be a copy."""


@dataclass(frozen=True, eq=False)
class Layout:
    """The parts of a model, or of one of its two stacks, that this room touches."""

    decoder: nn.Module
    """The stack of layers with its embedding and final norm; every forward pass goes through it."""
    layers: nn.ModuleList
    """The layers of the stack."""
    places: Mapping[Site, Place]
    """Every site of the stack whose defining identities hold numerically, in the order of computation."""
    missing: Mapping[SiteKind, str]
    """Why a kind of site is not there at all."""
    final_norm: nn.Module | None
    """The norm before the unembedding."""
    unembed: nn.Module | None
    """The map from the last activation to logits, weight (vocabulary, d)."""
    parameters: tuple[str, ...]
    """Names of the parameters of the stack's forward, in order."""
    heads: int | None = None
    """Attention heads a layer: attn_z is theirs, one after the other."""
    positions: bool = True
    """Whether the stack takes position_ids that count real tokens from 0."""
    stack: Stack = ""
    """encoder or decoder in a model that has both."""
    encoder: Layout | None = field(default=None, repr=False)
    """The other stack of an encoder-decoder model."""

    @property
    def kinds(self) -> frozenset[SiteKind]:
        """The kinds of sites that this stack has."""
        return frozenset(site.kind for site in self.places)

    @property
    def sites(self) -> tuple[Site, ...]:
        """All sites of the model in the order of computation, an encoder's first."""
        return (*(self.encoder.sites if self.encoder else ()), *self.places)

    def of(self, site: Site) -> Layout:
        """The layout of the stack that the site is in."""
        if self.encoder is not None and site.stack == "encoder":
            return self.encoder
        if site.stack != self.stack:
            known = f"write encoder.{site} or decoder.{site}" if self.encoder else "leave out its prefix"
            raise UserError(f"site {site} does not exist: {known}")
        return self

    def place(self, site: Site) -> Place:
        """How a site is reached; raises UserError unless the model has it."""
        layout = self.of(site)
        found = layout.places.get(site)
        if found is not None:
            return found
        if site.layer is not None and site.layer >= len(layout.layers):
            raise UserError(
                f"site {site} does not exist: the model's layers are 0 to {len(layout.layers) - 1}"
            )
        why = layout.missing.get(site.kind, "this layer has none")
        known = ", ".join(kind for kind in KINDS if kind in layout.kinds)
        raise UserError(f"site {site} does not exist in this model ({why}); it has the kinds {known}")

    def require(self, site: Site, *, edit: bool = False) -> None:
        """Raise UserError unless the model has this site; with `edit`, unless it can be changed there."""
        self.place(site)
        if edit and site.kind == "router":
            raise UserError(f"site {site} is only read: the experts are chosen before its logits are seen")
        if edit and site.stack == "encoder":
            raise UserError(f"site {site} is only read: edits are for the stack that generates")

    def width(self, site: Site) -> int:
        """Numbers a token at a site; raises UserError unless the model has it."""
        return self.place(site).width


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
