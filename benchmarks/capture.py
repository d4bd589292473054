"""Capture side by side with the bare forward pass and with SAELens, in alternating turns.

    make bench NAME=capture JSON=out.json
    python benchmarks/capture.py --work overhead store --rounds 5     # a part of it

overhead  one site against the same layers run without a hook: `read_sites` on the same batches, one after the
          other, and all of `capture`, which also checks and writes, on the same text, which both tokenise
sites     six sites in one pass against the deepest of them alone, all of `capture`
saelens   all of `capture`, and without a disk, against SAELens's ActivationsStore, which writes nothing, over
          its wrapper of a Hugging Face model (`vs_saelens`) and its HookedTransformer (its default), with as
          many contexts of one length
packing   several documents in a row with an attention mask of their own, against batches by length
store     against the Arrow cache that SAELens writes: the same rows written, both to the system's cache and
          both to the disk, and read in shuffled batches
quality   autoencoders trained on what a bfloat16 (and an int8) model gives, measured on the float32 model
memory    50 million tokens through a tiny model: resident memory over time (only when named)

*big* is a Llama of GPT-2 small's size (12 layers of 768), read in the middle on WikiText-2, with random
weights, on which speed does not depend; *real* is a trained model on stories. In a turn every contender does
the same work, the order changes from turn to turn, the first turn is not counted, and a ratio is the median
over turns of the ratio within a turn. On a busy machine `--clock processor --threads 1` is steadier.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import subjects
import torch
from stores import against_arrow, all_rows, memory
from subjects import BATCH_TOKENS, CONTEXT, Batches
from turns import CLOCKS, Result, clock, timed, turns

from training import machine, versions
from unbraid.activations import reading as room
from unbraid.activations.capture import capture
from unbraid.activations.documents import Document
from unbraid.activations.reading import CaptureConfig
from unbraid.activations.store import ActivationStore
from unbraid.evaluation.evaluate import evaluate_all
from unbraid.model.load import LanguageModel
from unbraid.model.read import read_sites
from unbraid.model.sites import Site
from unbraid.stats.bootstrap import mean_of_runs
from unbraid.training.config import TrainConfig
from unbraid.training.trainer import train

WORK = ("overhead", "sites", "saelens", "packing", "store", "quality", "memory")
CONTENDERS = (
    "unbraid_float32", "unbraid_in_memory", "unbraid_bfloat16", "unbraid_int8", "saelens_proxy",
    "saelens_hooked_transformer",
)  # fmt: skip
REAL_LAYER = 6
"""After which of its eight layers the trained model is read."""


def resid_post(layer: int) -> Site:
    """The residual stream after a layer."""
    return Site(layer, "resid_post")


@dataclass(frozen=True)
class Subject:
    """A model, what it reads, after which layer, and how many tokens of it in a turn."""

    lm: LanguageModel
    documents: list[Document]
    layer: int
    tokens: int


def chosen(given: argparse.Namespace) -> Iterator[tuple[str, Subject]]:
    """The subjects by name."""
    if "big" in given.subjects:
        lm = subjects.big(given.hidden, given.layers)
        yield "big", Subject(lm, subjects.wiki(), given.layers // 2, given.turn)
    if "real" in given.subjects:
        yield "real", Subject(subjects.real(), subjects.stories(), REAL_LAYER, given.turn)


def capturing(
    lm: LanguageModel, documents: list[Document], sites: list[Site], tokens: int, folder: Path
) -> Callable[[], float]:
    """A job that captures into a new folder, which it removes."""
    config = CaptureConfig(tokens=tokens, context=CONTEXT, batch_tokens=BATCH_TOKENS, sites=tuple(sites))

    def job() -> float:
        seconds = timed(lambda: capture(lm, documents, config, folder / "out"))
        shutil.rmtree(folder / "out")
        return seconds

    return job


def reading(lm: LanguageModel, site: Site, batches: Batches, *, packed: bool = False) -> Callable[[], float]:
    """A job that reads a site of prepared batches."""
    return lambda: timed(lambda: [read_sites(lm, *batch, [site], packed=packed) for batch in batches])


def by_batch(lm: LanguageModel, site: Site, batches: Batches, rounds: int) -> dict[str, list[float]]:
    """Seconds of every batch through the layers up to a site by themselves, and by `read_sites` right before
    or after: an odd batch takes a fifth longer, with either, depending on where its memory lies."""
    stack = bare_stack(lm, site, batches)
    bare = torch.no_grad()(lambda inputs: stack(**inputs, use_cache=False))
    taken: dict[str, list[float]] = {"bare": [], "read_sites": []}
    for batch in batches:
        inputs = lm.inputs(*batch)
        jobs = {
            "bare": lambda inputs=inputs: timed(lambda: bare(inputs)),
            "read_sites": reading(lm, site, [batch]),
        }
        for name, seconds in turns(jobs, rounds).items():
            taken[name] += seconds
    return taken


def bare_from_text(at: Subject, site: Site, batches: Batches) -> Callable[[], float]:
    """The same from the documents on: they are tokenised and padded, and the layers run."""
    stack = bare_stack(at.lm, site, batches)

    @torch.no_grad()
    def work() -> None:
        for batch in subjects.padded(subjects.planned(at.lm, at.documents, at.tokens), at.lm.pad_id):
            stack(**at.lm.inputs(*batch), use_cache=False)

    return lambda: timed(work)


@torch.no_grad()
def bare_stack(lm: LanguageModel, site: Site, batches: Batches) -> Any:
    """The layers up to a site by themselves, seen to compute the same there."""
    assert site.layer is not None
    stack = subjects.cut(lm, site.layer)
    out = stack(**lm.inputs(*batches[-1]), use_cache=False).last_hidden_state
    if not torch.equal(out, read_sites(lm, *batches[-1], [site])[site]):
        raise SystemExit("the bare pass computes something else")
    return stack


def overhead(found: Result, given: argparse.Namespace, folder: Path) -> None:
    """One site against the bare layers."""
    for name, at in chosen(given):
        site = resid_post(at.layer)
        batches = subjects.padded(subjects.planned(at.lm, at.documents, at.tokens), at.lm.pad_id)
        found.row(f"{name}_padding", padding(batches, at.tokens), "share")
        passes = by_batch(at.lm, site, batches, given.rounds)
        jobs = {
            "bare_from_text": bare_from_text(at, site, batches),
            "capture": capturing(at.lm, at.documents, [site], at.tokens, folder),
        }
        taken = turns(jobs, given.rounds)
        found.rates(name, at.tokens, taken)
        outside = [beside(jobs["capture"]) for _ in range(given.rounds)]
        found.row(f"{name}_capture_beside_read_sites", *middle(outside))
        found.ratio(f"{name}_read_sites_overhead", passes["read_sites"], passes["bare"])
        key = "capture_overhead" if name == "big" else f"capture_overhead_{name}"
        found.ratio(key, taken["capture"], taken["bare_from_text"])


def beside(job: Callable[[], float]) -> float:
    """What a capture does beside `read_sites`, as a share of the time inside: both from the same moments, so
    that it holds on a machine whose speed changes."""
    inside: list[float] = []

    def clocked(*args: Any, **more: Any) -> Any:
        found: list[Any] = []
        inside.append(timed(lambda: found.append(read_sites(*args, **more))))
        return found[0]

    with patch.object(room, "read_sites", clocked):
        return job() / sum(inside) - 1


def middle(values: list[float]) -> tuple[float, str, float, float]:
    """Median, unit, lowest and highest of some shares."""
    return median(values), "share", min(values), max(values)


def six_sites(found: Result, given: argparse.Namespace, folder: Path) -> None:
    """Six layers against the deepest of them."""
    for name, at in chosen(given):
        sites = [resid_post(layer) for layer in range(max(0, at.layer - 5), at.layer + 1)]
        one, six = (capturing(at.lm, at.documents, part, at.tokens, folder) for part in (sites[-1:], sites))
        taken = turns({"one_site": one, "six_sites": six}, given.rounds)
        found.rates(name, at.tokens, taken)
        key = "capture_six_sites_vs_one" if name == "big" else f"capture_six_sites_vs_one_{name}"
        found.ratio(key, taken["six_sites"], taken["one_site"])


def padding(batches: Batches, tokens: int) -> float:
    """Places that hold no token, as a share of the tokens."""
    return sum(ids.numel() for ids, _ in batches) / tokens - 1


def packing(found: Result, given: argparse.Namespace) -> None:
    """Rows of one context with several documents each, against batches by length."""
    for name, at in chosen(given):
        lm = at.lm if at.lm.packs else subjects.real(name="stories260k")
        site = resid_post(min(at.layer, lm.n_layers - 1))
        work = subjects.planned(lm, at.documents, at.tokens)
        contenders = {"by_length": subjects.padded(work, lm.pad_id), "packed": subjects.packed(work)}
        for how, batches in contenders.items():
            found.row(f"{name}_padding_{how}", padding(batches, at.tokens), "share")
        jobs = {h: reading(lm, site, b, packed=h == "packed") for h, b in contenders.items()}
        taken = turns(jobs, given.rounds)
        found.rates(name, at.tokens, taken)
        found.ratio(f"{name}_time_packed_vs_by_length", taken["packed"], taken["by_length"])


def against_saelens(found: Result, given: argparse.Namespace, folder: Path) -> None:
    """All of our capture, in every precision, and SAELens's store over both of its kinds of model."""
    import saelens_store as peer

    lm, layer = subjects.big(given.hidden, given.layers), given.layers // 2
    site, texts = resid_post(layer), [document.text or "" for document in subjects.wiki()]
    # Full contexts, as its store makes them, and about as much text as it takes from its own.
    documents = [Document.of_text("\n".join(texts)[: 6 * given.turn], id="all")]
    calls = given.turn // (peer.SEQUENCES * CONTEXT)
    # Its wrapper leaves hooks on the model, which ours must not run through.
    models = {
        "saelens_proxy": peer.proxy(subjects.another(lm), layer),
        "saelens_hooked_transformer": peer.hooked_transformer(lm, layer),
    }
    theirs = {name: peer.live(*model, texts, lm.d_in, CONTEXT) for name, model in models.items()}
    ids = torch.randint(5, 5000, (2, CONTEXT), generator=torch.Generator().manual_seed(0))
    mine = read_sites(lm, ids, torch.ones_like(ids), [site])[site]
    for name, store in theirs.items():
        off = float((store.get_activations(ids) - mine).norm() / mine.norm())
        found.row(f"{name}_activations_differ_by", off, "share of the norm")

    def job(store: Any) -> Callable[[], float]:
        return lambda: timed(lambda: [store.get_raw_llm_batch() for _ in range(calls)])

    ours = {"float32": lm}
    if "unbraid_bfloat16" in given.contenders:
        ours["bfloat16"] = subjects.big(given.hidden, given.layers, "bfloat16")
    if "unbraid_int8" in given.contenders and (quantised := subjects.int8(lm)) is not None:
        ours["int8"] = quantised
    jobs = {
        f"unbraid_{precision}": capturing(model, documents, [site], given.turn, folder)
        for precision, model in ours.items()
    }
    jobs["unbraid_in_memory"] = lambda: timed(lambda: in_memory(lm, documents, site, given.turn))
    jobs |= {name: job(store) for name, store in theirs.items()}
    taken = turns({name: work for name, work in jobs.items() if name in given.contenders}, given.rounds)
    found.rates("big", given.turn, taken)
    names = {"float32": "", "in_memory": "_in_memory", "bfloat16": "_bf16", "int8": "_int8"}
    for precision, key in names.items():
        for peer_name, against in (("saelens_proxy", ""), ("saelens_hooked_transformer", "_default")):
            if (own := taken.get(f"unbraid_{precision}")) and (other := taken.get(peer_name)):
                found.ratio(f"capture{key}_vs_saelens{against}", other, own)


