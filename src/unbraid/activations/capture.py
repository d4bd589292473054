"""Read a model's activations over a corpus into shards on disk."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from unbraid.activations.norms import SKIPPED, NormLimit
from unbraid.activations.plan import Piece, Plan
from unbraid.activations.scrub import Scrubber
from unbraid.activations.shards import ShardWriter
from unbraid.activations.store import KIND, ActivationStore
from unbraid.activations.strata import Strata
from unbraid.activations.text import Document, Positions
from unbraid.manifest.errors import UserError
from unbraid.manifest.files import building
from unbraid.manifest.progress import Progress
from unbraid.manifest.record import write_manifest
from unbraid.model.load import LanguageModel
from unbraid.model.read import read_sites
from unbraid.model.sites import Site

LARGEST_FLOAT16 = 65504.0
WANTED: dict[Positions, str] = {
    "all": "token",
    "reply": "token of an assistant's reply",
    "focus": "token in a focus",
    "mask": "token in a mask",
    "last": "token",
}


@dataclass(frozen=True)
class CaptureOptions:
    """How to capture; the command line shows these as they are."""

    tokens: int | None = None
    """Tokens to capture, exactly, in the corpus' order; None means the whole corpus."""
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
    skip_norm_above: float | None = None
    """Skip tokens whose norm is more than this many times the median at any site; --tokens counts them."""
    scrub: bool = False
    """Replace e-mail addresses, phone numbers, names, cards, postal addresses and keys by <EMAIL> and so on,
    before anything is read or stored; they are counted by kind. Much is missed: benchmarks/RESULTS.md."""
    scrub_model: str | None = None
    """An installed spaCy pipeline, whose persons --scrub takes for names as well."""
    dtype: Literal["float16", "float32"] = "float16"
    """How activations are stored."""
    shard_tokens: int = 32768
    """Tokens in a shard; a killed run loses at most this many."""

    def __post_init__(self) -> None:
        counts = ("tokens", "context", "batch_tokens", "shard_tokens", "per_document", "per_stratum")
        for name in counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; choose a --{name.replace('_', '-')} of at least 1")
        if self.skip_norm_above is not None and not 1 < self.skip_norm_above < float("inf"):
            raise UserError(f"skip_norm_above is {self.skip_norm_above}; choose a --skip-norm-above beyond 1")
        if self.scrub_model and not self.scrub:
            raise UserError("scrub_model is given without scrub; add --scrub or leave out --scrub-model")
        for name, known in (("positions", get_args(Positions)), ("dtype", ("float16", "float32"))):
            if (value := getattr(self, name)) not in known:
                raise UserError(f"{name} {value!r} is not known; choose --{name} from {', '.join(known)}")


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


def capture(
    lm: LanguageModel,
    documents: Iterable[Document],
    config: CaptureConfig,
    out: Path | str,
    *,
    seed: int = 0,
    command: str = "",
    progress: Progress | None = None,
) -> ActivationStore:
    """Read `documents` through the model and store the activations of their tokens in the folder `out`.

    BOS, EOS and PAD are never captured. A document longer than the context becomes several windows under
    one document id. Killed and called again with the same arguments, it goes on after the last finished
    shard, and the files come out byte for byte as if it had never been killed (same machine and versions).
    `seed` decides what `per_document` and `per_stratum` draw. Memory does not grow with the corpus.

    Raises UserError when `out` exists, a site or context does not fit the model, no token is found, a value
    does not fit the stored type, or a partial run in the way was made with other settings or documents;
    IntegrityError when a finished shard of a partial run is damaged.
    """
    _fits(lm, config)
    scrubber = Scrubber(config.scrub_model) if config.scrub else None
    with building(Path(out)) as folder:
        strata = None if config.per_stratum is None else Strata(config.per_stratum, seed)
        if strata is not None:
            documents = strata.sample(documents)
        if scrubber is not None:
            documents = scrubber.documents(documents)
        plan = Plan(
            lm,
            documents,
            config.context,
            config.batch_tokens,
            config.positions,
            config.tokens,
            config.per_document,
            seed,
        )
        widths = {str(site): lm.layout.width(site) for site in config.sites}
        writer = ShardWriter(folder, _settings(lm, config, seed, scrubber), widths=widths)
        if not writer.records:
            (folder / SKIPPED).unlink(missing_ok=True)  # of a run that was killed before its first shard
        limit = (
            None
            if config.skip_norm_above is None
            else NormLimit(folder, config.skip_norm_above, writer.finished)
        )
        try:
            _run(lm, plan, config, writer, limit, progress)
        except BaseException as error:
            writer.abandon(clear=isinstance(error, UserError))
            if isinstance(error, UserError) and not writer.records:
                (folder / SKIPPED).unlink(missing_ok=True)
            raise
        others = {
            # Of sites that are not as wide as the residual stream.
            "widths": {name: width for name, width in widths.items() if width != lm.d_in} or None,
            "per_document": config.per_document,
            "per_stratum": config.per_stratum,
            "strata": None if strata is None else _counts(strata, scrubber),
            "scrub": None if scrubber is None else scrubber.facts(),
            "skip_norm_above": None if limit is None else limit.facts(),
        }
        write_manifest(
            folder,
            kind=KIND,
            command=command,
            seed=seed,
            inputs={"model": lm.id, "tokenizer": lm.tokenizer_id, "corpus": plan.corpus},
            facts={
                "model": lm.name,
                "sites": list(widths),
                "d_in": lm.d_in,
                "tokens": writer.rows,
                "documents": plan.read,
                "context": config.context,
                "positions": config.positions,
                "dtype": config.dtype,
                "shard_tokens": config.shard_tokens,
                "read": plan.digest,
                **{name: value for name, value in others.items() if value is not None},
            },
        )
    return ActivationStore(out)


