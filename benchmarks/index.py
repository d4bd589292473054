"""The index side by side with SAEDashboard's pages, in alternating turns on the same autoencoder and tokens.

    make bench NAME=index JSON=out.json
    make bench NAME=index ARGS="--work peer --tokens 16384 --rounds 2 --minutes 60"     # more of it

peer      all of `build_index`, which tokenises too, against SAEDashboard's SaeVisRunner and its HTML page, of
          every latent of a TopK autoencoder of `--width` latents: time, most memory held, bytes on the disk
nonzeros  the pass alone (statistics, samples, best examples) on random codes with 8 to 64 latents a token
memory    the whole build over ever more tokens, which the model itself writes: most memory held

Each tool runs in a process of its own, so that memory is its own; loading is not timed.  In a turn both do
the same work, the order changes from turn to turn, and a ratio is the median over turns of the ratio within a
turn.  The autoencoder is as training starts, scaled on the model's own activations; neither speed nor size
depends on how good it is.  SAEDashboard reads the activations again for every 256 latents, so few tokens make
a long turn: it is run on 256 and on 768 latents first, and where all of them would take its turns together
more than `--minutes`, it gets fewer, its time and disk for all are read off a line through what was measured,
and every number that comes of it says "extrapolated".
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import subjects
import torch
from turns import Result

from training import machine, versions
from unbraid.evaluation.references import untrained
from unbraid.features import loops
from unbraid.features.index import IndexConfig
from unbraid.features.state import State, row_keys
from unbraid.model.load import LanguageModel, load_model
from unbraid.model.read import read_sites
from unbraid.model.sites import Site
from unbraid.sae.base import SAEConfig
from unbraid.sae.registry import build

WORK = ("peer", "nonzeros", "memory")
CONTEXT = 256
BATCH = 256
"""Latents for which SAEDashboard reads the activations once more."""
LONGEST = 5400
"""Seconds after which a tool is stopped."""
PEERS = Path(".venv/peers")


def prepare(folder: Path, given: argparse.Namespace) -> None:
    """Write what workers read: settings, tokens of stories and the texts they come from, the autoencoder."""
    place = subjects.SHARED / "models" / given.model
    lm = load_model(place)
    windows: list[list[int]] = []
    texts: list[str] = []
    for story in subjects.stories("train"):
        ids = lm.tokenizer(story.text)["input_ids"][:CONTEXT]
        text = lm.tokenizer.decode(ids, skip_special_tokens=True)
        if len(ids) == CONTEXT and lm.tokenizer(text)["input_ids"] == ids:
            windows.append(ids)
            texts.append(text)
        if len(windows) * CONTEXT >= given.tokens:
            break
    kept = torch.tensor(windows)
    if len(kept) * CONTEXT < given.tokens:
        raise SystemExit(f"the stories give {len(kept) * CONTEXT:,} tokens only")
    np.save(folder / "tokens.npy", kept.numpy())
    write_texts(folder / "texts.jsonl", texts)
    write_autoencoder(folder, given, lm, kept)


def write_texts(path: Path, texts: Iterable[str]) -> None:
    """One a line, in JSON: a worker reads them as it goes."""
    with path.open("w") as file:
        file.writelines(json.dumps(text) + "\n" for text in texts)


def write_autoencoder(folder: Path, given: argparse.Namespace, lm: LanguageModel, kept: torch.Tensor) -> None:
    """Write the settings and an autoencoder as training starts, scaled on activations of windows (n, T)."""
    site = Site(given.layer, "resid_post")
    x = read_sites(lm, kept[:8], torch.ones_like(kept[:8]), [site])[site].flatten(0, 1).float()
    config = SAEConfig("topk", lm.d_in, given.width, given.k, site=str(site), model_name=lm.name)
    untrained(build(config), x, 0).save_pretrained(folder / "sae")
    place = str(subjects.SHARED / "models" / given.model)
    settings = {"model": place, "context": CONTEXT, "layer": given.layer, "width": given.width}
    (folder / "settings.json").write_text(json.dumps({**settings, "threads": given.threads}))


@torch.no_grad()
def written(lm: LanguageModel, tokens: int, at_once: int = 512) -> Iterator[torch.Tensor]:
    """Windows (at_once, CONTEXT) of what the model writes by itself; at least so many tokens."""
    begin = torch.full((at_once, 1), lm.tokenizer.bos_token_id)
    for seed in range(-(-tokens // (at_once * CONTEXT))):
        torch.manual_seed(seed)
        yield lm.model.generate(  # pyright: ignore[reportCallIssue]
            begin, attention_mask=torch.ones_like(begin), do_sample=True, top_k=0,
            min_new_tokens=CONTEXT - 1, max_new_tokens=CONTEXT - 1, pad_token_id=lm.tokenizer.bos_token_id,
        )  # fmt: skip


def one(tool: str, python: str, folder: Path, latents: int | None = None) -> dict[str, float]:
    """Run a tool once, SAEDashboard on the first `latents` where they are given; what it made is removed."""
    worker = Path(__file__).with_name("index_workers.py")
    shutil.rmtree(folder / tool, ignore_errors=True)
    words = [python, str(worker), tool, str(folder), *([] if latents is None else [str(latents)])]
    try:
        run = subprocess.run(words, stdout=subprocess.PIPE, text=True, timeout=LONGEST)
    except subprocess.TimeoutExpired as error:
        raise SystemExit(f"{tool} was not done after {LONGEST:,} s; give it less") from error
    if run.returncode or not run.stdout.strip():
        raise SystemExit(f"{tool} failed; see above")
    shutil.rmtree(folder / tool)
    found = json.loads(run.stdout.strip().splitlines()[-1])
    said = ", ".join(f"{n} {v:,.1f}" for n, v in found.items())
    print(f"  {tool}{f' ({latents:,} latents)' if latents else ''}: {said}", file=sys.stderr, flush=True)
    return found


def against_saedashboard(found: Result, given: argparse.Namespace, folder: Path) -> None:
    """Both tools on the same tokens; SAEDashboard on as many latents as `--minutes` allow, all as a rule."""
    prepare(folder, given)
    tools = {"unbraid": str(given.python), "saedashboard": str(given.peer)}
    one("unbraid", tools["unbraid"], folder)  # compiles the loops
    few = {n: one("saedashboard", tools["saedashboard"], folder, n) for n in (BATCH, 3 * BATCH)}
    for n, run in few.items():
        found.row(f"saedashboard_seconds_of_{n}_latents", run["seconds"], "s")
    each = (few[3 * BATCH]["seconds"] - few[BATCH]["seconds"]) / 2  # of a batch beyond the first
    left = 60 * given.minutes / given.rounds - few[BATCH]["seconds"]
    latents = min(given.width, BATCH * (1 + max(2, int(left / each))))
    found.row("saedashboard_latents", latents, f"of {given.width:,}")
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in tools}
    for turn in range(given.rounds):
        for name in list(tools)[:: 1 if turn % 2 == 0 else -1]:
            taken[name].append(one(name, tools[name], folder, latents if name == "saedashboard" else None))
    units = {"seconds": "s", "processor": "processor s", "peak_mb": "MB held", "mb": "MB on disk"}
    for name, runs in taken.items():
        for what, unit in units.items():
            values = sorted(run[what] for run in runs)
            found.row(f"{name}_{what}", median(values), unit, values[0], values[-1])
    ours, theirs, by = taken["unbraid"], taken["saedashboard"], ""
    for what in ("seconds", "processor"):  # 1 where its cost is linear in latents
        foreseen = along(few[BATCH], few[3 * BATCH], BATCH, 3 * BATCH, latents, what)
        found.row(f"saedashboard_{what}_of_a_line", median(r[what] for r in theirs) / foreseen, "ratio")
    if latents < given.width:
        # Memory only ever grows with latents, so what it held for a part of them is kept as it is.
        by, whole = "_extrapolated", {"peak_mb": [run["peak_mb"] for run in theirs]}
        for what in ("seconds", "processor", "mb"):
            whole[what] = [along(few[BATCH], run, BATCH, latents, given.width, what) for run in theirs]
            found.row(f"saedashboard_{what}{by}", median(whole[what]), units[what])
        theirs = [{what: whole[what][turn] for what in units} for turn in range(given.rounds)]
    for key, what in (
        ("", "seconds"),
        ("_processor_time", "processor"),
        ("_memory", "peak_mb"),
        ("_disk", "mb"),
    ):
        mine, other = ([run[what] for run in runs] for runs in (ours, theirs))
        # How many times faster, and which share of the memory and of the disk.
        above, below = (other, mine) if key in ("", "_processor_time") else (mine, other)
        found.ratio(f"index{key}_vs_saedashboard{by}", above, below)


def along(
    less: dict[str, float], more: dict[str, float], few: int, many: int, latents: int, what: str
) -> float:
    """What a line through the runs of `few` and `many` latents gives for `latents`."""
    return less[what] + (more[what] - less[what]) / (many - few) * (latents - few)


def nonzeros(found: Result, given: argparse.Namespace, folder: Path) -> None:
    """Nanoseconds of the pass for each firing, from few to many of them."""
    n, stretches, rng = 32768, 6, np.random.default_rng(0)
    each: dict[int, float] = {}
    for k in (8, 16, 32, 64):
        state = State(given.width, IndexConfig().sizes, folder)
        state.stratum("")
        for stretch in range(stretches):
            document = stretch * n // CONTEXT + np.arange(n) // CONTEXT
            rows = np.zeros(n, loops.ROW)
            rows["passage"] = rows["document"] = document
            rows["position"] = np.arange(n) % CONTEXT
            rows["token"] = rng.zipf(1.5, n).clip(max=2000)
            rows["key"] = row_keys(0, document, rows["position"])
            rows["context"] = rng.integers(0, 2**63, n)
            # A token's latents are different ones, some of them often so and most seldom.
            base = (rng.random((n, 1)) ** 2 * given.width).astype(np.int32)
            latents = (base + np.arange(k, dtype=np.int32) * (given.width // k)) % given.width
            values = rng.exponential(1, n * k).astype(np.float32) + np.float32(1e-6)
            began = time.process_time()
            state.add(np.arange(n + 1, dtype=np.int64) * k, latents.ravel(), values, rows)
            if stretch >= stretches // 2:  # the samples are full by then
                each[k] = each.get(k, 0.0) + (time.process_time() - began)
        nanoseconds = 1e9 * each[k] / (n * k * (stretches - stretches // 2))
        found.row(f"nonzeros_{k}_a_token", nanoseconds, "processor ns a firing")
    found.ratios["index_seconds_64_vs_8_nonzeros"] = each[64] / each[8]


def memory(found: Result, given: argparse.Namespace, folder: Path) -> None:
    """The most memory that a build holds, over more and more tokens."""
    lm = load_model(subjects.SHARED / "models" / given.model)
    # Windows end where the budget of tokens does, so a twentieth more is written than is read.
    windows = written(lm, max(given.memory_tokens) * 21 // 20)
    first = next(windows)
    write_autoencoder(folder, given, lm, first)
    every = (row for some in chain([first], windows) for row in some)
    write_texts(folder / "texts.jsonl", (lm.tokenizer.decode(row, skip_special_tokens=True) for row in every))
    settings: dict[str, Any] = json.loads((folder / "settings.json").read_text())
    peaks: list[float] = []
    for tokens in given.memory_tokens:
        (folder / "settings.json").write_text(json.dumps({**settings, "tokens": tokens}))
        run = one("unbraid", str(given.python), folder)
        peaks.append(run["peak_mb"])
        found.row(f"memory_{tokens}_tokens", run["peak_mb"], "MB held", run["loaded_mb"], run["peak_mb"])
    found.ratios["index_memory_of_most_vs_fewest_tokens"] = peaks[-1] / peaks[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", nargs="+", choices=WORK, default=WORK)
    numbers = {"rounds": 1, "minutes": 20, "threads": 2, "tokens": 8192, "width": 8192, "k": 32, "layer": 1}
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--memory-tokens", nargs="+", type=int, default=[131072, 524288, 2097152])
    parser.add_argument("--model", default="tinystories-656k", help="of the shared models")
    parser.add_argument(
        "--python", type=Path, default=Path(sys.executable), help="that has unbraid, for its memory"
    )
    parser.add_argument("--peer", type=Path, default=PEERS / "saedashboard" / "bin" / "python")
    parser.add_argument("--folder", type=Path, help="where to write, if not the system's temporary folder")
    parser.add_argument("--out", type=Path, help="file for the result as JSON")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found = Result()
    works = {"peer": against_saedashboard, "nonzeros": nonzeros, "memory": memory}
    for work in given.work:
        print(f"\n{work}", flush=True)
        with tempfile.TemporaryDirectory(dir=given.folder) as name:
            works[work](found, given, Path(name))
    if given.out:
        result = {
            "work": {n: v for n, v in vars(given).items() if n not in ("folder", "out", "peer", "python")},
            "machine": machine(),
            "versions": versions(str(given.python)),
            "rows": found.rows,
            "ratios": found.ratios,
        }
        given.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