def in_memory(lm: LanguageModel, documents: list[Document], site: Site, tokens: int) -> list[torch.Tensor]:
    """What SAELens's store does: tokens of the texts to rows in memory, nothing written."""
    rows: list[torch.Tensor] = []
    for batch in subjects.planned(lm, documents, tokens):
        (padded,) = subjects.padded([batch], lm.pad_id)
        rows.append(read_sites(lm, *padded, [site])[site][padded[1].bool()])
    return rows


def quality(found: Result, folder: Path, seeds: int, tokens: int, steps: int) -> None:
    """Train the same autoencoders on what models of several precisions give; measure all on float32."""
    lm, site = subjects.real(), resid_post(4)
    models = {"float32": lm, "bfloat16": subjects.real("bfloat16"), "int8": subjects.int8(lm)}
    made: dict[str, ActivationStore] = {}
    for name, model in models.items():
        if model is not None:
            config = CaptureConfig(tokens=tokens, sites=(site,))
            made[name] = capture(model, subjects.stories("train"), config, folder / f"capture-{name}")
    exact = all_rows(made["float32"], site)
    spread = float((exact - exact.mean(dim=0)).square().sum())
    for name in list(made)[1:]:
        off = float((all_rows(made[name], site) - exact).square().sum())
        found.row(f"quality_{name}_activations_differ_by", off / spread, "share of the variance")
    del exact
    saes = [
        train(
            store,
            None,
            TrainConfig(steps=steps, batch_size=2048, d_sae=1024, k=16, seed=seed),
            folder / f"sae-{name}-{seed}",
        )
        for name, store in made.items()
        for seed in range(seeds)
    ]
    measured = evaluate_all(saes, lm, subjects.stories("valid"), site=site, tokens=20_000)
    for key in ("fvu", "delta_ce"):
        by_seed = np.array([m.metrics[key].value for m in measured]).reshape(len(made), seeds)
        for name, values in zip(made, by_seed, strict=True):
            found.interval(f"quality_{key}_{name}", mean_of_runs(values))
            print(f"    by seed: {', '.join(f'{value:.5f}' for value in values)}")
        for name, values in list(zip(made, by_seed, strict=True))[1:]:
            found.interval(f"quality_{key}_{name}_less_float32", mean_of_runs(values - by_seed[0]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", nargs="+", choices=WORK, default=WORK[:-1])
    numbers = {
        "rounds": 8,
        "threads": 2,
        "seeds": 3,
        "steps": 400,
        "hidden": 768,
        "layers": 12,
        "turn": 32768,
    }
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rows", type=int, default=1_048_576, help="written and read by store")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--subjects", nargs="+", choices=("big", "real"), default=("big", "real"))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS, help="of saelens")
    parser.add_argument("--tokens", type=int, default=50_000_000, help="of the memory run")
    parser.add_argument("--train-tokens", type=int, default=600_000, help="captured for quality")
    parser.add_argument("--folder", type=Path, help="where to write, if not the system's temporary folder")
    parser.add_argument("--out", type=Path, help="file for the result as JSON")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    clock[0] = CLOCKS[given.clock]
    found = Result()
    works: dict[str, Callable[[Path], None]] = {
        "overhead": lambda folder: overhead(found, given, folder),
        "sites": lambda folder: six_sites(found, given, folder),
        "saelens": lambda folder: against_saelens(found, given, folder),
        "packing": lambda _: packing(found, given),
        "store": lambda folder: against_arrow(found, given.rounds, given.rows, folder),
        "quality": lambda folder: quality(found, folder, given.seeds, given.train_tokens, given.steps),
        "memory": lambda folder: memory(found, folder, given.tokens),
    }
    for work in given.work:
        print(f"\n{work}", flush=True)
        with tempfile.TemporaryDirectory(dir=given.folder) as name:
            works[work](Path(name))
    if given.out:
        result = {
            "work": {name: value for name, value in vars(given).items() if name not in ("folder", "out")},
            "machine": {**machine(), "bf16_units": bf16_units()},
            "versions": versions(sys.executable),
            "rows": found.rows,
            "ratios": found.ratios,
        }
        given.out.write_text(json.dumps(result, indent=2) + "\n")


def bf16_units() -> bool:
    """Whether the processor multiplies bfloat16 by itself."""
    path = Path("/proc/cpuinfo")
    words = path.read_text().split() if path.exists() else []
    return "avx512_bf16" in words or "amx_bf16" in words


if __name__ == "__main__":
    main()
