"""A foreign format as one row of a table, and the little code that reads any autoencoder by its row."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from unbraid.manifest.errors import IntegrityError, UserError
from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.formats.folds import Fold, Found, State
from unbraid.sae.registry import ARCHITECTURES, build


@dataclass(frozen=True)
class Field:
    """Where the files say something."""

    at: str
    """Dotted name in the configuration, or "path" for the path of the weights file."""
    pattern: str = "(.+)"
    """Regular expression that is searched for in its text."""
    template: str = r"\1"
    """The field, from what the pattern caught."""
    default: str = ""
    """The field where the pattern catches nothing."""


@dataclass(frozen=True)
class Must:
    """What the configuration has to say for the autoencoder to be one of ours."""

    at: str
    """Dotted name of the field."""
    values: tuple[Any, ...]
    """The values that are honoured; None is a missing field."""
    otherwise: str
    """What another value means, as the end of a sentence."""


@dataclass(frozen=True)
class Variant:
    """One architecture of a format."""

    architecture: str
    """Ours, by its name in the registry."""
    tensors: Mapping[str, str]
    """Their names of our tensors, read as `named` does."""
    centred: bool | str = True
    """apply_b_dec_to_input, or the field that says so (false when missing)."""
    folds: tuple[Fold, ...] = ()
    """What is folded into the weights, in this order."""
    fields: Mapping[str, tuple[Field, ...]] = field(default_factory=dict[str, "tuple[Field, ...]"])
    """What its files say elsewhere than the format's others."""


@dataclass(frozen=True)
class Format:
    """How one tool stores autoencoders."""

    name: str
    """What the tool is called."""
    weights: tuple[str, ...]
    """Patterns of the weights file's path in the folder; the first that a file matches is taken."""
    config: str
    """Name of the configuration file; empty where there is none."""
    marks: tuple[str, ...]
    """Fields (without a configuration: tensors) by whose presence the format is known."""
    variants: Mapping[str, Variant]
    """The architectures, by the words that name them."""
    kind: tuple[Field, ...] = ()
    """Where these words are said: a text is one, and what is true is the field's own name."""
    refused: Mapping[str, str] = field(default_factory=dict[str, str])
    """What words that name none of the variants mean, as the end of a sentence; "" is that none is said."""
    fields: Mapping[str, tuple[Field, ...]] = field(default_factory=dict[str, "tuple[Field, ...]"])
    """Where site, target_site, k, model_name are said, and d_in, d_out, d_sae, which are only checked; the
    first place counts."""
    must: tuple[Must, ...] = ()
    """Conditions."""
    same: tuple[str, str] | None = None
    """Two fields, input and output; where they differ, `kind` ends with the word "transcoder"."""
    ignored: tuple[str, ...] = ()
    """Patterns of tensors that do not change the codes or the reconstruction."""


