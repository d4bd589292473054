"""Where a TopK training step's time goes, and how far each part is from what this machine can do.

    make bench NAME=floor JSON=out.json
    python benchmarks/floor.py --d 768 --width 16384

First the machine's rates are measured, on all threads: the int8 product (ours, and torch's in several shapes;
the fastest counts), reading rows of a matrix in random order, and passing over memory. Then real steps run
with a clock around each compiled loop. A part's floor is the work that it cannot avoid at those rates: for
the product its multiplications, for the others the bytes that they fetch from outside a core's own cache.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from workers import unbraid

from training import machine, synthetic, versions
from unbraid.sae.kernels import cpu, loops

SHAPES = ((256, None), (512, None), (512, 1024), (1024, 512))
"""Rows and latents of the products that are tried; None is the whole width."""


def seconds(work: Callable[[int], Any], threads: int, repeat: int = 9) -> float:
    """The shortest time in which work(0) … work(threads − 1) run side by side."""
    with ThreadPoolExecutor(threads) as pool:
        found: list[float] = []
        for _ in range(repeat + 1):
            started = time.perf_counter()
            list(pool.map(work, range(threads)))
            found.append(time.perf_counter() - started)
    return min(found[1:])


def rates(d: int, width: int, threads: int) -> dict[str, float]:
    """Operations a second of the int8 product, bytes a second of random rows and of a pass over memory."""
    best = 0.0
    shadow = torch.randint(-127, 127, (width, d), dtype=torch.int8)
    for m, n in SHAPES:
        x = torch.randint(-127, 127, (m, d), dtype=torch.int8)
        blocks = shadow.split(n or width)
        outs = [[torch.empty(m, len(b), dtype=torch.int32) for b in blocks] for _ in range(threads)]

        def product(i: int, x: torch.Tensor = x, blocks: Any = blocks, outs: Any = outs) -> None:
            for block, out in zip(blocks, outs[i], strict=True):
                torch._int_mm(x, block.T, out=out)

        best = max(best, 2 * m * d * width * threads / seconds(product, threads))
    screen = cpu.Screen(np.ones((width, d), np.float32), np.zeros(width, np.float32))
    some = torch.ones(cpu.CHUNK_ROWS, d)
    if screen.kind == "int8":
        ours = seconds(lambda _: screen.scores(some, screen.b_enc), threads)
        best = max(best, 2 * cpu.CHUNK_ROWS * d * width * threads / ours)
    rng = np.random.default_rng(0)
    table = rng.standard_normal((width, d), np.float32)
    latents, weights = rng.integers(0, width, (1024, 32)), np.ones((1024, 32), np.float32)
    out = np.empty((threads, 1024, d), np.float32)
    rows = seconds(lambda i: loops.weighted_rows(latents, weights, table, out[i]), threads)
    long = np.ones((threads, 16_000_000), np.float32)
    passed = seconds(lambda i: np.multiply(long[i], 1.0, out=long[i]), threads)
    return {
        "product": best,
        "rows": threads * latents.size * d * 4 / rows,
        "pass": 2 * long.nbytes / passed,
    }


class Clock:
    """Time spent in functions, summed over threads, and how many candidates they saw."""

    def __init__(self) -> None:
        self.spent: defaultdict[str, float] = defaultdict(float)
        self.candidates, self.lock = 0, threading.Lock()

    def around(self, module: Any, name: str) -> None:
        """Time every call of module.name."""
        inner = getattr(module, name)

        def timed(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            found = inner(*args, **options)
            with self.lock:
                self.spent[name] += time.perf_counter() - started
                self.candidates += len(args[4]) if name == "pre_activations" else 0
            return found

        setattr(module, name, timed)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in (
        ("d", 512),
        ("width", 8192),
        ("batch", 4096),
        ("k", 32),
        ("steps", 24),
        ("threads", 2),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path, help="file for the result as JSON")
    given = parser.parse_args()
    d, width, n, threads = given.d, given.width, given.batch, given.threads
    torch.set_num_threads(1)
    rate = rates(d, width, threads)
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        x = synthetic(6 * n, d, 2 * width, 0)
        x[:n].tofile(Path(folder) / "x.bin")
        step, _ = unbraid(
            {"arch": "topk", "d": d, "width": width, "k": given.k, "batch": n, "seed": 0, "lr": 1e-3,
             "folder": folder, "sparsity": 1.0, "bandwidth": 0.3, "level": 0.0}
        )  # fmt: skip
    batches = torch.from_numpy(x).split(n)
    for i in range(given.steps // 2):  # compiled, and away from the start
        step(batches[i % 6])
    clock = Clock()
    for name in (
        "rough_scores",
        "candidates",
        "pre_activations",
        "best_entries",
        "decode_and_compare",
        "update",
    ):
        clock.around(loops, name)
    clock.around(cpu.Lists, "of")
    whole: list[float] = []
    for i in range(given.steps):
        batch = batches[i % 6].clone()
        started = time.perf_counter()
        step(batch)
        whole.append(time.perf_counter() - started)
    entries, row, matrix = n * given.k, 4 * d, 4 * d * width
    floors = {
        "rough_scores": 2 * n * d * width / rate["product"],
        "pre_activations": clock.candidates / given.steps * row / rate["rows"],
        "decode_and_compare": entries * row / rate["rows"] + 2 * n * row / rate["pass"],
        "update": 2 * entries * row / rate["rows"] + 12 * matrix / rate["pass"],
    }
    spent = {name: clock.spent[name] / given.steps / threads for name in clock.spent}
    spent["of"] *= threads  # lists are made on one thread, while the others wait
    spent["rest"] = median(whole) - sum(spent.values())
    labels = {
        "rough_scores": "int8 product", "candidates": "candidates",
        "pre_activations": "exact pre-activations", "best_entries": "choice of k",
        "decode_and_compare": "decode, error, value gradients",
        "of": "lists by latent", "update": "gradients, Adam, int8 copy", "rest": "all else",
    }  # fmt: skip
    print(
        f"d {d}, width {width}, {threads} threads: product {rate['product'] / 1e9:,.0f} GOP/s, random rows "
        f"{rate['rows'] / 1e9:.0f} GB/s, a pass {rate['pass'] / 1e9:.0f} GB/s; "
        f"{clock.candidates / given.steps / n:.1f} candidates a row"
    )
    print(f"{'':32}{'ms':>8}{'floor':>8}")
    rows: list[dict[str, Any]] = []
    for name, label in labels.items():
        floor = floors.get(name)
        print(f"{label:32}{1000 * spent[name]:8.1f}" + (f"{1000 * floor:8.1f}" if floor else ""))
        rows.append({"name": f"step_{name}", "value": 1000 * spent[name], "unit": "ms"})
        if floor:
            rows.append({"name": f"floor_{name}", "value": 1000 * floor, "unit": "ms"})
    total = sum(floors.values())
    print(f"{'step':32}{1000 * median(whole):8.1f}{1000 * total:8.1f}")
    if given.out:
        result = {
            "work": {k: v for k, v in vars(given).items() if k != "out"}, "machine": machine(),
            "versions": {"unbraid": versions(sys.executable)},
            "rows": [*rows, *({"name": f"rate_{k}", "value": v, "unit": "1/s"} for k, v in rate.items())],
            "ratios": {"step_over_floor": median(whole) / total},
        }  # fmt: skip
        given.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
