"""An index with exactly the latents that a test asks for, in the tables that the builder writes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from unbraid.features.finish import SAMPLED
from unbraid.features.groups import HISTOGRAM_BINS, level_edges
from unbraid.features.page import Index
from unbraid.features.tables import (
    LATENTS,
    LAYOUT,
    PASSAGE,
    PASSAGES,
    SCHEMAS,
    VOCABULARY,
    TableWriter,
    part_name,
)
from unbraid.manifest.files import building
from unbraid.manifest.record import write_manifest

REACH = 3


@dataclass
class Made:
    """One latent: where it fires, strongest first, as (passage, position, value), and what it promotes."""

    fires: Sequence[tuple[int, int, float]] = ()
    promoted: Sequence[str] = ()
    suppressed: Sequence[str] = ()
    coactive: Sequence[tuple[int, int]] = ()
    """(neighbour, tokens on which both fire)"""
    decoder: Sequence[tuple[int, float]] = ()
    """(neighbour, cosine)"""
    beside: Sequence[tuple[str, int, float]] = ()
    """(id of another autoencoder, neighbour in it, decoder cosine)"""


def handmade(
    out: Path,
    passages: Sequence[Sequence[str]],
    latents: Sequence[Made],
    *,
    inputs: Mapping[str, str] | None = None,
) -> Index:
    """Write an index of these latents over passages, each a list of tokens."""
    words = sorted({token for passage in passages for token in passage})
    ids = {word: number for number, word in enumerate(words)}
    tokens = sum(map(len, passages))
    occurrences = Counter(token for passage in passages for token in passage)
    with building(out) as folder:
        pq.write_table(
            pa.table(
                {"token": list(ids.values()), "text": words, "occurrences": [occurrences[w] for w in words]},
                schema=VOCABULARY,
            ),
            folder / "vocabulary.parquet",
        )
        (folder / PASSAGES).mkdir(exist_ok=True)
        rows = [
            {"passage": n, "document": n, "id": f"document {n}", "stratum": None, "first": 0,
             "tokens": [ids[token] for token in passage]}
            for n, passage in enumerate(passages)
        ]  # fmt: skip
        with pa.ipc.new_file(folder / PASSAGES / part_name(0), PASSAGE) as writer:
            writer.write_table(pa.Table.from_pylist(rows, PASSAGE))
        made = [
            _rows(number, latent, latents, passages, ids, tokens) for number, latent in enumerate(latents)
        ]
        for table in SCHEMAS:
            per = LATENTS[table]
            with TableWriter(folder, table) as writer:
                for first in range(0, len(latents), per):
                    block = [row for latent in made[first : first + per] for row in latent[table]]
                    writer.write(pa.Table.from_pylist(block, SCHEMAS[table]))
        pq.write_table(_sampled(passages, latents), folder / SAMPLED)
        write_manifest(
            folder,
            kind="index",
            command="",
            seed=0,
            inputs={"sae": "an autoencoder", "model": "a model", "documents": "a text", **(inputs or {})},
            facts={
                "layout": LAYOUT,
                "site": "layers.1.resid_post",
                "model_name": "made",
                "d_sae": len(latents),
                "tokens": tokens,
                "strata": [],
                "config": {"quantiles": 4, "per_group": 2, "window": REACH, "seed": 0},
            },
        )
    return Index(out)


def _sampled(passages: Sequence[Sequence[str]], latents: Sequence[Made]) -> pa.Table:
    """Every token as a sampled one, by its place in the corpus, with the latents that fire on it."""
    firing: dict[tuple[int, int], list[int]] = {
        (p, i): [] for p, some in enumerate(passages) for i in range(len(some))
    }
    for number, latent in enumerate(latents):
        for passage, position, _ in latent.fires:
            firing[passage, position].append(number)
    columns = {"key": pa.array(range(len(firing)), pa.uint64())}
    return pa.table({**columns, "latents": pa.array(firing.values(), pa.list_(pa.int32()))})


def _rows(
    number: int,
    latent: Made,
    latents: Sequence[Made],
    passages: Sequence[Sequence[str]],
    ids: Mapping[str, int],
    tokens: int,
) -> dict[str, list[dict[str, Any]]]:
    values = [value for _, _, value in latent.fires]
    positions = [position for _, position, _ in latent.fires]
    fired = Counter(passages[p][i] for p, i, _ in latent.fires)
    top = 2.0 ** math.frexp(max(values))[1] if values else 0.0
    histogram = np.histogram(values, HISTOGRAM_BINS, (0, top or 1))[0]
    levels = np.histogram(values, level_edges(top or 1))[0]
    active = {(p, i): value for p, i, value in latent.fires}

    def example(kind: str, group: int, rank: int, place: tuple[int, int, float]) -> dict[str, Any]:
        passage, position, value = place
        around = [active.get((passage, i), 0.0) for i in range(position - REACH, position + REACH + 1)]
        return {"latent": number, "kind": kind, "group": group, "rank": rank, "passage": passage,
                "position": position, "value": value, "activations": around}  # fmt: skip

    best: dict[int, tuple[int, int, float]] = {}
    for place in latent.fires:
        best.setdefault(place[0], place)
    return {
        "latents": [
            {
                "latent": number,
                "count": len(values),
                "documents": len({p for p, _, _ in latent.fires}),
                "density": len(values) / tokens,
                "max": max(values, default=0.0),
                "mean": sum(values) / max(len(values), 1),
                "total": sum(values),
                "total_rest": 0.0,
                "histogram": histogram.tolist(),
                "histogram_top": top,
                "levels": levels.tolist(),
                "position_total": sum(positions),
                "position_squares": sum(p * p for p in positions),
                "position_first": positions.count(0),
                "position_octaves": [sum(p.bit_length() == o for p in positions) for o in range(6)],
                "strata": [],
                "distinct_tokens": len(fired),
            }
        ],
        "weights": [
            {
                "latent": number,
                "promoted": list(latent.promoted),
                "promoted_logits": [1.0 - 0.1 * i for i in range(len(latent.promoted))],
                "suppressed": list(latent.suppressed),
                "suppressed_logits": [0.1 * i - 1.0 for i in range(len(latent.suppressed))],
                "logits": [1, 2, 1],
                "logits_low": -1.0,
                "logits_high": 1.0,
            }
        ],
        "neighbours": [
            {"latent": number, "kind": "decoder", "sae": None, "rank": rank, "neighbour": other, "cosine": c}
            for rank, (other, c) in enumerate(latent.decoder)
        ]
        + [
            {"latent": number, "kind": "decoder", "sae": sae, "rank": rank, "neighbour": other, "cosine": c}
            for rank, (sae, other, c) in enumerate(latent.beside)
        ],
        "coactive": [
            {
                "latent": number,
                "rank": rank,
                "neighbour": other,
                "together": n,
                "own": len(values),
                "other": len(latents[other].fires),
                "jaccard": n / (len(values) + len(latents[other].fires) - n),
                "pmi": 0.0,
            }
            for rank, (other, n) in enumerate(latent.coactive)
        ],
        "tokens": [{"latent": number, "token": ids[word], "firings": n} for word, n in fired.most_common()],
        "examples": [example("top", -1, rank, place) for rank, place in enumerate(best.values())]
        + [example("sample", -1, rank, place) for rank, place in enumerate(latent.fires[:8])]
        + [
            example("interval", int(place[2] / top * 16), rank, place)
            for rank, place in enumerate(latent.fires)
        ],
    }
