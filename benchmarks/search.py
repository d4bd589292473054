"""How fast an index of a million features answers: its pages, full text, a pasted text, numbers, a direction.

    make bench NAME=search JSON=out.json
    python benchmarks/search.py --latents 1000000 --index DIR     # generated once, used again

The index is generated: tables as the builder writes them, over a corpus of invented words drawn by Zipf's
law, where each latent fires on a word of its own in four of five examples.  The autoencoder is a TopK one
with random weights on the site of a real model.  Every time is measured on a warm process with two threads,
the first question apart; the forward pass of a pasted text is timed alone and subtracted.  Processor time, of
all threads together, stands beside it: it is what can be compared while other work runs.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from unbraid.activations.documents import Document
from unbraid.cli.models import open_model
from unbraid.features.groups import HISTOGRAM_BINS, INTERVALS, level_edges
from unbraid.features.labels.label import Label
from unbraid.features.labels.rows import Row
from unbraid.features.labels.store import Labels
from unbraid.features.page import Index
from unbraid.features.rows import read_rows
from unbraid.features.search import Search
from unbraid.features.search_activation import CONTEXT
from unbraid.features.search_text import TextIndex, text_path
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
from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.registry import build

WORDS, TOKENS, WINDOW, REACH = 20_000, 2_000_000, 256, 16
TOP, SAMPLE, DRAWN = 20, 50, 30
"""Examples of a latent: strongest, uniform, and of the intervals."""
SAE_ID = "0" * 64
Rng = np.random.Generator


def words(rng: Rng) -> list[str]:
    """Invented words of one to four syllables, all different."""
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    found: dict[str, None] = {}
    while len(found) < WORDS:
        found["".join(rng.choice(syllables, rng.integers(1, 5)))] = None
    return list(found)


def lists(values: np.ndarray, kind: pa.DataType) -> pa.ListArray:
    """Rows of a matrix as lists."""
    offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    return pa.ListArray.from_arrays(offsets, pa.array(values.ravel(), kind))


def themes(latents: int) -> np.ndarray:
    """Which word each latent fires on."""
    return np.random.default_rng(2).integers(0, WORDS, latents)


class Generator:
    """Makes the blocks of every table, one row group's latents at a time."""

    def __init__(self, rng: Rng) -> None:
        self.rng, self.words = rng, words(rng)
        share = 1 / np.arange(1, WORDS + 1)
        self.corpus = rng.choice(WORDS, TOKENS, p=share / share.sum()).astype(np.int32)
        self.corpus[:WORDS] = np.arange(WORDS)  # each stands somewhere
        self.places = np.argsort(self.corpus, kind="stable")
        self.first = np.searchsorted(self.corpus[self.places], np.arange(WORDS + 1))
        self.texts = pa.array([f" {word}" for word in self.words])

    def write(self, out: Path, latents: int) -> Index:
        """The whole index."""
        with building(out) as folder:
            ids = np.arange(WORDS, dtype=np.int32)
            table = {"token": ids, "text": self.texts, "occurrences": np.diff(self.first)}
            pq.write_table(pa.table(table, schema=VOCABULARY), folder / "vocabulary.parquet")
            (folder / PASSAGES).mkdir(exist_ok=True)
            with pa.ipc.new_file(folder / PASSAGES / part_name(0), PASSAGE) as writer:
                n = TOKENS // WINDOW
                number = np.arange(n)
                tokens = lists(self.corpus[: n * WINDOW].reshape(n, WINDOW), pa.int32())
                columns = [number, number, [f"document {i}" for i in number], pa.nulls(n, pa.string()),
                           pa.array(np.zeros(n), pa.int32()), tokens]  # fmt: skip
                writer.write_table(pa.table(columns, schema=PASSAGE))
            made = {"latents": self.latents, "weights": self.weights, "neighbours": self.neighbours,
                    "coactive": self.coactive, "tokens": self.tokens, "examples": self.examples}  # fmt: skip
            self.theme = themes(latents)
            self.count = (10 ** self.rng.uniform(0.5, 5, latents)).astype(np.int64)
            self.max = self.rng.uniform(1, 60, latents).astype(np.float32)
            # Each draws from a stream of its own, so that two can be written side by side, the largest first.
            rngs = dict(zip(SCHEMAS, self.rng.spawn(len(SCHEMAS)), strict=True))

            def table(name: str) -> None:
                with TableWriter(folder, name) as writer:
                    for start in range(0, latents, LATENTS[name]):
                        block = np.arange(start, min(start + LATENTS[name], latents), dtype=np.int32)
                        writer.write(made[name](block, latents, rngs[name]))
                print(f"  {name}: {(folder / f'{name}.parquet').stat().st_size / 1e6:,.0f} MB", flush=True)

            with ThreadPoolExecutor(2) as pool:
                list(pool.map(table, sorted(SCHEMAS, key=lambda name: name != "examples")))
            write_manifest(
                folder, kind="index", command="", seed=0,
                inputs={"sae": SAE_ID, "model": "", "tokenizer": "", "documents": ""},
                facts={"layout": LAYOUT, "site": "", "model_name": "", "d_sae": latents, "tokens": TOKENS,
                       "strata": [], "config": {"quantiles": 10, "per_group": 5, "window": 16}},
            )  # fmt: skip
        return Index(out)

    def latents(self, block: np.ndarray, *_: object) -> dict[str, Any]:
        """What each did: histograms of a falling density."""
        n, count = len(block), self.count[block]
        top = np.exp2(np.frexp(self.max[block])[1].astype(np.float64))
        bins = np.diff(1 - np.exp(-4 * np.linspace(0, 1, HISTOGRAM_BINS + 1)))
        edges = level_edges(1.0)
        levels = np.append(np.diff(1 - np.exp(-4 * edges)), 0)[: len(edges) - 1]

        def spread(shares: np.ndarray) -> np.ndarray:
            found = (shares / shares.sum() * count[:, None]).astype(np.int64)
            found[:, 0] += count - found.sum(axis=1)
            return found

        zeros = np.zeros((n, 0), np.int64)
        return {
            "latent": block, "count": count, "documents": count, "density": count / TOKENS,
            "max": self.max[block], "mean": self.max[block] / 4, "total": count * 1.0,
            "total_rest": np.zeros(n), "histogram": lists(spread(bins), pa.int64()), "histogram_top": top,
            "levels": lists(spread(levels), pa.int64()), "position_total": count * 100,
            "position_squares": count * 15_000, "position_first": count // 50,
            "position_octaves": lists(np.repeat(count[:, None] // 9, 9, 1), pa.int64()),
            "strata": lists(zeros, pa.int64()), "distinct_tokens": np.full(n, 20),
        }  # fmt: skip

    def weights(self, block: np.ndarray, _: int, rng: Rng) -> dict[str, Any]:
        """What each promotes: its word, and others."""
        n = len(block)
        drawn = rng.integers(0, WORDS, (n, 20))
        drawn[:, 0] = self.theme[block]
        logits = np.sort(rng.uniform(0, 3, (n, 10)).astype(np.float32), axis=1)[:, ::-1]
        ends = np.arange(n + 1, dtype=np.int32) * 10
        up, down = (self.texts.take(pa.array(half.ravel())) for half in (drawn[:, :10], drawn[:, 10:]))
        return {
            "latent": block, "promoted": pa.ListArray.from_arrays(ends, up),
            "promoted_logits": lists(logits, pa.float32()),
            "suppressed": pa.ListArray.from_arrays(ends, down),
            "suppressed_logits": lists(-logits, pa.float32()),
            "logits": lists(rng.integers(0, 900, (n, 50)), pa.int64()),
            "logits_low": np.full(n, -3, np.float32), "logits_high": np.full(n, 3, np.float32),
        }  # fmt: skip

    def neighbours(self, block: np.ndarray, latents: int, rng: Rng) -> dict[str, Any]:
        """Ten by the decoder and ten by the encoder."""
        n = len(block) * 20
        return {
            "latent": np.repeat(block, 20),
            "kind": np.tile(np.repeat(["decoder", "encoder"], 10), len(block)),
            "sae": pa.nulls(n, pa.string()), "rank": np.tile(np.arange(10, dtype=np.int16), len(block) * 2),
            "neighbour": rng.integers(0, latents, n, dtype=np.int32),
            "cosine": rng.uniform(0.1, 0.9, n).astype(np.float32),
        }  # fmt: skip

    def coactive(self, block: np.ndarray, latents: int, rng: Rng) -> dict[str, Any]:
        """Twenty each."""
        n = len(block) * 20
        own = np.repeat(self.count[block], 20)
        return {
            "latent": np.repeat(block, 20), "rank": np.tile(np.arange(20, dtype=np.int16), len(block)),
            "neighbour": rng.integers(0, latents, n, dtype=np.int32), "together": own // 3, "own": own,
            "other": own, "jaccard": rng.uniform(0, 0.5, n).astype(np.float32),
            "pmi": rng.uniform(0, 9, n).astype(np.float32),
        }  # fmt: skip

    def tokens(self, block: np.ndarray, _: int, rng: Rng) -> dict[str, Any]:
        """Twenty each, the word of its own first."""
        drawn = rng.integers(0, WORDS, (len(block), 20), dtype=np.int32)
        drawn[:, 0] = self.theme[block]
        firings = (self.count[block][:, None] / np.arange(1, 21) ** 2).astype(np.int64) + 1
        return {"latent": np.repeat(block, 20), "token": drawn.ravel(), "firings": firings.ravel()}

    def examples(self, block: np.ndarray, _: int, rng: Rng) -> dict[str, Any]:
        """Places where the latent's word stands, four times of five, with its activations around them."""
        n, each = len(block), TOP + SAMPLE + DRAWN
        theme = self.theme[block][:, None]
        low, high = self.first[theme], self.first[theme + 1]
        own = self.places[rng.integers(low, high, (n, each))]
        place = np.where(rng.random((n, each)) < 0.8, own, rng.integers(0, TOKENS, (n, each)))
        place %= TOKENS // WINDOW * WINDOW
        value = rng.random((n, each), dtype=np.float32) ** 3 * self.max[block][:, None]
        value[:, :TOP] = np.sort(self.max[block][:, None] - value[:, :TOP], axis=1)[:, ::-1]
        around = np.zeros((n, each, 2 * REACH + 1), np.float32)
        around[:, :, REACH] = value
        near = rng.integers(0, 2 * REACH, (n, each, 2))
        np.put_along_axis(around, near + (near >= REACH), value[:, :, None] / 4, axis=2)
        top = np.exp2(np.frexp(self.max[block])[1].astype(np.float64))[:, None]
        group = np.full((n, each), -1, np.int8)
        group[:, TOP + SAMPLE :] = (value[:, TOP + SAMPLE :] / top * INTERVALS).astype(np.int8)
        kinds = np.repeat(["top", "sample", "interval"], [TOP, SAMPLE, DRAWN])
        ranks = np.concatenate([np.arange(m, dtype=np.int16) for m in (TOP, SAMPLE, DRAWN)])
        return {
            "latent": np.repeat(block, each), "kind": np.tile(kinds, n), "group": group.ravel(),
            "rank": np.tile(ranks, n), "passage": (place // WINDOW).ravel().astype(np.int64),
            "position": (place % WINDOW).ravel().astype(np.int32), "value": value.ravel(),
            "activations": lists(around.reshape(n * each, -1), pa.float32()),
        }  # fmt: skip


def timed(name: str, limit: float, asked: Sequence[Any], answer: Callable[[Any], Any]) -> dict[str, Any]:
    """Milliseconds of each question: median, p95 and most; the first is answered once before."""
    first = spent_on(lambda: answer(asked[0]))
    return row(name, limit, [spent_on(lambda q=question: answer(q)) for question in asked], first)


def spent_on(work: Callable[[], object]) -> np.ndarray:
    """Milliseconds on the wall's clock and of the processor."""
    begun = np.array([time.perf_counter(), time.process_time()])
    work()
    return (np.array([time.perf_counter(), time.process_time()]) - begun) * 1000


def row(name: str, limit: float, spent: Sequence[np.ndarray], first: np.ndarray) -> dict[str, Any]:
    """A line of the result."""
    (median, used), (p95, used_p95) = np.percentile(spent, [50, 95], axis=0)
    most = float(max(wall for wall, _ in spent))
    bound = f"  (must be {limit:g} or less: {'yes' if p95 <= limit else 'NO'})" if limit else ""
    numbers = f"median {median:7.1f}  p95 {p95:7.1f}  most {most:7.1f}  first {first[0]:7.1f} ms"
    print(f"{name:<36} {numbers}  processor {used:6.1f}, p95 {used_p95:6.1f}{bound}", flush=True)
    return {"name": name, "value": p95, "unit": "ms, p95", "median": median, "most": most,
            "processor": used, "processor_p95": used_p95, "first": float(first[0]), "n": len(spent),
            "limit": limit or None}  # fmt: skip


def queries(made: Generator, rng: Rng, each: int) -> dict[str, list[str]]:
    """Questions of several kinds, from words as frequent as they are in the corpus and from rare ones."""
    drawn = [made.words[made.corpus[i]] for i in rng.integers(0, TOKENS, 3 * each)]
    even = [made.words[i] for i in rng.integers(0, WORDS, 2 * each)]
    starts = rng.integers(0, TOKENS - 2, each)
    phrases = [" ".join(made.words[w] for w in made.corpus[i : i + 2]) for i in starts]
    return {
        "a word of the corpus": drawn[:each],
        "a word of the vocabulary": even[:each],
        "two words": [f"{a} {b}" for a, b in zip(drawn[each : 2 * each], even[each:], strict=True)],
        "a phrase": [f'"{phrase}"' for phrase in phrases],
        "a prefix": [word[:4] + "*" for word in drawn[2 * each :]],
        "the most frequent words": made.words[:each],
    }


def add_labels(index: Index, made: Generator, count: int) -> Labels:
    """A label for each of the first latents."""
    labels = Labels.of_index(index)
    rows = [
        Row.of_label(
            Label(sae=labels.sae, latent=j, text=f"the word {made.words[made.theme[j]]}, label {j}",
                  by="benchmark", kind="lexical", model=None, at="2020-01-01T00:00:00.000000Z")
        )
        for j in range(count)
    ]  # fmt: skip
    if not labels.path.is_file():
        labels.add(rows)
    return labels


def random_sae(d_in: int, latents: int, k: int, site: str) -> SAE:
    """A TopK autoencoder whose weights are random."""
    sae = build(SAEConfig("topk", d_in, latents, k, site=site))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for start in range(0, latents, 65_536):
            rows = torch.randn(min(65_536, latents - start), d_in, generator=generator) / d_in**0.5
            sae.W_dec[start : start + len(rows)] = rows
            sae.W_enc[:, start : start + len(rows)] = rows.T
    return sae


def pasted(search: Search, sae: SAE, model: str, each: int) -> dict[str, Any]:
    """Time beyond the model's own forward pass of a search by a text of 128 tokens."""
    lm = open_model(model)
    corpus = "the storm delayed the parcel and I would like a refund of order 12 today, please . " * 40
    first = spent_on(lambda: search.activation(sae, lm, corpus[:200]))
    spent: list[np.ndarray] = []

    def forward(text: str) -> None:
        for _ in read_rows(
            lm, [Document.of_text(text)], sae.site, positions="all", context=CONTEXT, batch_tokens=CONTEXT
        ):
            pass

    for n in range(each):
        ids = lm.tokenizer(corpus[n * 7 : n * 7 + 1000], add_special_tokens=False)["input_ids"][:127]
        text = lm.tokenizer.decode(ids)
        alone = spent_on(lambda text=text: forward(text))
        spent.append(spent_on(lambda text=text: search.activation(sae, lm, text)) - alone)
    tokens = len(search.activation(sae, lm, text)[0].activations)
    return row(f"a pasted text, {tokens} tokens, d_in {lm.d_in}", 300, spent, first)


def main() -> None:
    """Generate, measure, print and write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--latents", type=int, default=1_000_000)
    parser.add_argument("--labels", type=int, default=20_000)
    parser.add_argument("--questions", type=int, default=60, help="of each kind")
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--model", default="practice")
    parser.add_argument("--site", default="layers.2.resid_post")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--index", type=Path, help="where the generated index is kept; a temporary folder if none"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = options.index or Path(name) / "index"
        made, rng = Generator(np.random.default_rng(0)), np.random.default_rng(1)
        begun = time.perf_counter()
        index = Index(folder) if folder.exists() else made.write(folder, options.latents)
        made.theme = themes(options.latents)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"index of {index.d_sae:,} latents: {size / 1e9:.2f} GB, {time.perf_counter() - begun:.0f} s")
        begun = time.perf_counter()
        TextIndex.of(index)
        print(
            f"full text: {text_path(index).stat().st_size / 1e9:.2f} GB, {time.perf_counter() - begun:.0f} s"
        )
        search = Search(index, add_labels(index, made, min(options.labels, options.latents)))
        pages = rng.integers(0, index.d_sae, 5 * options.questions).tolist()
        rows = [
            timed("a feature's page, as JSON", 50, pages, lambda j: json.dumps(index.latent(j).as_dict()))
        ]
        asked = queries(made, rng, options.questions)
        mixed = [query for group in zip(*asked.values(), strict=True) for query in group]
        rows.append(timed("full text, all kinds", 100, mixed, search.text))
        rows += [timed(f"  {kind}", 0, some, search.text) for kind, some in asked.items()]
        where = [[f"density<{10.0**-e}", f"max>{m}"] for e in range(1, 6) for m in range(10)]
        rows.append(timed("numbers", 0, where, lambda w: search.statistics(w, "-max")))
        sae = random_sae(open_model(options.model).d_in, index.d_sae, options.k, options.site)
        directions = list(rng.standard_normal((10, sae.config.d_in)))
        rows.append(timed("a direction", 0, directions, lambda v: search.direction(v, sae)))
        rows.append(pasted(search, sae, options.model, options.questions))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"peak memory {peak:.2f} GB")
    if options.out:
        work = {key: str(v) if isinstance(v, Path) else v for key, v in vars(options).items()}
        record = {
            "work": work | {"index_gb": size / 1e9}, "machine": platform.processor() or platform.machine(),
            "versions": {"torch": torch.__version__, "pyarrow": pa.__version__}, "rows": rows,
            "ratios": {}, "peak_gb": peak,
        }  # fmt: skip
        options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