def _counts(strata: Strata, scrubber: Scrubber | None) -> dict[str, dict[str, int]]:
    """Documents by stratum, whose name may itself hold personal data."""
    counts: dict[str, dict[str, int]] = {}
    for name, found in strata.facts().items():
        into = counts.setdefault(
            name if scrubber is None else scrubber.scrub(name).text, dict.fromkeys(found, 0)
        )
        for key, n in found.items():
            into[key] += n
    return counts


def _run(
    lm: LanguageModel,
    plan: Plan,
    config: CaptureConfig,
    writer: ShardWriter,
    limit: NormLimit | None,
    progress: Progress | None,
) -> None:
    held: list[dict[str, Any]] = []
    for group in plan:
        if limit is not None:
            limit.measure(group.batches, lambda batch: _read(lm, batch, config)[0])
        for batch in group.batches:
            _store(lm, batch, config, writer, limit, group.digest)
            if progress is not None:
                # Without a budget the end is unknown: the total grows with what has been tokenised.
                progress(writer.rows, config.tokens or plan.planned, f"{plan.read} documents read")
        held += group.records
        _record(held[:-1], plan.read - len(held), writer, limit)
        held = held[-1:]  # the last document may go on in the next group
    _record(held, plan.read - len(held), writer, limit)
    if not plan.read:
        raise UserError("the corpus holds no documents; give a file with at least one")
    if not plan.planned:
        raise UserError(
            f"the corpus holds no {WANTED[config.positions]}; give another --text or choose other --positions"
        )
    writer.close()


def _record(records: list[dict[str, Any]], first: int, writer: ShardWriter, limit: NormLimit | None) -> None:
    """Write the records of documents from number `first` on, less what the limit skipped of them."""
    if limit is not None:
        records = [{**r, "captured": r["captured"] - limit.take(n)} for n, r in enumerate(records, first)]
    writer.add_documents(records)


def _store(
    lm: LanguageModel,
    batch: list[Piece],
    config: CaptureConfig,
    writer: ShardWriter,
    limit: NormLimit | None,
    digest: str,
) -> None:
    """Give a batch's rows to the writer; a batch that finished shards hold is not read again."""
    left = max(writer.finished - writer.rows, 0)
    known = sum(piece.rows for piece in batch) if limit is None else limit.rows()
    if known is not None and known <= left:
        if limit is not None:
            limit.record(batch, None)
        writer.skip(known, digest)
        return
    values, columns = _read(lm, batch, config)
    if limit is not None:
        small = limit.small(values)
        limit.record(batch, small)
        values = {site: rows[small.to(rows.device)] for site, rows in values.items()}
        columns = {name: column[small] for name, column in columns.items()}
    old = min(len(columns["tokens"]), left)
    writer.skip(old, digest)
    for site, rows in values.items():
        _check_range(rows, site, config, columns["documents"], batch)
    dtype = getattr(torch, config.dtype)
    if old < len(columns["tokens"]):
        writer.add(
            {site: rows[old:].to(dtype).cpu() for site, rows in values.items()},
            {name: column[old:] for name, column in columns.items()},
            digest,
        )


def _read(
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


def _check_range(
    rows: Tensor, site: str, config: CaptureConfig, documents: Tensor, batch: list[Piece]
) -> None:
    """Refuse values that the stored type cannot hold: a silent infinity would poison all that follows."""
    largest = rows.abs().amax(dim=1).float() if len(rows) else torch.zeros(1)
    finite = bool(torch.isfinite(largest).all())
    if finite and (config.dtype == "float32" or float(largest.max()) <= LARGEST_FLOAT16):
        return
    worst = int((torch.nan_to_num(largest, nan=torch.inf)).argmax())
    ids = {piece.document: piece.window.id for piece in batch}
    where = f"at {site} in document {ids[int(documents[worst])]}"
    if not finite:
        raise UserError(f"the model gives a value that is not finite {where}; load it with another dtype")
    raise UserError(
        f"the value {float(largest[worst]):.6g} {where} is beyond float16's {LARGEST_FLOAT16:.0f};"
        " capture with --dtype float32 into another --out"
    )


def _fits(lm: LanguageModel, config: CaptureConfig) -> None:
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


def _settings(
    lm: LanguageModel, config: CaptureConfig, seed: int, scrubber: Scrubber | None
) -> dict[str, Any]:
    """All that the bytes of a shard depend on but the documents."""
    return {
        "model": lm.id,
        "tokenizer": lm.tokenizer_id,
        "computed": str(lm.model.dtype).removeprefix("torch."),
        "device": torch.device(lm.device).type,
        "torch": torch.__version__,
        "sites": [str(site) for site in config.sites],
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
