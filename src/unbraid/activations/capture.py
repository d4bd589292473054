"""Read a model's activations over a corpus into shards on disk."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from unbraid.activations.append import Earlier
from unbraid.activations.elsewhere import Elsewhere
from unbraid.activations.norms import SKIPPED, NormLimit
from unbraid.activations.plan import Piece, Plan
from unbraid.activations.reading import (
    WANTED,
    CaptureConfig,
    check_fits,
    check_range,
    computed_in,
    plan_of,
    read_batch,
    settings_of,
    widths_of,
)
from unbraid.activations.scrub import Scrubber
from unbraid.activations.shards import ShardWriter, row_bytes
from unbraid.activations.space import Space, parse_size, same_disk
from unbraid.activations.store import KIND, ActivationStore
from unbraid.activations.strata import Strata
from unbraid.activations.text import Document
from unbraid.manifest.errors import UserError
from unbraid.manifest.files import building
from unbraid.manifest.progress import Progress
from unbraid.manifest.record import write_manifest
from unbraid.manifest.remote import is_url
from unbraid.model.load import LanguageModel
from unbraid.model.pages import kept_pages


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
        widths = widths_of(lm, config)
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
            with kept_pages(lm.device):
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
                "computed": computed_in(lm),
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
        row_bytes=row_bytes(widths_of(lm, config), config.dtype),
        shard_rows=config.shard_tokens,
        rows=rows,
        copied=copied,
        budget=None if config.disk_budget is None else parse_size(config.disk_budget, "--disk-budget"),
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
