"""Run only what comes after a site: from a kept residual stream on, to logits of chosen tokens alone.

Layers before the site are not computed again, and the unembedding, which in a small model is most of the
work, is applied to the tokens that are asked for. Whether a model can be run so is found out by trying; one
that cannot is run from its tokens, with the same result.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from unbraid.manifest.errors import UserError
from unbraid.model.layout import first_tensor, layer_input, with_first_tensor
from unbraid.model.load import LanguageModel
from unbraid.model.replace import replaced
from unbraid.model.sites import Site

TRIED = 1e-5
"""Relative error up to which a shortcut counts as the model itself."""


class Tail:
    """What comes after a site in a model."""

    def __init__(self, lm: LanguageModel, site: Site) -> None:
        """Raises UserError for a model without logits for the tokens that it reads, or without the site."""
        if lm.layout.encoder is not None or lm.layout.unembed is None:
            raise UserError(
                f"{lm.name} gives no logits for the tokens that it reads; only its sites can be read"
            )
        lm.layout.require(site, edit=True)
        self.lm, n = lm, lm.n_layers
        self.first = n if site.layer is None else site.layer + (site.kind == "resid_post")
        """The first layer that is run."""
        self.entry = Site(self.first, "resid_pre") if self.first < n else Site(n - 1, "resid_post")
        """The site whose activations have to be kept to resume from."""
        self._outputs: list[Any] = []
        self.splits = self.resumes = self.whole = False
        """What `_try` finds out: whether the logits are the unembedding of the last hidden state, whether the
        layers before `first` can be left out, and whether nothing passes by the site, so that all that comes
        after depends on the activations there alone."""
        self._try(site)

    @torch.no_grad()
    def states(self, input_ids: Tensor, attention_mask: Tensor, stream: Tensor | None) -> Tensor:
        """What `logits` reads, (B, T, ·), of tokens and mask (B, T); `stream` (B, T, d) holds the activations
        at `entry`, or is None to run from the tokens. What is in force at the site (`replace.replaced`) is
        seen."""
        inputs = self.lm.inputs(input_ids, attention_mask)
        with self._resumed(stream if self.resumes else None):
            if not self.splits:
                return self.lm.model(**inputs, use_cache=False).logits
            return first_tensor(self.lm.layout.decoder(**inputs, use_cache=False).last_hidden_state)

    @torch.no_grad()
    def logits(self, states: Tensor) -> Tensor:
        """Logits (n, vocabulary) in float32 of the states (n, ·) of n tokens."""
        unembed: Any = self.lm.layout.unembed
        return (unembed(states) if self.splits else states).float()

    @contextmanager
    def _resumed(self, stream: Tensor | None) -> Generator[None]:
        """While open, layers before `first` pass on what they are given, the last of them `stream`."""
        if stream is None or not self.first:
            yield
            return
        layers = list(self.lm.layout.layers)[: self.first]

        def stand_in(number: int) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                given = stream if number == self.first - 1 else layer_input(args, kwargs)
                return with_first_tensor(self._outputs[number], given)

            return forward

        try:
            for number, layer in enumerate(layers):
                layer.forward = stand_in(number)  # the instance's, which hides the class's
            yield
        finally:
            for layer in layers:
                layer.__dict__.pop("forward", None)

    @torch.no_grad()
    def _try(self, site: Site) -> None:
        """Find out on two rows of eight tokens which shortcuts give what the model gives."""
        lm, layers = self.lm, list(self.lm.layout.layers)
        ids = torch.arange(16, device=lm.device).reshape(2, 8) % lm.config.vocab_size
        mask = torch.ones_like(ids)
        streams: list[Tensor] = []

        def keep(_: Any, __: Any, output: Any) -> None:
            self._outputs.append(with_first_tensor(output, first_tensor(output)[:0]))
            streams.append(first_tensor(output).clone())

        hooks = [layer.register_forward_hook(keep) for layer in layers[: self.first]]
        try:
            logits = lm.model(**lm.inputs(ids, mask), use_cache=False).logits.float()
        finally:
            for hook in hooks:
                hook.remove()
        allowed = TRIED if lm.model.dtype in (torch.float32, torch.float64) else 1e-2

        def holds(name: str, stream: Tensor | None) -> bool:
            setattr(self, name, True)
            try:
                found = self.logits(self.states(ids, mask, stream))
            except (TypeError, KeyError, IndexError, RuntimeError, ValueError, AttributeError):
                return False
            return found.shape == logits.shape and bool((found - logits).norm() <= allowed * logits.norm())

        self.splits = holds("splits", None)
        self.resumes = bool(streams) and holds("resumes", streams[-1])
        with replaced(lm, site, torch.zeros_like, mask.bool()):
            one, other = self.states(ids, mask, streams[-1] if streams else None).float()
        self.whole = bool((one - other).norm() <= allowed * one.norm())
