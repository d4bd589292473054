"""What a capture reads of a model: its options, and the activations and columns of a batch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from unbraid.activations.plan import Piece, Plan
from unbraid.activations.rows import Stored, misfit
from unbraid.activations.scrub import Scrubber
from unbraid.activations.space import parse_size
from unbraid.activations.strata import Strata
from unbraid.activations.text import Document, Positions
from unbraid.manifest.errors import UserError
from unbraid.model.load import LanguageModel
from unbraid.model.read import read_sites
from unbraid.model.sites import Site

WANTED: dict[Positions, str] = {
    "all": "token",
    "reply": "token of an assistant's reply",
    "focus": "token in a focus",
    "mask": "token in a mask",
    "last": "token",
}


@dataclass(frozen=True)
class ReadOptions:
    """Which activations a corpus gives, whether they are stored or trained on at once."""

    tokens: int | None = None
    """Tokens to capture, exactly, in the corpus' order; None means the whole corpus. With --append, so many
    more."""
    context: int = 256
    """Tokens the model reads at once; a longer document is cut into windows of this length."""
    batch_tokens: int = 4096
    """Tokens in a padded batch."""
    positions: Positions = "all"
    """Which tokens are kept: all, or those of assistant replies, of the documents' focus, of the documents'
    mask, or each document's last one."""
    per_document: int | None = None
    """Tokens kept of a document at most, drawn at random from all of it."""
    per_stratum: int | None = None
    """Favour rare strata: documents taken of each stratum in full; its n-th after these with probability
    √(this / n). Documents name theirs in the field stratum."""
    scrub: bool = False
    """Replace e-mail addresses, phone numbers, names, cards, postal addresses and keys by <EMAIL> and so on,
    before anything is read or stored; they are counted by kind. Much is missed: benchmarks/RESULTS.md."""
    scrub_model: str | None = None
    """An installed spaCy pipeline, whose persons --scrub takes for names as well."""
    dtype: Stored = "float16"
    """How activations are stored. int8: half of float16's bytes, a scale for each row; the manifest says what
    share of the variance that takes."""

    def __post_init__(self) -> None:
        _at_least_1(self, "tokens", "context", "batch_tokens", "per_document", "per_stratum")
        if self.scrub_model and not self.scrub:
            raise UserError("scrub_model is given without scrub; add --scrub or leave out --scrub-model")
        for name, known in (("positions", get_args(Positions)), ("dtype", get_args(Stored))):
            if (value := getattr(self, name)) not in known:
                raise UserError(f"{name} {value!r} is not known; choose --{name} from {', '.join(known)}")


@dataclass(frozen=True)
class CaptureOptions(ReadOptions):
    """How to capture; the command line shows these as they are."""

    skip_norm_above: float | None = None
    """Skip tokens whose norm is more than this many times the median at any site; --tokens counts them."""
    shard_tokens: int = 32768
    """Tokens in a shard; a killed run loses at most twice as many."""
    disk_budget: str | None = None
    """What the capture may take on the disk at most, such as 20GB. This and the free space are checked before
    anything is read, or before each shard where the corpus' length decides."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.disk_budget is not None:
            parse_size(self.disk_budget, "--disk-budget")
        _at_least_1(self, "shard_tokens")
        if self.skip_norm_above is not None and not 1 < self.skip_norm_above < float("inf"):
            raise UserError(f"skip_norm_above is {self.skip_norm_above}; choose a --skip-norm-above beyond 1")


def _at_least_1(options: ReadOptions, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; choose a --{name.replace('_', '-')} of at least 1")


@dataclass(frozen=True)
class CaptureConfig(CaptureOptions):
    """What to capture and how; `sites` is given by name."""

    sites: tuple[Site, ...] = field(kw_only=True)
    """Places in the model to read, all in one pass; names are parsed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        sites = tuple(Site.parse(site) for site in self.sites)
        object.__setattr__(self, "sites", sites)
        if not sites or len(set(sites)) < len(sites):
            raise UserError("no --site is given, or one is given twice; give each site to capture once")


def widths_of(lm: LanguageModel, config: CaptureConfig) -> dict[str, int]:
    """Width of each site by name."""
    return {str(site): lm.layout.width(site) for site in config.sites}


