"""Training steps side by side: ours and other tools', in alternating runs, with quality at equal tokens.

    make bench NAME=training JSON=out.json
    python benchmarks/training.py --work topk jumprelu --rounds 5     # a part of it

Each tool lives in a process of its own, with its own interpreter, and begins as it does by itself; all read
the same synthetic activations in the same order and take turns, `--steps` steps at a time, so that whatever
else the machine does meets all of them alike. Only ratios inside one run mean something. Afterwards every
autoencoder is measured here, by the same code, on activations that none was trained on: fraction of variance
unexplained, L0, and the share of latents that never fired there. The first round of each tool is not counted.
Our loops are compiled beforehand, in a process of its own: once for a machine, and it takes memory.

ReLU and JumpReLU begin with unit rows where k latents fire, in every tool, since they would need thousands of
steps to get there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
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
from workers import unit_rows

WORK = {
    "topk": ("topk", 512, 8192),
    "topk_768": ("topk", 768, 16384),
    "batchtopk": ("batchtopk", 512, 8192),
    "matryoshka": ("matryoshka", 512, 8192),
    "jumprelu": ("jumprelu", 512, 8192),
    "relu": ("relu", 512, 8192),
}
"""Architecture, d_in and width of each piece of work."""
PEERS = Path(sys.prefix) / "peers"
"""Environments of the tools whose pins clash with ours."""
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
    """The pre-activation that k latents of an activation exceed where ReLU and JumpReLU begin."""
    pre = x @ unit_rows(settings).T
    return float(pre.topk(settings["k"], dim=1).values[:, -1].mean())


@dataclass
class Worker:
    """A tool's process."""

    name: str
    process: subprocess.Popen[str]
    step_ms: list[float]

    @classmethod
    def start(cls, name: str, python: str, folder: Path) -> Worker:
        """A process for the tool, to write its weights to folder/name."""
        (folder / name).mkdir(exist_ok=True)
        command = [python, str(Path(__file__).with_name("workers.py")), name, str(folder)]
        pipe = subprocess.PIPE
        return cls(name, subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True), [])

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


def interpreters(given: list[str]) -> dict[str, str]:
    """Tools and the Python that has them: those given, or those that `make bench` installs."""
    if given:
        return {"unbraid": sys.executable} | dict(peer.split("=", 1) for peer in given)
    found = {"unbraid": sys.executable}
    if importlib.util.find_spec("sae_lens"):
        found["saelens"] = sys.executable
    for name in ("dictionary_learning", "sparsify"):
        python = PEERS / name / "bin" / "python"
        if python.exists():
            found[name] = str(python)
    return found


def ratio(theirs: list[float], ours: list[float], rng: np.random.Generator) -> tuple[float, float, float]:
    """How many times as fast as theirs ours is, by the medians of step times, and a 95 % bootstrap interval
    over rounds (each list holds one median a round)."""
    a, b = np.array(theirs), np.array(ours)
    drawn = rng.integers(0, len(a), (2000, len(a)))
    low, high = np.quantile(np.median(a[drawn], axis=1) / np.median(b[drawn], axis=1), [0.025, 0.975])
    return float(np.median(a) / np.median(b)), float(low), float(high)


