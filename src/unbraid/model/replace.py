"""Replace the activation at a site by a function of it: a reconstruction, an ablation."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch
from torch import Tensor

from unbraid.model.hooks import install
from unbraid.model.load import LanguageModel
from unbraid.model.sites import Site


@contextmanager
def replaced(
    lm: LanguageModel,
    site: Site,
    function: Callable[[Tensor], Tensor],
    mask: Tensor,
    *,
    gradient: bool = False,
) -> Generator[None]:
    """While open, forward passes go on with `function(x)` in place of x at `site`, where `mask` is true.

    function: activations (n, d) at the chosen tokens, in their order in the batch, to (n, d). mask: (B,
    T) booleans of the forward passes' shape. Tokens outside the mask keep their activation bit for bit. A
    replaced resid_mid is carried by attn_out, as an edit is. With `gradient` the passes can be differentiated
    in what the function depends on. Raises UserError when the site does not exist.
    """
    lm.layout.require(site, edit=True)

    def step(x: Tensor, carrier: Tensor) -> Tensor:
        where = mask.to(x.device)
        new = function(x[where]).to(x.dtype)
        out = carrier.clone()
        out[where] = new if carrier is x else carrier[where] + (new - x[where])
        return out

    hooks = install(lm.layout, site, step)
    try:
        with torch.set_grad_enabled(gradient):
            yield
    finally:
        for hook in hooks:
            hook.remove()