def plan_of(
    lm: LanguageModel,
    documents: Iterable[Document],
    config: CaptureConfig,
    seed: int,
    strata: Strata | None,
    scrubber: Scrubber | None,
    before: str = "",
) -> Plan:
    """What is to be read of the documents that the strata choose, scrubbed; `before` is the digest of what an
    earlier capture has read."""
    if strata is not None:
        documents = strata.sample(documents)
    if scrubber is not None:
        documents = scrubber.documents(documents)
    return Plan(
        lm,
        documents,
        config.context,
        config.batch_tokens,
        config.positions,
        config.tokens,
        config.per_document,
        seed,
        before=before,
    )


def read_batch(
    lm: LanguageModel, batch: list[Piece], config: CaptureConfig
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The model's activations (n, d) by site and the columns (n,), for the batch's n wanted tokens, in the
    order of its pieces."""
    shape = (len(batch), max(len(piece.window.input_ids) for piece in batch))
    ids = np.full(shape, lm.pad_id, dtype=np.int64)
    # Padding stands on the right, where a causal model's real tokens never look.
    mask, keep = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.bool_)
    documents, positions = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.int32)
    for row, piece in enumerate(batch):
        length = len(piece.window.input_ids)
        ids[row, :length] = piece.window.input_ids
        mask[row, :length] = 1
        keep[row, :length] = piece.keep
        documents[row] = piece.document
        positions[row, :length] = piece.window.positions
    read = read_sites(
        lm, torch.from_numpy(ids).to(lm.device), torch.from_numpy(mask).to(lm.device), list(config.sites)
    )
    wanted = torch.from_numpy(keep)
    values = {str(site): read[site][wanted.to(read[site].device)] for site in config.sites}
    columns = {"tokens": ids.astype(np.int32), "documents": documents, "positions": positions}
    return values, {name: torch.from_numpy(column[keep]) for name, column in columns.items()}


def check_range(
    rows: Tensor, site: str, config: CaptureConfig, documents: Tensor, batch: list[Piece]
) -> None:
    """Refuse values that the stored type cannot hold."""
    found = misfit(rows, config.dtype)
    if found is None:
        return
    worst, value = found
    ids = {piece.document: piece.window.id for piece in batch}
    where = f"at {site} in document {ids[int(documents[worst])]}"
    if math.isinf(value):
        raise UserError(f"the model gives a value that is not finite {where}; load it with another dtype")
    raise UserError(
        f"the value {value:.6g} {where} is beyond float16's {torch.finfo(torch.float16).max:.0f};"
        " capture with --dtype float32 into another --out"
    )


def check_fits(lm: LanguageModel, config: CaptureConfig) -> None:
    """Raise UserError where a site or the context does not fit the model, or the model reads no text."""
    if lm.tokenizer is None:
        raise UserError(f"{lm.name} reads images, and a capture reads text; use read_images from Python")
    for site in config.sites:
        lm.layout.require(site)
        if site.stack == "decoder":
            raise UserError(
                f"{site} is in a decoder that reads tokens of its own; of {lm.name} capture the encoder"
            )
    if lm.context is not None and config.context > lm.context:
        raise UserError(
            f"context {config.context} is longer than the {lm.context} tokens {lm.name} can read; choose a"
            " shorter --context"
        )


def computed_in(lm: LanguageModel) -> str:
    """What the model computes in: the same weights give other activations in another precision."""
    return str(lm.model.dtype).removeprefix("torch.")


def settings_of(
    lm: LanguageModel, config: CaptureConfig, seed: int, scrubber: Scrubber | None
) -> dict[str, Any]:
    """All that the bytes of a shard depend on but the documents, and what a reader wants to know of it."""
    return {
        "model": lm.id,
        "name": lm.name,
        "d_in": lm.d_in,
        "tokenizer": lm.tokenizer_id,
        "computed": computed_in(lm),
        "device": torch.device(lm.device).type,
        "torch": torch.__version__,
        "sites": [str(site) for site in config.sites],
        "widths": list(widths_of(lm, config).values()),
        "tokens": config.tokens,
        "context": config.context,
        "batch_tokens": config.batch_tokens,
        "positions": config.positions,
        "dtype": config.dtype,
        "shard_tokens": config.shard_tokens,
        "per_document": config.per_document,
        "per_stratum": config.per_stratum,
        "skip_norm_above": config.skip_norm_above,
        "scrub": None if scrubber is None else scrubber.versions,
        "seed": seed if config.per_document or config.per_stratum else None,
    }
