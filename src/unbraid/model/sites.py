"""Names of places in a model: ``layers.2.resid_post``, and the same place as other libraries call it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, cast, get_args

from unbraid.manifest.errors import UserError

SiteKind = Literal[
    "resid_pre",
    "attn_z",
    "attn_out",
    "resid_mid",
    "cross_out",
    "mlp_in",
    "router",
    "mlp_out",
    "resid_post",
    "final_norm",
]
Stack = Literal["", "encoder", "decoder"]

KINDS: tuple[SiteKind, ...] = get_args(SiteKind)
"""In the order in which a layer computes them; final_norm comes after all layers."""
STREAM_KINDS: tuple[SiteKind, ...] = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
"""The residual stream and what is added to it: resid_pre + attn_out = resid_mid, + mlp_out = resid_post."""

# TransformerLens' names that mean exactly the same. Two that look as if they did: its hook_mlp_in stands
# before the MLP's norm, and its hook_normalized before the norm's own scale.
_IN_TRANSFORMER_LENS: dict[SiteKind, str] = {
    **{kind: f"blocks.{{}}.hook_{kind}" for kind in STREAM_KINDS},
    "attn_z": "blocks.{}.attn.hook_z",
    "mlp_in": "blocks.{}.mlp.hook_in",
    "router": "blocks.{}.mlp.gate.hook_out",
    "final_norm": "ln_final.hook_out",
}
_OURS = re.compile(r"(?:(encoder|decoder)\.)?(?:layers\.(\d+)\.)?(\w+)")
_HUGGING_FACE = re.compile(r"(?:\w+\.)*(?:layers|h|layer|blocks|block)\.(\d+)(?:\.(\w+))?")
_SUBMODULES: dict[str, SiteKind] = {
    "self_attn": "attn_out",
    "attn": "attn_out",
    "attention": "attn_out",
    "self_attention": "attn_out",
    "mlp": "mlp_out",
    "feed_forward": "mlp_out",
}


@dataclass(frozen=True)
class Site:
    """A place in a model whose value is one vector a token."""

    layer: int | None
    """The layer, from 0; None for final_norm, which stands after all layers."""
    kind: SiteKind
    """What is read there: the residual stream at three places, what a sublayer adds to it or reads, …"""
    stack: Stack = ""
    """Which stack of layers, in a model that has an encoder and a decoder; empty in all others."""

    def __post_init__(self) -> None:
        layer = self.layer
        if self.kind not in KINDS or (layer is None) != (self.kind == "final_norm") or (layer or 0) < 0:
            raise ValueError(f"no such site: layer {layer}, kind {self.kind!r}")

    def __str__(self) -> str:
        place = self.kind if self.layer is None else f"layers.{self.layer}.{self.kind}"
        return f"{self.stack}.{place}" if self.stack else place

    @property
    def transformer_lens(self) -> str:
        """The hook name of the same place in TransformerLens; raises UserError where it has none."""
        name = _IN_TRANSFORMER_LENS.get(self.kind)
        if name is None or self.stack:
            raise UserError(f"TransformerLens has no hook that means what {self} means")
        return name.format(self.layer)

    @property
    def depth(self) -> tuple[bool, float, int]:
        """Place in the order of computation: an edit at a site reaches only sites of greater depth."""
        layer = math.inf if self.layer is None else self.layer
        return self.stack == "decoder", layer, KINDS.index(self.kind)

    @classmethod
    def parse(cls, name: str | Site) -> Site:
        """Read a site's name in our form, TransformerLens' or Hugging Face's (a layer alone is its output).

        Raises UserError when the name is none of these.
        """
        if isinstance(name, Site):
            return name
        text = name.strip()
        found = _OURS.fullmatch(text)
        if found and found.group(3) in KINDS and (found.group(2) is None) == (found.group(3) == "final_norm"):
            stack, layer, kind = found.groups(default="")
            return cls(int(layer) if layer else None, cast(SiteKind, kind), cast(Stack, stack))
        for kind, form in _IN_TRANSFORMER_LENS.items():
            found = re.fullmatch(re.escape(form).replace(r"\{\}", r"(\d+)"), text)
            if found:
                return cls(int(found.group(1)) if found.groups() else None, kind)
        found = _HUGGING_FACE.fullmatch(text)
        if found and not text.startswith(("encoder.", "decoder.")):
            submodule = found.group(2)
            kind = "resid_post" if submodule is None else _SUBMODULES.get(submodule)
            if kind is not None:
                return cls(int(found.group(1)), kind)
        raise UserError(
            f"site {name!r} is not known; write layers.<number>.<kind> with one of {', '.join(KINDS[:-1])},"
            " or final_norm; models with two stacks have encoder. or decoder. before it"
        )
