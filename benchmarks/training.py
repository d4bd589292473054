"""Training steps side by side: ours and other tools', in one alternating run, with quality at equal tokens.

    python benchmarks/training.py --d 512 --width 8192 --k 32 --batch 4096 --rounds 12 --steps 3 \
        --peer saelens=A/bin/python --peer dictionary_learning=B/bin/python --peer sparsify=C/bin/python

Each tool lives in a process of its own, with its own interpreter; all read the same synthetic activations in
the same order and take turns, `--steps` steps at a time, so that whatever else the machine does meets all of
them alike. Only ratios inside one run mean something. Afterwards every autoencoder is measured here, by the
same code, on activations that none was trained on: fraction of variance unexplained, L0, and the share of
latents that never fired there. The first round of each tool is not counted.

`--arch` takes the other architectures that SAELens has as well; ReLU and JumpReLU begin where k latents fire.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from workers import initial

HELD_OUT = 8192
ACTIVE = 20
"""True features in an activation, on average."""


def synthetic(n: int, d: int, features: int, seed: int) -> np.ndarray:
    """Activations (n, d): sums of a few of `features` unit directions, with frequencies by Zipf's law."""
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((features, d), np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    share = 1 / np.arange(1, features + 1)
    edges = np.cumsum(share / share.sum())
    x = np.empty((n, d), np.float32)
    for start in range(0, n, 4096):
        rows = min(4096, n - start)
        chosen = np.searchsorted(edges, rng.random((rows, ACTIVE))).clip(max=features - 1)
        strength = rng.exponential(1.0, (rows, ACTIVE)).astype(np.float32)
        x[start : start + rows] = np.einsum("nk,nkd->nd", strength, directions[chosen])
    x -= x.mean(axis=0)
    return x / np.float32(np.sqrt((x**2).mean()))


def level(settings: dict[str, Any], x: torch.Tensor) -> float:
    """The pre-activation that k latents of an activation exceed with the weights that all start from: where
    ReLU and JumpReLU begin, since they would need thousands of steps to get there from everything active.
    """
    pre = x @ initial(settings).T
    return float(pre.topk(settings["k"], dim=1).values[:, -1].mean())


@dataclass
class Worker:
    """A tool's process."""

    name: str
    process: subprocess.Popen[str]
    step_ms: list[float]
    peak_mb: float = 0.0

    def ask(self, **words: Any) -> dict[str, Any]:
        """Send one request, wait for its answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} stopped with code {self.process.wait()}")
        return json.loads(line)


def measure(folder: Path, x: torch.Tensor, k: int, arch: str) -> dict[str, float]:
    """FVU, L0 and dead share of the weights a worker wrote, on held-out activations x (n, d).

    Codes are what the architecture trains with: the k largest of each row, those of a batch of 1024 rows, or
    all above the thresholds.
    """
    w = load_file(folder / "weights.safetensors")
    error, fired, active = 0.0, torch.zeros(len(w["W_dec"]), dtype=torch.bool), 0.0
    for rows in x.split(1024):
        pre = ((rows - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
        if arch == "topk":
            top = pre.topk(k, dim=1)
            codes = torch.zeros_like(pre).scatter(1, top.indices, top.values)
        elif arch in ("batchtopk", "matryoshka"):
            codes = pre * (pre >= pre.flatten().topk(len(rows) * k).values[-1])
        else:
            codes = pre * (pre > w.get("threshold", torch.zeros(())))
        error += float((rows - codes @ w["W_dec"] - w["b_dec"]).square().sum())
        fired |= (codes > 0).any(dim=0)
        active += float((codes > 0).sum())
    spread = float((x - x.mean(dim=0)).square().sum())
    return {"fvu": error / spread, "l0": active / len(x), "dead": 1 - float(fired.float().mean())}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in (
        ("d", 512),
        ("width", 8192),
        ("k", 32),
        ("batch", 4096),
        ("rounds", 12),
        ("steps", 3),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument(
        "--arch", default="topk", choices=("topk", "batchtopk", "matryoshka", "relu", "jumprelu")
    )
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--sparsity", type=float, default=1.0, help="weight of ReLU's L1, JumpReLU's L0")
    parser.add_argument("--bandwidth", type=float, default=0.3, help="of JumpReLU's window")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--plain", action="store_true", help="also our own step without compiled loops")
    parser.add_argument("--out", type=Path, help="file for the result as JSON")
    given = parser.parse_args()
    names = ("arch", "d", "width", "k", "batch", "lr", "seed", "threads", "sparsity", "bandwidth")
    settings = {name: getattr(given, name) for name in names}
    interpreters = {"unbraid": sys.executable}
    if given.plain:
        interpreters["unbraid-plain"] = sys.executable
    interpreters |= dict(peer.split("=", 1) for peer in given.peer)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        n = given.batch * min(given.rounds * given.steps, 100)
        x = synthetic(n + HELD_OUT, given.d, 2 * given.width, given.seed)
        np.save(folder / "x.npy", x[:n])
        settings["level"] = level(settings, torch.from_numpy(x[:1024]))
        (folder / "settings.json").write_text(json.dumps(settings))
        workers = []
        for tool, python in interpreters.items():
            (folder / tool).mkdir()
            command = [python, str(Path(__file__).with_name("workers.py")), tool, str(folder)]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            workers.append(Worker(tool, process, []))
        for turn in range(given.rounds):
            for worker in workers:
                answer = worker.ask(steps=given.steps)
                if turn:
                    worker.step_ms += answer["ms"]
            done = ", ".join(f"{w.name} {median(w.step_ms):.0f} ms" for w in workers if w.step_ms)
            print(f"round {turn + 1} of {given.rounds}: {done}", file=sys.stderr, flush=True)
        held_out = torch.from_numpy(x[n:])
        result: dict[str, Any] = {"settings": settings, "machine": platform.processor(), "tools": {}}
        for worker in workers:
            worker.peak_mb = worker.ask(finish=True)["peak_mb"]
            worker.process.wait()
            quality = measure(folder / worker.name, held_out, given.k, given.arch)
            ms = median(worker.step_ms)
            result["tools"][worker.name] = {
                "ms_median": ms, "ms_min": min(worker.step_ms), "tokens_per_s": 1000 * given.batch / ms,
                "peak_mb": worker.peak_mb, **quality,
            }  # fmt: skip
    ours = result["tools"]["unbraid"]
    print(f"{'':22}{'ms a step':>10}{'(min)':>8}{'tokens/s':>10}{'ours is':>9}{'peak MB':>9}"
          f"{'FVU':>8}{'L0':>7}{'dead':>8}")  # fmt: skip
    for tool, row in result["tools"].items():
        print(
            f"{tool:22}{row['ms_median']:10.0f}{row['ms_min']:8.0f}{row['tokens_per_s']:10,.0f}"
            f"{row['ms_median'] / ours['ms_median']:8.1f}×{row['peak_mb']:9.0f}"
            f"{row['fvu']:8.4f}{row['l0']:7.1f}{row['dead']:8.2%}"
        )
    if given.out:
        given.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