def compare(settings: dict[str, Any], tools: dict[str, str], rounds: int, steps: int) -> dict[str, Any]:
    """Train with every tool by turns; each one's step times (a median a round), memory and quality."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        n = settings["batch"] * min(rounds * steps, 100)
        x = synthetic(n + HELD_OUT, settings["d"], 2 * settings["width"], settings["seed"])
        x[:n].tofile(folder / "x.bin")
        settings = settings | {"level": level(settings, torch.from_numpy(x[:1024]))}
        (folder / "settings.json").write_text(json.dumps(settings))
        held_out = torch.from_numpy(x[n:].copy())
        del x
        compiling = Worker.start("unbraid", tools["unbraid"], folder)
        compiling.ask(steps=steps)
        compiling.ask(finish=True)
        compiling.process.wait()
        workers = [Worker.start(tool, python, folder) for tool, python in tools.items()]
        for turn in range(rounds):
            for worker in workers:
                answer = worker.ask(steps=steps)
                if turn:
                    worker.step_ms.append(median(answer["ms"]))
            done = ", ".join(f"{w.name} {median(w.step_ms):.0f} ms" for w in workers if w.step_ms)
            print(f"  round {turn + 1} of {rounds}: {done}", file=sys.stderr, flush=True)
        found: dict[str, Any] = {}
        for worker in workers:
            peak = worker.ask(finish=True)["peak_mb"]
            worker.process.wait()
            quality = measure(folder / worker.name, held_out, settings["k"], settings["arch"])
            found[worker.name] = {"step_ms": worker.step_ms, "peak_mb": peak, **quality}
        return found


def table(found: dict[str, Any], batch: int) -> str:
    """What was found, a line a tool."""
    ours = median(found["unbraid"]["step_ms"])
    lines = [f"{'':22}{'ms a step':>10}{'(min)':>8}{'tokens/s':>10}{'ours is':>9}{'peak MB':>9}"
             f"{'FVU':>8}{'L0':>7}{'dead':>8}"]  # fmt: skip
    for tool, row in found.items():
        ms = median(row["step_ms"])
        lines.append(
            f"{tool:22}{ms:10.0f}{min(row['step_ms']):8.0f}{1000 * batch / ms:10,.0f}{ms / ours:8.1f}×"
            f"{row['peak_mb']:9.0f}{row['fvu']:8.4f}{row['l0']:7.1f}{row['dead']:8.2%}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", nargs="+", choices=tuple(WORK), default=tuple(WORK))
    for name, value in (
        ("batch", 4096),
        ("k", 32),
        ("rounds", 12),
        ("steps", 4),
        ("seed", 0),
        ("threads", 2),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--d", type=int, help="in place of each work's own")
    parser.add_argument("--width", type=int, help="in place of each work's own")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--sparsity", type=float, default=1.0, help="weight of ReLU's L1, JumpReLU's L0")
    parser.add_argument("--bandwidth", type=float, default=0.3, help="of JumpReLU's window")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--plain", action="store_true", help="also our own step without compiled loops")
    parser.add_argument("--out", type=Path, help="file for the result as JSON")
    given = parser.parse_args()
    everyone, rng = interpreters(given.peer), np.random.default_rng(0)
    names = ("batch", "k", "lr", "seed", "threads", "sparsity", "bandwidth")
    shared = {name: getattr(given, name) for name in names}
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    for work in given.work:
        arch, d, width = WORK[work]
        settings = shared | {"arch": arch, "d": given.d or d, "width": given.width or width}
        tools = {t: p for t, p in everyone.items() if arch == "topk" or t in ("unbraid", "saelens")}
        if given.plain:
            tools["unbraid-plain"] = sys.executable
        print(f"{work}: d={settings['d']}, width={settings['width']}, {', '.join(tools)}", file=sys.stderr)
        found = compare(settings, tools, given.rounds, given.steps)
        print(
            f"\n{work}, d={settings['d']}, width={settings['width']}\n{table(found, given.batch)}", flush=True
        )
        ours = found["unbraid"]
        for tool, row in found.items():
            for key, unit in (("peak_mb", "MB"), ("fvu", ""), ("l0", "latents"), ("dead", "share")):
                rows.append({"name": f"{work}_{tool}_{key}", "value": row[key], "unit": unit})
            ms = median(row["step_ms"])
            rows.append({"name": f"{work}_{tool}", "value": 1000 * given.batch / ms, "unit": "tokens/s"})
            if tool == "unbraid":
                continue
            value, low, high = ratio(row["step_ms"], ours["step_ms"], rng)
            ratios[f"train_{work}_vs_{tool}"] = value
            rows.append(
                {"name": f"train_{work}_vs_{tool}", "value": value, "unit": "ratio", "low": low, "high": high}
            )
            ratios[f"train_{work}_peak_memory_vs_{tool}"] = ours["peak_mb"] / row["peak_mb"]
    if "topk" in given.work and "saelens" in everyone:
        ratios["train_peak_memory_vs_saelens"] = ratios["train_topk_peak_memory_vs_saelens"]
    if given.out:
        result = {
            "work": {"names": list(given.work), "rounds": given.rounds, "steps": given.steps, **shared},
            "machine": machine(), "versions": {tool: versions(p) for tool, p in everyone.items()},
            "rows": rows, "ratios": ratios,
        }  # fmt: skip
        given.out.write_text(json.dumps(result, indent=2) + "\n")


def machine() -> dict[str, Any]:
    """What the run was on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return {"processor": model or platform.processor(), "cores": os.cpu_count(), "system": platform.system()}


def versions(python: str) -> dict[str, str]:
    """Versions of the packages that matter in an interpreter's environment."""
    script = (
        "import importlib.metadata as m, json\n"
        "names = ('torch', 'numba', 'sae-lens', 'dictionary-learning', 'eai-sparsify', 'unbraid')\n"
        "found = {d.metadata['Name'].lower(): d.version for d in m.distributions() if d.metadata['Name']}\n"
        "print(json.dumps({n: found[n] for n in names if n in found}))"
    )
    return json.loads(
        subprocess.run([python, "-c", script], capture_output=True, text=True, check=True).stdout
    )


if __name__ == "__main__":
    main()
