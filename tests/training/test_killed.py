"""SIGKILL at random moments; the files are those of a run that nobody disturbed, byte for byte.

A few kills for most kinds of step here. `python tests/training/test_killed.py` (`make kills`) gives ten
to every architecture, a sweep and a fine-tuning.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import unbraid
from unbraid.activations.documents import Document
from unbraid.activations.store import ActivationStore
from unbraid.manifest.progress import Progress
from unbraid.manifest.record import read_manifest
from unbraid.model.load import load_model
from unbraid.recipes.sweep import Text, run_sweep
from unbraid.sae.base import SAE
from unbraid.sae.registry import ARCHITECTURES
from unbraid.training.checkpoint import FILE
from unbraid.training.config import LoopOptions, TrainConfig
from unbraid.training.finetune import FinetuneOptions, finetune
from unbraid.training.grid import Grid
from unbraid.training.trainer import train

SITES = ("layers.0.resid_post", "layers.1.resid_post", "layers.2.resid_post")
READS: dict[str, tuple[Any, Any]] = {
    "site": (SITES[1], None),
    "pair": (SITES[0], SITES[1]),
    "sites": (SITES[:2], None),
    "pairs": (SITES[:2], SITES[1:]),
}
LOOP: dict[str, Any] = {
    "steps": 96,
    "batch_size": 128,
    "checkpoint_every": 8,
    "log_every": 5,
    "dead_after": 2000,
    "calibration_tokens": 1024,
    "threads": 1,
}
OWN: dict[str, dict[str, Any]] = {
    "relu": {"resample_every": 30},
    "jumprelu": {"options": {"l0": 0.1}},
    "clt": {"options": {"l0": 0.1}},
}
EVERYTHING = (*ARCHITECTURES, "sweep", "finetune")
TEN = "UNBRAID_KILLS"
"""Environment variable with the number of kills for everything."""
FEW = {"topk": 4, "matryoshka": 2, "relu": 2, "jumprelu": 2, "gated": 2, "clt": 2, "sweep": 2, "finetune": 2}
KILLS = dict.fromkeys(EVERYTHING, int(os.environ[TEN])) if TEN in os.environ else FEW


def _make(what: str, acts: Path, model: Path, parent: Path) -> Callable[[Path, Progress], None]:
    """What one run does, with all that it reads already read but the activations."""
    store = ActivationStore(acts)
    documents = [Document.of_text(f"the red ball number {n} was wanted in a pan of water") for n in range(16)]

    def trained(out: Path, progress: Progress) -> None:
        kind = ARCHITECTURES[what]
        options = {"architecture": what, "d_sae": 64, "k": 4, **LOOP, **OWN.get(what, {})}
        site, target = READS[kind.reads]
        train(store, site, TrainConfig(**options), out, target_site=target, progress=progress)

    if what not in ("sweep", "finetune"):
        return trained
    lm = load_model(model)

    def swept(out: Path, progress: Progress) -> None:
        @contextmanager
        def stage(title: str, unit: str) -> Iterator[Progress]:
            first = 1000 * ("seed 1" in title) + 2000 * (unit == "batches")
            progress(first, first + 1)
            yield lambda done, total, note="": progress(first + done, first + total)

        grid = Grid(("topk", "batchtopk", "relu"), (4,), (64,), (SITES[1],), seed=(0, 1))
        text = Text(lambda: documents, "text", 200, 64)
        run_sweep(store, lm, text, grid, LoopOptions(**LOOP | {"steps": 40}), out, command="", stage=stage)

    def finetuned(out: Path, progress: Progress) -> None:
        sae, id = SAE.from_pretrained(parent), read_manifest(parent).id
        options = FinetuneOptions(steps=60, batch_tokens=60, lr=1e-3, checkpoint_every=8, log_every=5)
        finetune(sae, lm, documents, options, out, parent=id, parent_folder=parent, progress=progress)

    return swept if what == "sweep" else finetuned


def _serve(what: str, *paths: str) -> None:
    """For every folder on standard input fork a run into it, after the slow imports, and say what it does:
    `pid place event`, and at last `0 end status`.
    """
    run = _make(what, *map(Path, paths))
    torch.set_num_threads(1)
    for line in sys.stdin:
        out, child = Path(line.strip()), os.fork()
        if child == 0:
            _report(out.parent, lambda progress: run(out, progress))  # noqa: B023
            os._exit(0)
        os.write(1, f"0 end {os.waitpid(child, 0)[1]}\n".encode())


def _report(root: Path, run: Callable[[Progress], None]) -> None:
    """Say every step of a run and whatever it does to files below `root`."""
    pid, place, step = str(os.getpid()), "start", 0

    def say(event: str, place: str) -> None:
        os.write(1, f"{pid} {place} {step}:{event}\n".encode())

    def progress(done: int, total: int, note: str = "") -> None:
        nonlocal place, step
        place, step = "steps" if done < total else "finish", done
        say("done", place)

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.remove", "os.truncate"):
            path = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else ""
            if path.startswith(str(root)):
                name = "/".join(path.removeprefix(str(root)).split("/")[2:])  # without whole/ or killed/
                here = "checkpoint" if FILE in name and place == "steps" else place
                say(f"{event}:{name}".replace(pid, "pid").replace(" ", "_"), here)

    sys.addaudithook(look)
    say("run", place)
    run(progress)


class Moment(NamedTuple):
    """Something that a run said it does."""

    place: str
    event: str
    seconds: float
    """Until it said the next thing."""


class Runs:
    """Runs of one kind, each in a process of its own."""

    def __init__(self, what: str, *paths: Path) -> None:
        source = str(Path(unbraid.__file__).parents[1])
        environment = os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "serve", what, *map(str, paths)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment,
        )  # fmt: skip

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def into(self, out: Path, at: Moment | None = None, wait: float = 0.0) -> tuple[list[Moment], int]:
        """Run into `out`, killed so many seconds after the moment `at`; what it said, and how it ended."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{out}\n")
        found: list[Moment] = []
        last = time.perf_counter()
        for line in self.process.stdout:
            pid, place, event = line.split()
            now = time.perf_counter()
            if found:
                found[-1] = found[-1]._replace(seconds=now - last)
            last = now
            if place == "end":
                return found, int(event)
            found.append(Moment(place, event, 0.0))
            if at is not None and (place, event) == (at.place, at.event):
                time.sleep(wait)
                with suppress(ProcessLookupError):  # it has ended meanwhile
                    os.kill(int(pid), signal.SIGKILL)
                at = None
        raise AssertionError("the runs' parent died")


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _unlike(found: dict[str, bytes], expected: dict[str, bytes]) -> list[tuple[str, bytes, bytes]]:
    """Files that are not the same, each with what is around the first difference."""
    unlike = list[tuple[str, bytes, bytes]]()
    for name in sorted(found.keys() | expected.keys()):
        one, other = found.get(name, b""), expected.get(name, b"")
        if name not in found or name not in expected or one != other:
            at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 80)
            unlike.append((name, one[max(0, at - 80) : at + 80], other[max(0, at - 80) : at + 80]))
    return unlike


