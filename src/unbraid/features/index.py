"""Build an index: what every latent does over a corpus, from one streaming pass over its sparse codes.

Memory is bounded by the number of latents and the batch, not by the corpus.  Each token is stored once;
examples refer to it by document and position and carry only the latent's own activations around it.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from unbraid.activations.documents import Document
from unbraid.features.examples import (
    Best,
    Firings,
    FloatArray,
    Tally,
    context_hashes,
    peaks,
    quantile_groups,
    uniform_priorities,
)
from unbraid.features.geometry import piece, promoted_and_suppressed
from unbraid.features.page import Index
from unbraid.features.rows import Rows, read_rows, site_of
from unbraid.manifest.errors import UserError
from unbraid.manifest.files import building
from unbraid.manifest.progress import Progress
from unbraid.manifest.record import write_manifest
from unbraid.model.load import LanguageModel
from unbraid.model.sites import Site
from unbraid.sae.base import SAE


@dataclass(frozen=True)
class IndexConfig:
    """What an index holds and how the corpus is read."""

    tokens: int | None = None
    """Stop after the window in which this many tokens have been counted; none means the whole corpus."""
    context: int = 256
    """Longer documents are read in windows of this many tokens."""
    batch_tokens: int = 4096
    """Tokens, padding included, that go through the model at once."""
    positions: Literal["all", "reply"] = "all"
    """Count all tokens or only those of assistant replies; the others are still stored as context."""
    top: int = 20
    """Strongest examples kept for each latent, at most one a window and one for equal contexts."""
    quantiles: int = 10
    """Groups of equal size that the sampled examples are sorted into, by activation."""
    per_quantile: int = 5
    """Examples kept of each quantile group."""
    reservoir: int = 100
    """Firings sampled uniformly for each latent, from which the quantile groups are drawn."""
    window: int = 16
    """Tokens of activations kept on either side of an example."""
    same_context: int = 5
    """Two top examples are the same when this many tokens on either side of their peaks agree."""
    promoted: int = 10
    """Output tokens kept that a latent promotes most, and as many that it suppresses most."""
    seed: int = 0
    """Seed of the samples."""

    def __post_init__(self) -> None:
        for name in ("context", "batch_tokens", "top", "quantiles", "per_quantile", "reservoir", "promoted"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.tokens is not None and self.tokens < 1:
            raise UserError(f"tokens is {self.tokens}; it must be at least 1")
        if self.window < 0 or self.same_context < 0:
            raise UserError("window and same_context must not be negative")


def build_index(
    sae: SAE,
    lm: LanguageModel,
    documents: Iterable[Document],
    config: IndexConfig,
    out: Path,
    *,
    sae_id: str,
    site: Site | None = None,
    paths: Mapping[str, Path] | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> Index:
    """Read `documents` once and write the index folder `out`.

    `sae_id` identifies the SAE in the manifest; `paths` says where its inputs live.  An interrupted build
    leaves nothing at `out`, and a later one starts afresh.  Raises UserError when `out` exists, when the
    SAE does not fit the model or when no token is counted.
    """
    site = site_of(sae, lm, site)
    with building(Path(out)) as folder:
        _empty(folder)
        build = _Build(folder, sae.config.d_sae, config)
        rows_seen = read_rows(
            lm,
            documents,
            site,
            positions=config.positions,
            context=config.context,
            batch_tokens=config.batch_tokens,
        )
        for rows in rows_seen:
            build.add(_up_to(rows, None if config.tokens is None else config.tokens - build.counted), sae)
            if progress is not None:
                progress(build.counted, config.tokens or 0, "tokens")
            if config.tokens is not None and build.counted >= config.tokens:
                break
        build.finish(sae, lm)
        write_manifest(
            folder,
            kind="index",
            command=command,
            seed=config.seed,
            inputs={
                "sae": sae_id,
                "model": lm.id,
                "tokenizer": lm.tokenizer_id,
                "documents": build.identity.hexdigest(),
            },
            facts={
                "site": str(site),
                "model_name": lm.name,
                "d_sae": sae.config.d_sae,
                "tokens": build.counted,
                "documents": build.documents,
                "config": asdict(config),
            },
            paths=paths,
        )
    return Index(out)


def _empty(folder: Path) -> None:
    # A pass over the corpus cannot be taken up in the middle, so what a killed one left is dropped.
    for left in folder.iterdir():
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


def _up_to(rows: Rows, budget: int | None) -> Rows:
    """The first windows of a batch, up to and with the one in which `budget` counted tokens are reached."""
    if budget is None:
        return rows
    reached = np.cumsum(np.bincount(rows.window[rows.counted], minlength=len(rows.windows)))
    windows = int(np.searchsorted(reached, budget)) + 1
    keep = rows.window < windows
    return Rows(
        windows=rows.windows[:windows],
        documents=rows.documents[:windows],
        x=rows.x[torch.from_numpy(keep).to(rows.x.device)],
        window=rows.window[keep],
        position=rows.position[keep],
        counted=rows.counted[keep],
    )


class _Build:
    """The state of one pass: accumulators a latent and the open table of tokens."""

    def __init__(self, folder: Path, d_sae: int, config: IndexConfig) -> None:
        self.folder = folder
        self.config = config
        self.counted = 0
        self.documents = 0
        self.windows = 0
        self.identity = hashlib.sha256()
        self.tally = Tally(d_sae)
        self.top = Best(d_sae, config.top, config.window)
        self.sample = Best(d_sae, config.reservoir, config.window)
        self.vocabulary: set[int] = set()
        self.writer: pq.ParquetWriter | None = None

    def add(self, rows: Rows, sae: SAE) -> None:
        """Take in a batch of windows."""
        with torch.no_grad():
            codes = sae.encode(rows.x)
        indices = codes.indices.cpu().numpy()
        values = codes.values.float().cpu().numpy() * rows.counted[:, None]
        row, slot = np.nonzero(values)
        window = rows.window + self.windows
        firings = Firings(indices[row, slot], values[row, slot], row, window[row], rows.position[row])

        def around(chosen: Firings) -> FloatArray:
            return _activations_around(chosen, indices, values, window, self.config.window)

        self.tally.add(firings, rows.documents[rows.window[row]])
        contexts = np.concatenate(
            [
                context_hashes(np.array(w.input_ids, dtype=np.int64), self.config.same_context)
                for w in rows.windows
            ]
        )
        highest = peaks(firings)
        self.top.offer(highest, highest.value.astype(np.float64), around, contexts[highest.row])
        self.sample.offer(firings, uniform_priorities(firings, self.config.seed), around)
        self._store_tokens(rows)
        self.counted += int(rows.counted.sum())
        self.windows += len(rows.windows)
        self.documents = int(rows.documents[-1]) + 1

    def _store_tokens(self, rows: Rows) -> None:
        windows = rows.windows
        table = pa.table(
            {
                "passage": pa.array(range(self.windows, self.windows + len(windows)), pa.int32()),
                "document": pa.array(rows.documents, pa.int32()),
                "id": [window.id for window in windows],
                # Place in its document of the window's first token, had the window no repeated BOS.
                "first": pa.array([w.positions[-1] - len(w.positions) + 1 for w in windows], pa.int32()),
                "tokens": pa.array([list(window.input_ids) for window in windows], pa.list_(pa.int32())),
            }
        )
        if self.writer is None:
            self.writer = pq.ParquetWriter(self.folder / "passages.parquet", table.schema)
        self.writer.write_table(table)
        for window in windows:
            self.vocabulary.update(window.input_ids)
            self.identity.update(window.id.encode() + b"\n")
            self.identity.update(np.array(window.input_ids, dtype=np.int64).tobytes())

    def finish(self, sae: SAE, lm: LanguageModel) -> None:
        """Write the tables once every document has been seen."""
        if self.writer is None or not self.counted:
            raise UserError("the corpus holds no token to index; give more text, or read all positions")
        self.writer.close()
        words = sorted(self.vocabulary)
        table = pa.table(
            {"token": pa.array(words, pa.int32()), "text": [piece(lm, token) for token in words]}
        )
        pq.write_table(table, self.folder / "vocabulary.parquet")
        pq.write_table(self._latents(sae, lm), self.folder / "latents.parquet", row_group_size=4096)
        with pq.ParquetWriter(self.folder / "examples.parquet", _EXAMPLES) as writer:
            for first in range(0, sae.config.d_sae, 512):
                chunk = range(first, min(first + 512, sae.config.d_sae))
                examples = [example for latent in chunk for example in self._examples(latent)]
                writer.write_table(pa.Table.from_pylist(examples, _EXAMPLES))

    def _latents(self, sae: SAE, lm: LanguageModel) -> Any:
        tally, d_sae = self.tally, sae.config.d_sae
        words: dict[str, list[list[str]]] = {"promoted": [], "suppressed": []}
        logits: dict[str, list[list[float]]] = {"promoted": [], "suppressed": []}
        for first in range(0, d_sae, 256):
            chunk = range(first, min(first + 256, d_sae))
            for pair in promoted_and_suppressed(sae, lm, chunk, tokens=self.config.promoted):
                for name, effects in zip(words, pair, strict=True):
                    words[name].append([effect.token for effect in effects])
                    logits[name].append([effect.logit for effect in effects])
        return pa.table(
            {
                "latent": pa.array(range(d_sae), pa.int32()),
                "count": tally.count,
                "documents": tally.documents,
                "density": tally.count / self.counted,
                "max": tally.max,
                "mean": tally.mean.astype(np.float32),
                "histogram": pa.array(tally.histogram.tolist(), pa.list_(pa.int64())),
                "histogram_top": tally.histogram_top,
                "promoted": words["promoted"],
                "promoted_logits": pa.array(logits["promoted"], pa.list_(pa.float32())),
                "suppressed": words["suppressed"],
                "suppressed_logits": pa.array(logits["suppressed"], pa.list_(pa.float32())),
            }
        )

    def _examples(self, latent: int) -> Iterator[dict[str, object]]:
        held = int((self.top.at[latent] >= 0).sum())
        for rank in range(held):
            yield _example(self.top, latent, rank, kind="top", quantile=-1, rank=rank)
        held = int((self.sample.at[latent] >= 0).sum())
        groups = quantile_groups(self.sample.value[latent, :held], self.config.quantiles)
        for quantile in range(self.config.quantiles):
            chosen = np.flatnonzero(groups == quantile)[: self.config.per_quantile]
            chosen = chosen[np.argsort(-self.sample.value[latent, chosen], kind="stable")]
            for rank, slot in enumerate(chosen.tolist()):
                yield _example(self.sample, latent, slot, kind="sample", quantile=quantile, rank=rank)


_EXAMPLES = pa.schema(
    [
        ("latent", pa.int32()),
        ("kind", pa.string()),
        ("quantile", pa.int8()),
        ("rank", pa.int16()),
        ("passage", pa.int32()),
        ("position", pa.int32()),
        ("value", pa.float32()),
        ("activations", pa.list_(pa.float32())),
    ]
)


def _example(held: Best, latent: int, slot: int, *, kind: str, quantile: int, rank: int) -> dict[str, object]:
    return {
        "latent": latent,
        "kind": kind,
        "quantile": quantile,
        "rank": rank,
        "passage": int(held.at[latent, slot]),
        "position": int(held.position[latent, slot]),
        "value": float(held.value[latent, slot]),
        "activations": held.around[latent, slot].tolist(),
    }


def _activations_around(
    chosen: Firings,
    indices: NDArray[np.int64],
    values: FloatArray,
    window: NDArray[np.int64],
    reach: int,
) -> FloatArray:
    """The latent's activations at each offset from its firing (m, 2·reach + 1), 0 beyond its window."""
    around = np.zeros((len(chosen), 2 * reach + 1), dtype=np.float32)
    for column, offset in enumerate(range(-reach, reach + 1)):
        row = chosen.row + offset
        inside = (row >= 0) & (row < len(window))
        row = np.clip(row, 0, len(window) - 1)
        inside &= window[row] == chosen.window
        same = indices[row] == chosen.latent[:, None]
        around[:, column] = (values[row] * same).sum(axis=1) * inside
    return around
