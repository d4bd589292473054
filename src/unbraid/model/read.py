"""Read activations at sites, computing no more of the model than they need."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

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
) -> dict[Site, Tensor]:
    """Activations at each site, shape (B, T, d) in the model's dtype, for tokens and 0/1 mask (B, T).

    Rows may be padded on either side; what stands at padded places is meaningless. With `stop_early` no layer
    after the deepest site is computed. Edits that are in force (`apply.applied`) are seen. Raises UserError
    when a site does not exist.
    """
    if not sites:
        return {}
    with collected(lm.layout, sites, stop=stop_early) as found, suppress(_LastSiteReached):
        lm.layout.decoder(**lm.inputs(input_ids, attention_mask), use_cache=False)
    return {site: found[site] for site in sites}


@torch.no_grad()
def logits_and_sites(
    lm: LanguageModel, input_ids: Tensor, attention_mask: Tensor, sites: Sequence[Site] = ()
) -> tuple[Tensor, dict[Site, Tensor]]:
    """Logits (B, T, vocabulary) and the activations at each site (B, T, d) of one full forward pass."""
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