def interpret(row: Format, found: Found, k: int | None = None) -> SAE:
    """The autoencoder that a row finds in the files; `k` says what a TopK's files do not.

    Raises UserError, naming file and field, for what is not supported, and IntegrityError for missing tensors
    and shapes that do not fit.
    """
    _check(row, found)
    variant = _variant(row, found)
    _know_all(row, variant, found)
    kind = ARCHITECTURES[variant.architecture]
    fields = {**row.fields, **variant.fields}
    site = _field(fields, "site", found)
    sites = len(site.split(",")) if kind.reads == "sites" else 0
    state = _take(variant, found, sites)
    d_in, d_sae = state["W_enc"].shape
    d_out = state["b_dec"].numel() if kind.reads == "pair" else 0  # 0 is what it reads
    for name, size in (("d_in", d_in // (sites or 1)), ("d_sae", d_sae), ("d_out", d_out or d_in)):
        said = _field(fields, name, found)
        if said not in ("", "0", str(size)):
            raise IntegrityError(
                f"{found.weights}: its tensors mean {name} {size} but {found.config} says {said!r}; fetch or "
                "make it again"
            )
    centred = variant.centred
    config = SAEConfig(
        architecture=variant.architecture,
        d_in=d_in,
        d_sae=d_sae,
        k=_k(fields, found, k) if kind.uses_k else 0,
        site=site,
        model_name=_field(fields, "model_name", found),
        apply_b_dec_to_input=centred if isinstance(centred, bool) else found.get(centred) is True,
        d_out=d_out,
        target_site=_field(fields, "target_site", found) if d_out else "",
        blocks=(d_in // sites,) * sites if sites else (),
        metadata={"format": row.name},
    )

    def fold(state: State) -> None:
        for one in variant.folds:
            one(state, found)

    return assemble(config, state, found.weights, fold)


def assemble(config: SAEConfig, state: State, path: Path, fold: Callable[[State], None] | None = None) -> SAE:
    """The autoencoder with these weights after `fold`, frozen.

    Raises what `shapes` does, and IntegrityError, naming `path`, where a shape is not what the configuration
    means. A threshold beside a TopK autoencoder, which does not encode with it, is kept for its edits.
    """
    meant = {"threshold": torch.Size([config.d_sae]), **shapes(config, path)}
    _check_shapes(state, meant, path)
    for name, tensor in state.items():
        if tensor.isnan().any():
            raise IntegrityError(f"{path}: {name} holds values that are not numbers; fetch or make it again")
    if fold is not None:
        fold(state)
    sae = build(config)
    if "threshold" in state and "threshold" not in sae.state_dict():
        sae.register_buffer("threshold", torch.zeros(config.d_sae))
    sae.load_state_dict(state)
    return sae.requires_grad_(False)


def _check_shapes(state: State, meant: Mapping[str, Sequence[int]], path: Path) -> None:
    for name, tensor in state.items():
        if tuple(tensor.shape) != tuple(meant[name]):
            raise IntegrityError(
                f"{path}: {name} has shape {tuple(tensor.shape)} where {tuple(meant[name])} is meant; "
                "fetch or make it again"
            )


def shapes(config: SAEConfig, path: Path) -> dict[str, torch.Size]:
    """The weights' shapes by name, without room for one of them: a damaged file can ask for any size.

    Raises UserError, naming `path`, for a configuration that no autoencoder has.
    """
    try:
        with torch.device("meta"):
            return {name: tensor.shape for name, tensor in build(config).state_dict().items()}
    except (UserError, TypeError, RuntimeError) as error:  # the others: more than fits into 64 bits
        reason = error if isinstance(error, UserError) else f"{config.d_in} by {config.d_sae} is too large"
        raise UserError(f"{path}: {reason}") from error


def _variant(row: Format, found: Found) -> Variant:
    words, fields = [_said(place, found) for place in row.kind], [place.at for place in row.kind]
    if row.same:
        read, written = (found.get(name) for name in row.same)
        words += ["transcoder"] if read and written and read != written else []
        fields += row.same
    kind = " ".join(word for word in words if word)
    if kind not in row.variants:
        if kind in row.refused:
            raise UserError(f"{found.config}: {row.refused[kind]}")
        raise UserError(
            f"{found.config}: {', '.join(fields)} say {kind!r}, which is not supported for {row.name}; "
            f"choose one that is {' or '.join(row.variants)}"
        )
    return row.variants[kind]


def _check(row: Format, found: Found) -> None:
    for must in row.must:
        if (value := found.get(must.at)) not in must.values:
            raise UserError(f"{found.config}: {must.at} is {value!r}: {must.otherwise}")


def _know_all(row: Format, variant: Variant, found: Found) -> None:
    """Refuse a tensor that is not read: it might change what the autoencoder does."""
    taken = {name for theirs in variant.tensors.values() for name, _ in named(theirs)}
    for name in found.tensors:
        if name not in taken and not any(fnmatchcase(name, pattern) for pattern in row.ignored):
            raise UserError(
                f"{found.weights} has a tensor {name!r}, which is no part of a {variant.architecture} "
                f"of {row.name}; its kind is not supported"
            )


def named(theirs: str) -> list[tuple[str, bool]]:
    """The names that an entry of `Variant.tensors` allows, each with whether it is ours transposed.

    "b_D | decoder.bias | 0" is either, or zeros where both are missing; "encoder.weight.T" is their
    encoder.weight, transposed.
    """
    return [(name.removesuffix(".T"), name.endswith(".T")) for name in theirs.split(" | ")]


def _take(variant: Variant, found: Found, sites: int) -> State:
    """Their tensors as ours, in float32; one threshold for all becomes one for each latent, and what is
    stacked by `sites`, where that is not 0, stands side by side.
    """
    state: State = {}
    for ours, theirs in variant.tensors.items():
        there = [(found.tensors[name], turned) for name, turned in named(theirs) if name in found.tensors]
        if there:
            tensor, turned = there[0]
            state[ours] = (tensor.T if turned and tensor.ndim == 2 else tensor).float().contiguous()
        elif not theirs.endswith(" | 0"):
            raise IntegrityError(
                f"{found.weights} lacks the tensor {named(theirs)[0][0]}; fetch or make it again"
            )
    shape = tuple(state["W_enc"].shape)
    if len(shape) != (3 if sites else 2) or sites not in (0, shape[0]):
        wanted = f"a matrix for each of {sites} sites" if sites else "a matrix"
        raise IntegrityError(
            f"{found.weights}: {named(variant.tensors['W_enc'])[0][0]} has shape {shape} where {wanted} is "
            "meant; fetch or make it again"
        )
    if sites:
        state = _side_by_side(state, found.weights)
    d_in, d_sae = state["W_enc"].shape
    state = {"b_enc": torch.zeros(d_sae), "b_dec": torch.zeros(d_in), **state}
    if "threshold" in state and state["threshold"].numel() == 1:
        state["threshold"] = state["threshold"].reshape(1).repeat(d_sae)
    return state


def _side_by_side(state: State, path: Path) -> State:
    """One wide autoencoder from W_enc (sites, d, d_sae), b_enc (sites, d_sae), W_dec (sites, d_sae, d) and
    b_dec (sites, d), whose sites' pre-activations are added up.
    """
    sites, d, d_sae = state["W_enc"].shape
    matrices = {"W_enc": (sites, d, d_sae), "W_dec": (sites, d_sae, d)}
    _check_shapes(state, {**matrices, "b_enc": (sites, d_sae), "b_dec": (sites, d)}, path)
    return {
        "W_enc": state["W_enc"].flatten(0, 1),
        "b_enc": state["b_enc"].sum(dim=0),
        "W_dec": state["W_dec"].transpose(0, 1).flatten(1),
        "b_dec": state["b_dec"].flatten(),
    }


def _said(place: Field, found: Found) -> str:
    caught = re.search(place.pattern, found.text(place.at))
    return caught.expand(place.template) if caught else place.default


def _field(fields: Mapping[str, tuple[Field, ...]], name: str, found: Found) -> str:
    """The text of a field; empty where the files do not say."""
    return next(filter(None, (_said(place, found) for place in fields.get(name, ()))), "")


def _k(fields: Mapping[str, tuple[Field, ...]], found: Found, given: int | None) -> int:
    said = _field(fields, "k", found)
    if said.isdigit() and given not in (None, int(said)):
        raise UserError(f"{found.config} says k is {said}, not {given}; leave k out")
    if said.isdigit() or given is not None:
        return int(said) if said.isdigit() else int(given or 0)
    raise UserError(
        f"{found.weights} does not say how many latents fire (k), nor does its folder's name; give k"
    )
