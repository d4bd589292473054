"""Read activations at sites, computing no more of the model than they need."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from unbraid.manifest.errors import UserError
from unbraid.model.hooks import watch
from unbraid.model.layout import Layout
from unbraid.model.load import LanguageModel
from unbraid.model.sites import Site


class _LastSiteReached(Exception):
    """Leaves the forward pass once the deepest site has been read."""


@torch.no_grad()
def read_sites(
    lm: LanguageModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    sites: Sequence[Site],
    *,
    stop_early: bool = True,
    packed: bool = False,
    decoder_input_ids: Tensor | None = None,
) -> dict[Site, Tensor]:
    """Activations at each site, shape (B, T, d) in the model's dtype, for tokens and 0/1 mask (B, T).

    Rows may be padded on either side; what stands at padded places is meaningless. With `packed` a row holds
    several documents one after the other, which the mask numbers from 1, and each is read as if it were
    alone. Sites in the decoder of an encoder-decoder model need `decoder_input_ids` (B, T'), and are (B, T',
    d). With `stop_early` no layer after the deepest site is computed. Edits that are in force
    (`apply.applied`) are seen. Raises UserError when a site does not exist, or when the model cannot read
    packed rows.
    """
    if not sites:
        return {}
    inputs = lm.packed_inputs(input_ids, attention_mask) if packed else lm.inputs(input_ids, attention_mask)
    stack = lm.layout.decoder
    if lm.layout.encoder is not None:
        stack = lm.layout.encoder.decoder
        if any(site.stack == "decoder" for site in sites):
            if decoder_input_ids is None:
                raise UserError(f"the decoder of {lm.name} reads tokens of its own; give decoder_input_ids")
            stack, inputs["decoder_input_ids"] = lm.model, decoder_input_ids.to(lm.device)
    return _read(lm, sites, stop_early, lambda: stack(**inputs, use_cache=False))


@torch.no_grad()
def read_images(
    lm: LanguageModel, pixel_values: Tensor, sites: Sequence[Site], *, stop_early: bool = True
) -> dict[Site, Tensor]:
    """Activations of a vision transformer at each site, shape (B, T, d): its class token, then its patches.

    pixel_values: (B, channels, height, width), as the model's image processor makes them. Raises UserError
    when a site does not exist or the model reads no images.
    """
    if lm.model.main_input_name != "pixel_values":
        raise UserError(f"{lm.name} reads tokens, no images; use read_sites")
    return _read(lm, sites, stop_early, lambda: lm.layout.decoder(pixel_values.to(lm.device)))


def _read(
    lm: LanguageModel, sites: Sequence[Site], stop: bool, run: Callable[[], object]
) -> dict[Site, Tensor]:
    with collected(lm.layout, sites, stop=stop) as found, suppress(_LastSiteReached):
        run()
    return {site: found[site] for site in sites}


@torch.no_grad()
def logits_and_sites(
    lm: LanguageModel, input_ids: Tensor, attention_mask: Tensor, sites: Sequence[Site] = ()
) -> tuple[Tensor, dict[Site, Tensor]]:
    """Logits (B, T, vocabulary) and the activations at each site (B, T, d) of one full forward pass.

    Raises UserError for a model without logits, or with a decoder that reads tokens of its own.
    """
    if lm.layout.encoder is not None or lm.layout.unembed is None:
        raise UserError(f"{lm.name} gives no logits for the tokens that it reads; only its sites can be read")
    with collected(lm.layout, sites) as found:
        logits = lm.model(**lm.inputs(input_ids, attention_mask), use_cache=False).logits
    return logits, {site: found[site] for site in sites}


@contextmanager
def collected(layout: Layout, sites: Sequence[Site], *, stop: bool = False) -> Generator[dict[Site, Tensor]]:
    """While open, forward passes put each site's activation into the dictionary; `stop` ends them there."""
    for site in sites:
        layout.require(site)
    found: dict[Site, Tensor] = {}
    last = max(sites, key=lambda s: s.depth, default=None) if stop else None
    hooks: list[Any] = []
    try:
        # By depth, for two sites may share a module, and the deepest ends the pass.
        for site in sorted(set(sites), key=lambda s: s.depth):

            def keep(x: Tensor, site: Site = site) -> None:
                found[site] = x
                if site == last:
                    raise _LastSiteReached

            hooks.extend(watch(layout, site, keep))
        yield found
    finally:
        for hook in hooks:
            hook.remove()
