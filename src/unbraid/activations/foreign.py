"""Bring activations that another tool wrote into a store, with what is known of their origin.

The files say which numbers belong together; what they do not say (the model, its tokenizer, which tokens the
rows are of) is recorded as unknown rather than guessed. Who states the model has its word checked: the sites'
widths, and where there are tokens, a forward pass over the first of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unbraid.activations.matching import ImportOptions, Matching, name_of
from unbraid.activations.rows import limit, misfit
from unbraid.activations.shards import ShardWriter
from unbraid.activations.store import KIND, ActivationStore
from unbraid.manifest.errors import UserError
from unbraid.manifest.files import building
from unbraid.manifest.progress import Progress
from unbraid.manifest.record import write_manifest
from unbraid.model.load import LanguageModel
from unbraid.model.read import read_sites
from unbraid.model.sites import Site

CHUNK_BYTES = 1 << 25
"""What is read at a time, in float32."""
LOOKED_AT = 4
"""Documents on which a stated model is tried."""
DIFFERS = 0.05
"""Relative difference beyond which activations are not the stated model's. In three small real models
bfloat16 made up to 0.02, the layer beside 0.5; the stream without its mean, as TransformerLens centres it,
0.01 to 0.1, so the number is recorded too."""


def import_activations(
    sources: Sequence[Path | str],
    out: Path | str,
    options: ImportOptions | None = None,
    *,
    sites: Sequence[str] = (),
    lm: LanguageModel | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> ActivationStore:
    """Write the arrays of files and folders (see `arrays.find_arrays`) into the folder `out` as a store.

    Activations are (n, d) or (batch, positions, d), TransformerLens' hook_z (batch, positions, heads,
    d_head); all arrays have the same rows, each row of a batch counts as a document. `sites` says which
    array is which, as SITE=NAME, SITE=FILE or SITE=FILE#NAME; SITE alone takes the array of that name, or
    the only one. Left out, every array that is named after a site is taken (see `matching.site_of`). `lm`
    states whose activations these are. Killed and called again with the same arguments, it goes on after the
    last finished shard and gives the same bytes. Memory: one shard, and `CHUNK_BYTES`.

    Raises UserError when `out` exists, an array is missing, of another shape or ambiguous, a kept value does
    not fit the stored type, tokens and rows do not match, or `lm` does not fit; IntegrityError for files that
    are cut off.
    """
    options = options or ImportOptions()
    with building(Path(out)) as folder:
        matching = Matching([Path(source) for source in sources], sites, options)
        differs = {} if lm is None else _check_model(lm, matching)
        inputs = matching.hashes(progress)
        origin = {
            "arrays": {str(site): column.name for site, column in matching.sites.items()},
            **matching.places,
        }
        widths = {str(site): column.width for site, column in matching.sites.items()}
        writer = ShardWriter(
            folder,
            {
                "sources": inputs,
                "origin": origin,
                "model": lm and lm.id,
                "drop_tokens": list(options.drop_tokens),
                "dtype": options.dtype,
                "shard_tokens": options.shard_tokens,
            },
            widths=widths,
        )
        try:
            _run(matching, writer, lm, progress)
        except BaseException as error:
            writer.abandon(clear=isinstance(error, UserError))
            raise
        d_in = next(iter(widths.values()))
        others = {name: width for name, width in widths.items() if width != d_in}
        write_manifest(
            folder,
            kind=KIND,
            command=command,
            seed=None,
            inputs=inputs | ({} if lm is None else {"model": lm.id, "tokenizer": lm.tokenizer_id}),
            facts={
                "model": matching.model_name if lm is None else lm.name,
                "sites": list(widths),
                "d_in": d_in,
                **({"widths": others} if others else {}),
                "tokens": writer.rows,
                "documents": matching.documents,
                "context": matching.context,
                "positions": "all" if matching.mask is None and not options.drop_tokens else "mask",
                "dtype": options.dtype,
                "shard_tokens": options.shard_tokens,
                "origin": {
                    "format": sorted({found.format for found in matching.found}),
                    **({"tool": options.tool} if options.tool else {}),
                    **origin,
                    "dtype": sorted({name_of(column.dtype) for column in matching.sites.values()}),
                    "metadata": matching.metadata,
                    "left_out": matching.left_out,
                    **({"differs": differs} if differs else {}),
                    "unknown": matching.unknown(lm),
                },
                **({"int8_error": error} if (error := writer.error()) is not None else {}),
            },
            known=writer.files(),
        )
    return ActivationStore(out)


def _run(
    matching: Matching, writer: ShardWriter, lm: LanguageModel | None, progress: Progress | None
) -> None:
    size = max(1, CHUNK_BYTES // (4 * sum(column.width for column in matching.sites.values())))
    vocabulary = _vocabulary(lm)
    captured = _Captured(matching)
    for start in range(0, matching.rows, size):
        stop = min(start + size, matching.rows)
        keep, tokens = matching.kept(start, stop, vocabulary)
        documents, positions = matching.where(start, stop)
        writer.add_documents(list(captured.count(documents, keep)))
        # What finished shards hold is not read again, but for its mask.
        old = min(int(keep.sum()), max(writer.finished - writer.rows, 0))
        writer.skip(old, "")
        new = np.flatnonzero(keep)[old:]
        if len(new):
            columns = {"tokens": tokens, "documents": documents, "positions": positions}
            writer.add(
                {str(site): _stored(matching, site, start, stop, new) for site in matching.sites},
                {name: torch.from_numpy(column[new].astype(np.int32)) for name, column in columns.items()},
                "",
            )
        if progress is not None:
            progress(stop, matching.rows)
    if not writer.rows:
        raise UserError("the mask leaves no row; give another --mask or other --drop-tokens")
    writer.add_documents(list(captured.rest()))
    writer.close()


def _stored(matching: Matching, site: Site, start: int, stop: int, wanted: NDArray[np.int64]) -> Tensor:
    """The wanted of the rows [start, stop) of a site, checked to fit into the stored type."""
    column, dtype = matching.sites[site], matching.options.dtype
    rows = column.read(start, stop)
    rows = rows.float() if rows.dtype.itemsize == 1 else rows  # float8 knows no arithmetic
    if len(wanted) < len(rows):
        rows = rows[torch.from_numpy(wanted)]
    if found := misfit(rows, dtype):
        place, value = found
        where = f"{column.name} in row {start + int(wanted[place])}"
        if math.isinf(value):
            raise UserError(
                f"{where} holds a value that is not finite; leave such rows out with --mask, or write the "
                "activations again"
            )
        advice = "import with --dtype float32" if dtype == "float16" else "write the activations again"
        raise UserError(f"the value {value:.6g} of {where} is beyond {dtype}'s {limit(dtype):.6g}; {advice}")
    return rows


class _Captured:
    """The records of documents, each once all its rows have passed."""

    def __init__(self, matching: Matching) -> None:
        self.matching = matching
        self._document, self._count = 0, 0

    def count(self, documents: NDArray[np.int64], keep: NDArray[np.bool_]) -> Iterator[dict[str, Any]]:
        """Records of the documents that the next rows (n,), of these documents, have ended."""
        first, last = int(documents[0]), int(documents[-1])
        counts = np.bincount(documents[keep] - first, minlength=last - first + 1)
        if first > self._document:
            yield from self.rest()
            self._document, self._count = first, 0
        self._count += int(counts[0])
        if last > first:
            yield from self.rest()
            middle = np.arange(first + 1, last)
            for document, length, n in zip(middle, self.matching.lengths(middle), counts[1:-1], strict=True):
                yield _record(document, length, n)
            self._document, self._count = last, int(counts[-1])

    def rest(self) -> Iterator[dict[str, Any]]:
        """The record of the document that the last row belongs to."""
        yield _record(self._document, self.matching.lengths(np.array([self._document]))[0], self._count)


def _record(document: Any, length: Any, captured: Any) -> dict[str, Any]:
    return {"id": str(document), "tokens": int(length), "captured": int(captured)}


def _check_model(lm: LanguageModel, matching: Matching) -> dict[str, float]:
    """How far the first activations are from the stated model's, by site: the median over tokens of
    ‖x − x'‖ / ‖x'‖. Empty where there are no tokens to tell from.

    Raises UserError when a site does not fit, and when the difference is more than `DIFFERS`.
    """
    for site, column in matching.sites.items():
        if (width := lm.layout.width(site)) != column.width:
            raise UserError(
                f"{column.name} has {column.width} numbers a row but model {lm.name} has {width} at {site}; "
                "name the model that they are of, or the right site"
            )
    documents, positions = matching.blocks[0]
    too_long = lm.context is not None and positions > lm.context
    if matching.tokens is None or not matching.context or too_long or lm.tokenizer is None:
        return {}
    shape = (min(documents, LOOKED_AT), positions)
    keep, tokens = matching.kept(0, math.prod(shape), _vocabulary(lm))
    real = (tokens >= 0) & (tokens < _vocabulary(lm))
    ids = torch.from_numpy(np.where(real, tokens, lm.pad_id)).reshape(shape)
    wanted = torch.from_numpy(keep)
    if not keep.any():
        return {}
    rows = {site: column.read(0, math.prod(shape)).float() for site, column in matching.sites.items()}
    found: dict[str, float] = {}
    # A mask is of padding or of what was wanted, which the model does or does not look at.
    for mask in (torch.ones(shape, dtype=torch.int64), wanted.reshape(shape).long()):
        read = read_sites(lm, ids.to(lm.device), mask.to(lm.device), list(matching.sites))
        for site, theirs in rows.items():
            ours = read[site].flatten(0, 1).float().cpu()[wanted]
            off = ((theirs[wanted] - ours).norm(dim=1) / ours.norm(dim=1).clamp(min=1e-12)).median()
            found[str(site)] = min(found.get(str(site), math.inf), float(f"{float(off):.2g}"))
    worst = max(found, key=lambda site: found[site])
    if found[worst] > DIFFERS and not matching.options.unchecked:
        raise UserError(
            f"at {worst} the model {lm.name} gives activations that are {found[worst]:.0%} off those in the "
            "files; name the right model and site (TransformerLens changes weights unless told not to), or "
            "add --unchecked"
        )
    return found


def _vocabulary(lm: LanguageModel | None) -> int:
    """Token ids there can be."""
    return 2**31 if lm is None else int(getattr(lm.config, "vocab_size", 2**31))
