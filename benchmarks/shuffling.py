"""How well the orders of reading mix a corpus, and what that does to an autoencoder.

    make bench NAME=shuffling JSON=out.json ARGS="--model M --text train.txt --held valid.txt"
    python benchmarks/shuffling.py --activations DIR     # the mixing of a capture of yours

*full*: a finished store, read by runs from all over it (`unbraid train --activations`). *in order*: groups in
the order of capture, shuffled inside (`--follow` and `--model`, which deal out the same rows). *none*: as
captured, which sorts a document's neighbours by length. Each number is a multiple of what batches drawn at
random from the whole corpus have (`unbraid.activations.mixing`).

With --held, autoencoders of the same seeds are trained in both orders for one epoch, and judged by the share
of variance that they leave unexplained on held-out text. Several --text are read one after the other, which
makes a corpus that is sorted by topic.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from unbraid.activations.capture import capture
from unbraid.activations.documents import Document, read_documents
from unbraid.activations.follow import Following
from unbraid.activations.mixing import documents_of, measure, order_of_capture, order_of_store
from unbraid.activations.reading import CaptureConfig
from unbraid.activations.store import ActivationStore
from unbraid.activations.stream import batches
from unbraid.model.load import load_model
from unbraid.model.sites import Site
from unbraid.training.config import TrainConfig
from unbraid.training.trainer import train

SHARD = 32_768


def mixing(store: ActivationStore, batch_size: int, seeds: int) -> Iterator[dict[str, object]]:
    """A row for every order and buffer, over the first epoch of each seed."""
    n, of = store.n_tokens, documents_of(store)
    orders = [("none", lambda seed: np.arange(n))]
    for shards in (1, 2, 4, 8, 16):
        tokens = shards * SHARD
        if tokens < n:
            many = max(1, tokens // store.shard_tokens)
            name = f"full, buffer of {many * store.shard_tokens:,}"
            orders.append(
                (name, lambda seed, b=many: order_of_store(n, store.shard_tokens, seed=seed, buffer_shards=b))
            )
            name = f"in order, buffer of {tokens:,}"
            orders.append((name, lambda seed, b=tokens: order_of_capture(n, seed=seed, buffer_tokens=b)))
    for name, order in orders:
        found = [measure(order(seed), of, batch_size) for seed in range(seeds)]
        for what in ("same_document", "documents", "drift"):
            values = [getattr(one, what) for one in found]
            yield {
                "name": f"{name}: {what}", "value": statistics.mean(values), "unit": "times chance",
                "low": min(values), "high": max(values),
            }  # fmt: skip


def quality(
    store: ActivationStore, held: dict[str, torch.Tensor], options: argparse.Namespace, folder: Path
) -> Iterator[dict[str, object]]:
    """What autoencoders leave unexplained of held-out activations (n, d) after one epoch in either order."""
    site, steps = store.sites[0], store.n_tokens // options.batch_size
    left: dict[str, list[float]] = {}
    for seed in range(options.seeds):
        for order in ("full", "in order"):
            source = store
            if order == "in order":
                source = Following(store.folder, buffer_tokens=options.buffer_tokens)
            config = TrainConfig(
                steps=steps, batch_size=options.batch_size, d_sae=options.width, k=options.k, seed=seed
            )
            sae = train(source, site, config, folder / f"{order}-{seed}")
            for name, x in held.items():
                with torch.no_grad():
                    fvu = (x - sae(x).x_hat).square().sum() / (x - x.mean(dim=0)).square().sum()
                left.setdefault(f"{order}: fvu on {name}", []).append(float(fvu))
    for name, values in sorted(left.items()):
        yield {
            "name": name, "value": statistics.mean(values), "unit": "share", "low": min(values),
            "high": max(values),
        }  # fmt: skip


def read(texts: Sequence[Path]) -> Iterator[Document]:
    """One corpus after the other."""
    for text in texts:
        yield from read_documents(text)


def main() -> None:
    """Measure, print and write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--activations", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--text", type=Path, nargs="+")
    parser.add_argument("--held", type=Path, nargs="+")
    parser.add_argument("--site", default="layers.2.resid_post")
    parser.add_argument("--tokens", type=int, help="of the corpus; all when left out")
    parser.add_argument("--held-tokens", type=int, default=50_000, help="of each held-out text")
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--buffer-tokens", type=int, default=131_072)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if (options.activations is None) == (options.model is None or options.text is None):
        parser.error("give --activations, or --model and --text")
    rows: list[dict[str, object]] = []

    def report(found: Iterator[dict[str, object]]) -> None:
        for row in found:
            print(f"{row['name']:<50} {row['value']:.4f}  {row['low']:.4f} to {row['high']:.4f}", flush=True)
            rows.append(row)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.activations:
            store = ActivationStore(options.activations)
        else:
            lm = load_model(options.model)
            config = CaptureConfig(sites=(Site.parse(options.site),), tokens=options.tokens)
            store = capture(lm, read(options.text), config, folder / "acts")
        size = f"{store.n_tokens:,} tokens of {store.n_documents:,} documents"
        print(f"{size}, batches of {options.batch_size:,}")
        report(mixing(store, options.batch_size, options.seeds))
        if options.held and options.model:
            held: dict[str, torch.Tensor] = {}
            for text in options.held:
                name = f"{text.parent.name}/{text.stem}"
                config = CaptureConfig(sites=(Site.parse(options.site),), tokens=options.held_tokens)
                made = capture(lm, read_documents(text), config, folder / name.replace("/", "-"))
                (held[name],) = batches(made, made.sites[0], made.n_tokens, seed=0, steps=1)
            report(quality(store, held, options, folder / "saes"))
    if options.out:
        work = {key: str(v) if isinstance(v, Path | list) else v for key, v in vars(options).items()}
        record = {
            "work": work | {"corpus": size}, "machine": platform.processor() or platform.machine(),
            "versions": {"torch": torch.__version__}, "rows": rows, "ratios": {},
        }  # fmt: skip
        options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
