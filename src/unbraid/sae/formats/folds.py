"""What other tools do around an autoencoder's two products, folded into its weights: exact, then gone.

With p = (x − b_dec) W_enc + b_enc, f = activation(p) and x̂ = f W_dec + b_dec:

- input times s, output over s: W_enc ← s W_enc, W_dec ← W_dec / s, b_dec ← b_dec / s; f stays.
- codes times c > 0, one number or one for each latent: W_enc, b_enc, threshold times c, W_dec over c; x̂
  stays.

Both hold for x in place of x − b_dec too, and a transcoder that reads x − b_dec is one that reads x with
b_enc − b_dec W_enc for b_enc. What differs from token to token (a layer norm, a division by each
token's norm) cannot be folded, and with it a latent would not be a linear probe that an Edit can carry, nor a
code decode without its token; such autoencoders are refused (`table.Must`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from unbraid.manifest.errors import UserError

State = dict[str, Tensor]
"""Weights by name: W_enc (d_in, d_sae), W_dec (d_sae, d_out), b_dec (d_out,), b_enc, threshold (d_sae,),
W_skip (d_out, d_in)."""


@dataclass(frozen=True, eq=False)
class Found:
    """What was read from a foreign autoencoder's files."""

    weights: Path
    """The file with the tensors."""
    config: Path
    """The file with the configuration; the weights' own where there is none."""
    tensors: Mapping[str, Tensor]
    """Tensors under their names."""
    record: Mapping[str, Any]
    """The configuration, with whatever the weights file says besides tensors."""

    def get(self, at: str) -> Any:
        """The configuration's value at a dotted name, None where it has none; "path" is the weights' path."""
        if at == "path":
            return self.weights.absolute().as_posix()
        value: Any = self.record
        for name in at.split("."):
            if not isinstance(value, Mapping):
                return None
            value = cast("Mapping[str, Any]", value).get(name)
        return value

    def text(self, at: str) -> str:
        """The value in words: a list's with commas, the name itself for true, empty for false and none."""
        value = self.get(at)
        if isinstance(value, list):
            return ",".join(map(str, cast("list[Any]", value)))
        return at if value is True else "" if value is None or value is False else str(value)

    def number(self, at: str) -> float:
        """A positive number of the configuration. Raises UserError naming file and field where it is none."""
        value = self.get(at)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise UserError(
                f"{self.config}: {at} is {value!r} but must be a number above 0; mend or fetch it again"
            )
        return float(value)


EMBEDDING = r"/(embedding)/width_[^/]+/[^/]+/params\.npz$"
"""Where Gemma Scope keeps the autoencoders of the embeddings."""

Fold = Callable[[State, Found], None]
"""Changes the weights in place."""


def scale_input(state: State, factor: float | Tensor) -> None:
    """The autoencoder of x whose weights were those of x times `factor`, a number or shape (d_in,); codes
    stay.
    """
    state["W_enc"] = state["W_enc"] * (factor[:, None] if isinstance(factor, Tensor) else factor)
    state["W_dec"], state["b_dec"] = state["W_dec"] / factor, state["b_dec"] / factor


def scale_codes(state: State, factor: float | Tensor) -> None:
    """The same reconstruction from codes times `factor`, a number or shape (d_sae,), above 0."""
    for name in ("W_enc", "b_enc", "threshold"):
        if name in state:
            state[name] = state[name] * factor
    state["W_dec"] = state["W_dec"] / (factor[:, None] if isinstance(factor, Tensor) else factor)


def centre_input(state: State, found: Found) -> None:
    """An input less b_dec where ours is read as it is: W_enc's part of that goes into b_enc."""
    state["b_enc"] = state["b_enc"] - state["b_dec"] @ state["W_enc"]


def unit_decoder(state: State) -> None:
    """Give every decoder row length 1 and the codes what it loses.

    For tools that compare a code times its row's length with the threshold, or with other codes: the
    threshold stays, since from here on the codes are that product.
    """
    threshold = state.pop("threshold", None)
    scale_codes(state, state["W_dec"].norm(dim=1).clamp(min=1e-8))
    if threshold is not None:
        state["threshold"] = threshold


def decoder_norms(state: State, found: Found) -> None:
    """`unit_decoder`, unless the configuration says that lengths do not count."""
    if found.get("sparsity_include_decoder_norm") is not False:
        unit_decoder(state)


def one_threshold(at: str) -> Fold:
    """The configuration's one threshold for all latents, on the codes as they are by then."""

    def fold(state: State, found: Found) -> None:
        state["threshold"] = torch.full_like(state["b_enc"], found.number(at))

    return fold


def exponential(state: State, found: Found) -> None:
    """Thresholds that were stored as logarithms."""
    state["threshold"] = state["threshold"].exp()


def dataset_norm(read: Callable[[Found], Sequence[float]]) -> Fold:
    """Undo an input whose sites, of d dimensions each, were scaled to the mean norm √d; codes come out in the
    raw input's units, those of several sites in units of the mean scale.

    `read` finds the data's mean norm at each site. Applies where norm_activation is "dataset-wise".
    """

    def fold(state: State, found: Found) -> None:
        if found.get("norm_activation") == "dataset-wise":
            norms = torch.tensor(read(found))
            d = len(state["W_enc"]) // len(norms)
            factors = math.sqrt(d) / norms
            scale_input(state, factors.repeat_interleave(d))
            scale_codes(state, 1 / float(factors.mean()))

    return fold


def embedding_scale(state: State, found: Found) -> None:
    """Gemma multiplies embeddings by √d_in after the place where their autoencoders were trained."""
    if re.search(EMBEDDING, found.get("path")):
        scale_input(state, len(state["W_enc"]) ** -0.5)