@pytest.fixture(scope="module")
def inputs(
    tiny_llama: Path,
    make_store: Callable[..., ActivationStore],
    planted: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path, Path]:
    """Activations at three sites, a model of their size and an autoencoder to be tuned."""
    root = tmp_path_factory.mktemp("inputs")
    x, lm = planted(6000, d_in=3 * 48), load_model(tiny_llama)
    store = make_store(root / "acts", x, sites=SITES, model_id=lm.id, tokenizer_id=lm.tokenizer_id)
    config = TrainConfig(d_sae=64, k=4, **LOOP | {"steps": 10})
    train(store, SITES[1], config, root / "sae")
    return root / "acts", tiny_llama, root / "sae"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize("what", KILLS)
def test_kills_leave_no_trace(inputs: tuple[Path, Path, Path], tmp_path: Path, what: str) -> None:
    chance, wanted = random.Random(what), KILLS[what]
    hit: list[str] = []
    missed = 0
    runs = Runs(what, *inputs)
    try:
        whole, status = runs.into(tmp_path / "whole")
        assert status == 0
        expected = _files(tmp_path / "whole")
        while len(hit) < wanted:
            # A moment out of each equal part of a run, where an event counts as much as the mean one besides
            # its time: much happens to files in little. After the last kill the run may finish.
            parts, mean = wanted - len(hit), sum(moment.seconds for moment in whole) / len(whole)
            reach = list(accumulate(moment.seconds + mean for moment in whole))
            marks = [reach[-1] * (n + chance.random()) / parts for n in range(parts)]
            moments = [whole[bisect(reach, mark)] for mark in marks]
            for at in [*moments, None]:
                said, status = runs.into(tmp_path / "killed", at, chance.random() * (at.seconds if at else 0))
                assert status in (0, signal.SIGKILL)
                if (tmp_path / "killed").exists():  # a kill after the end is none
                    missed += at is not None
                    break
                hit.append(said[-1].place)
            assert _unlike(_files(tmp_path / "killed"), expected) == [], hit
            assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
            shutil.rmtree(tmp_path / "killed")
    finally:
        runs.close()
    places = ", ".join(f"{place} {n}" for place, n in sorted(Counter(hit).items()))
    tried = len(hit) + missed
    print(
        f"\n{what}: {len(hit)} of {tried} kills hit a live run ({places}); {len(expected)} files, same bytes"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        _serve(*sys.argv[2:])
    else:
        os.environ.setdefault(TEN, "10")
        sys.exit(pytest.main(["-q", "-s", __file__, *sys.argv[1:]]))
