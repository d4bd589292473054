"""Read a model's activations over a corpus into shards on disk."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from unbraid.activations.append import Earlier
from unbraid.activations.elsewhere import Elsewhere
from unbraid.activations.norms import SKIPPED, NormLimit
from unbraid.activations.plan import Piece, Plan
from unbraid.activations.rows import Stored, misfit
from unbraid.activations.scrub import Scrubber
from unbraid.activations.shards import ShardWriter, row_bytes
from unbraid.activations.space import Space, parse_size, same_disk
from unbraid.activations.store import KIND, ActivationStore
from unbraid.activations.strata import Strata
from unbraid.activations.text import Document, Positions
from unbraid.manifest.errors import UserError
from unbraid.manifest.files import building
from unbraid.manifest.progress import Progress
from unbraid.manifest.record import write_manifest
from unbraid.manifest.remote import is_url
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


def capture(
    lm: LanguageModel,
    documents: Iterable[Document],
    config: CaptureConfig,
    out: Path | str,
    *,
    append: Path | str | None = None,
    seed: int = 0,
    command: str = "",
    progress: Progress | None = None,
) -> ActivationStore:
    """Read `documents` through the model and store the activations of their tokens in `out`, a folder or URL.

    BOS, EOS and PAD are never captured. A document longer than the context becomes several windows under
    one document id. Killed and called again with the same arguments, it goes on after the last finished
    shard, and the files come out byte for byte as if it had never been killed (same machine and versions).
    At a URL they are the same bytes; see `elsewhere`.
    `seed` decides what `per_document` and `per_stratum` draw. Memory does not grow with the corpus.

    `append` is the folder or URL of a finished capture with the same settings: its rows come first, as links
    to its shards, and of `documents` those that it has read are passed over. Only the number of tokens, all
    of them new, the size of batches and the machine may differ.

    Raises UserError when `out` exists, a site or context does not fit the model, no token is found, a value
    does not fit the stored type, the disk has no room, `append` has other settings or no more documents than
    it has are there, or a partial run in the way was made with other settings or documents; IntegrityError
    when a finished shard, of a partial run or of `append`, is damaged; OSError when a disk or URL fails.
    """
    check_fits(lm, config)
    space = space_of(lm, config, out, append)
    earlier = None if append is None else Earlier(append)
    scrubber = Scrubber(config.scrub_model) if config.scrub else None
    destination = Elsewhere(out) if is_url(out) else None
    with building(Path(out)) if destination is None else destination.building() as folder:
        strata = None if config.per_stratum is None else Strata(config.per_stratum, seed)
        before = "" if earlier is None else earlier.store.manifest.facts["read"]
        plan = plan_of(lm, documents, config, seed, strata, scrubber, before)
        widths = _widths(lm, config)
        settings = settings_of(lm, config, seed, scrubber)
        after = None
        if earlier is not None:
            earlier.require(settings)
            settings["appended"], after = earlier.store.id, earlier.store
        writer = ShardWriter(folder, settings, widths=widths, after=after, destination=destination)
        if not writer.begun:
            (folder / SKIPPED).unlink(missing_ok=True)  # of a run that was killed before its first shard
        try:
            space.check(writer.written)
            if earlier is not None:
                earlier.pass_over(plan, progress)
                writer.begin()
                writer.add_documents(earlier.documents(plan))
            norms, finished = None if earlier is None else earlier.norms, writer.finished - writer.before
            times = config.skip_norm_above
            limit = None if times is None else NormLimit(folder, times, max(finished, 0), norms)
            _run(lm, plan, config, writer, limit, space, progress)
        except BaseException as error:
            writer.abandon(clear=isinstance(error, UserError))
            if isinstance(error, UserError) and not writer.begun:
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
            # By site, as a share of the variance.
            "int8_error": writer.error(),
        }
        write_manifest(
            folder,
            kind=KIND,
            command=command,
            seed=seed,
            inputs={
                "model": lm.id,
                "tokenizer": lm.tokenizer_id,
                "corpus": plan.corpus,
                **({} if earlier is None else {"appended": earlier.store.id}),
            },
            # Of a folder here nobody knows who reads a URL.
            paths=None
            if earlier is None or (destination is not None and not is_url(earlier.store.folder))
            else {"appended": earlier.store.folder},
            facts={
                "model": lm.name,
                "sites": list(widths),
                "d_in": lm.d_in,
                "tokens": writer.rows,
                "documents": plan.read,
                "context": config.context,
                "positions": config.positions,
                "dtype": config.dtype,
                "computed": _computed(lm),
                "shard_tokens": config.shard_tokens,
                "read": plan.digest,
                **{name: value for name, value in others.items() if value is not None},
                **({} if earlier is None else earlier.facts(others)),
            },
            known=writer.files(),
        )
    return ActivationStore(out)


def space_of(
    lm: LanguageModel, config: CaptureConfig, out: Path | str, append: Path | str | None = None
) -> Space:
    """What a capture with these arguments writes. Raises as `capture` does for a wrong site or `append`."""
    check_fits(lm, config)
    rows, copied = config.tokens, 0
    if append is not None:
        store = ActivationStore(append)
        full, rest = divmod(store.n_tokens, store.shard_tokens)
        rows = None if rows is None else rest + rows
        if full and not is_url(out) and not same_disk(store.shards[0], Path(out)):
            copied = sum(store.manifest.files[shard.name].bytes for shard in store.shards[:full])
    return Space(
        out=out if is_url(out) else Path(out),
        by=Elsewhere(out).staging if is_url(out) else None,
        row_bytes=row_bytes(_widths(lm, config), config.dtype),
        shard_rows=config.shard_tokens,
        rows=rows,
        copied=copied,
        budget=None if config.disk_budget is None else parse_size(config.disk_budget, "--disk-budget"),
    )


def _widths(lm: LanguageModel, config: CaptureConfig) -> dict[str, int]:
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
    space: Space,
    progress: Progress | None,
) -> None:
    held: list[dict[str, Any]] = []
    checked = writer.written
    for group in plan:
        if limit is not None:
            limit.measure(group.batches, lambda batch: read_batch(lm, batch, config)[0])
        for batch in group.batches:
            if writer.written > checked:
                checked = writer.written
                space.check(checked)
            _store(lm, batch, config, writer, limit, group.digest)
            if progress is not None:
                # Without a budget the end is unknown: the total grows with what has been tokenised.
                progress(
                    writer.rows - writer.before, config.tokens or plan.planned, f"{plan.read} documents read"
                )
        held += group.records
        _record(held[:-1], plan.read - len(held), writer, limit)
        held = held[-1:]  # the last document may go on in the next group
    _record(held, plan.read - len(held), writer, limit)
    if not plan.read:
        raise UserError("the corpus holds no documents; give a file with at least one")
    if not plan.planned and writer.before:
        raise UserError(
            f"the text holds no {WANTED[config.positions]} that was not captured before; append a text with"
            " more"
        )
    if not plan.planned:
        raise UserError(
            f"the corpus holds no {WANTED[config.positions]}; give another --text or choose other --positions"
        )
    writer.close()


def _record(records: list[dict[str, Any]], first: int, writer: ShardWriter, limit: NormLimit | None) -> None:
    """Write the records of documents from number `first` on, less what the limit skipped of them."""
    if limit is not None:
        records = [_without(record, limit.take(n)) for n, record in enumerate(records, first)]
    writer.add_documents(records)


def _without(record: dict[str, Any], skipped: int) -> dict[str, Any]:
    more = {"captured": record["captured"] - skipped, "skipped": record.get("skipped", 0) + skipped}
    return {**record, **more}


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
    values, columns = read_batch(lm, batch, config)
    if limit is not None:
        small = limit.small(values)
        limit.record(batch, small)
        values = {site: rows[small.to(rows.device)] for site, rows in values.items()}
        columns = {name: column[small] for name, column in columns.items()}
    old = min(len(columns["tokens"]), left)
    writer.skip(old, digest)
    for site, rows in values.items():
        check_range(rows, site, config, columns["documents"], batch)
    if old < len(columns["tokens"]):
        writer.add(
            {site: rows[old:].cpu() for site, rows in values.items()},
            {name: column[old:] for name, column in columns.items()},
            digest,
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


def _computed(lm: LanguageModel) -> str:
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
        "computed": _computed(lm),
        "device": torch.device(lm.device).type,
        "torch": torch.__version__,
        "sites": [str(site) for site in config.sites],
        "widths": list(_widths(lm, config).values()),
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
