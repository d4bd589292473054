"""Names of places in a model: ``layers.2.resid_post``, and the same place as other libraries call it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, cast

from unbraid.manifest.errors import UserError

SiteKind = Literal["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"]

# In the order in which a decoder layer computes them.
KINDS: tuple[SiteKind, ...] = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")

_OURS = re.compile(r"layers\.(\d+)\.(\w+)")
_TRANSFORMER_LENS = re.compile(r"blocks\.(\d+)\.hook_(\w+)")
_HUGGING_FACE = re.compile(r"(?:\w+\.)*(?:layers|h|layer|blocks|block)\.(\d+)(?:\.(\w+))?")
_SUBMODULES: dict[str, SiteKind] = {
    "self_attn": "attn_out",
    "attn": "attn_out",
    "attention": "attn_out",
    "self_attention": "attn_out",
    "mlp": "mlp_out",
    "feed_forward": "mlp_out",
}


@dataclass(frozen=True, order=True)
class Site:
    """A place in a model whose value is one vector of size d a token."""

    layer: int
    """The decoder layer, from 0."""
    kind: SiteKind
    """What is read there: the residual stream at three places, or what a sublayer adds to it."""

    def __post_init__(self) -> None:
        if self.layer < 0 or self.kind not in KINDS:
            raise ValueError(f"no such site: layer {self.layer}, kind {self.kind!r}")

    def __str__(self) -> str:
        return f"layers.{self.layer}.{self.kind}"

    @property
    def transformer_lens(self) -> str:
        """The hook name of the same place in TransformerLens."""
        return f"blocks.{self.layer}.hook_{self.kind}"

    @property
    def depth(self) -> int:
        """Place in the order of computation: an edit at a site reaches only sites of greater depth."""
        return self.layer * len(KINDS) + KINDS.index(self.kind)

    @classmethod
    def parse(cls, name: str | Site) -> Site:
        """Read a site's name in our form, TransformerLens' or Hugging Face's (a layer alone is its output).

        Raises UserError when the name is none of these.
        """
        if isinstance(name, Site):
            return name
        text = name.strip()
        for pattern in (_OURS, _TRANSFORMER_LENS):
            found = pattern.fullmatch(text)
            if found and found.group(2) in KINDS:
                return cls(int(found.group(1)), cast(SiteKind, found.group(2)))
        found = _HUGGING_FACE.fullmatch(text)
        if found:
            submodule = found.group(2)
            kind = "resid_post" if submodule is None else _SUBMODULES.get(submodule)
            if kind is not None:
                return cls(int(found.group(1)), kind)
        raise UserError(
            f"site {name!r} is not known; write layers.<number>.<kind> with one of {', '.join(KINDS)}"
        )
