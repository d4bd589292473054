"""Where a training step's time goes, and how far each part is from what this machine can do.

    make bench NAME=floor JSON=out.json
    python benchmarks/floor.py --work topk_768 jumprelu     # a part of it

The work is that of `training.py`. First the machine's rates are measured, on all threads: the int8 product
(of one tile again and again, out of the nearest cache; torch's float32 product where there is none), reading
rows of a matrix in random order, and passing over memory. Then real steps run with a clock around each
compiled loop; the parts of the choice of entries, which is one call, are clocked by making the calls of the
last step again piece by piece. A part's floor is the work that it cannot avoid at those rates: for the
product its multiplications, for the others the bytes that they fetch from outside a core's own cache.
"""

from __future__ import annotations

import argparse
import inspect
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
from workers import nested, unbraid

from training import WORK, level, machine, synthetic, versions
from unbraid.sae.kernels import cpu, loops

ENTRIES = "entries_by_int8"
LABELS = {
    "quantise_rows": "int8 copy of x", "rough_scores": "int8 product", "candidates": "candidates",
    "pre_activations": "exact pre-activations", "between": "less, as they are one call",
    "best_entries": "choice of k", "decode_and_compare": "decode, error, value gradients",
    "of": "lists by latent", "update": "gradients, Adam, int8 copy", "rest": "all else",
}  # fmt: skip


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
    """Operations a second of the product, bytes a second of random rows and of a pass over memory."""
    again = size = loops.TILE_ROWS * loops.GROUP  # as many tiles as numbers in one, which `best` lies in
    tile, weights = (
        np.broadcast_to(np.ones((1, d // loops.WORD, n), np.int32), (again, d // loops.WORD, n))
        for n in (loops.TILE_ROWS, loops.GROUP)
    )
    flat, shift = np.zeros(again * loops.GROUP, np.float32), np.zeros(again * loops.GROUP, np.int32)
    outs = [np.empty(size, np.float32) for _ in range(threads)]

    def tiles(i: int) -> None:
        shape = (again, again * loops.TILE_ROWS, loops.GROUP)
        scores = np.lib.stride_tricks.as_strided(outs[i], shape, (0, 0, 4))  # all in one place
        best = np.lib.stride_tricks.as_strided(outs[i], shape[1::-1], (0, 4))
        loops.rough_scores(tile, flat, weights, shift, flat, flat, scores, best)

    def dense(_: int) -> None:
        torch.mm(torch.ones(cpu.CHUNK_ROWS, d), torch.ones(d, width))

    if cpu.precision() == "int8":
        product = 2 * again**2 * size * d * threads / seconds(tiles, threads)
    else:
        product = 2 * cpu.CHUNK_ROWS * d * width * threads / seconds(dense, threads)
    rng = np.random.default_rng(0)
    table = rng.standard_normal((width, d), np.float32)
    latents, weights = rng.integers(0, width, (1024, 32)), np.ones((1024, 32), np.float32)
    out = np.empty((threads, 1024, d), np.float32)
    rows = seconds(lambda i: loops.weighted_rows(latents, weights, table, out[i]), threads)
    long = np.ones((threads, 16_000_000), np.float32)
    passed = seconds(lambda i: np.multiply(long[i], 1.0, out=long[i]), threads)
    return {
        "product": product,
        "rows": threads * latents.size * d * 4 / rows,
        "pass": 2 * long.nbytes / passed,
    }


class Clock:
    """Time spent in functions, summed over threads, the calls for entries, and how many took part."""

    def __init__(self) -> None:
        self.spent: defaultdict[str, float] = defaultdict(float)
        self.calls: list[dict[str, Any]] = []
        self.entries = 0
        self.lock = threading.Lock()

    def around(self, module: Any, name: str) -> None:
        """Time every call of module.name."""
        inner = getattr(module, name)

        def timed(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            found = inner(*args, **options)
            with self.lock:
                self.spent[name] += time.perf_counter() - started
                if name == ENTRIES:
                    names = inspect.signature(inner.py_func).parameters
                    self.calls.append(dict(zip(names, args, strict=True)))
                elif name == "of":
                    self.entries = args[0][-1]
            return found

        setattr(module, name, timed)


def in_pieces(calls: list[dict[str, Any]], threads: int) -> tuple[dict[str, float], int]:
    """Seconds a thread that each part of these calls takes when they are made again, and the candidates."""
    spent: defaultdict[str, float] = defaultdict(float)
    lock = threading.Lock()

    def timed(name: str, *args: Any) -> Any:
        started = time.perf_counter()
        result = getattr(loops, name)(*args)
        with lock:
            spent[name] += time.perf_counter() - started
        return result

    def again(mine: list[dict[str, Any]]) -> int:
        many = 0
        for c in mine:
            x, starts, rows = c["x"], c["starts"], c["scores"].shape[1]
            unit, length = np.ones(rows, np.float32), np.empty(rows, np.float32)
            for begin in range(0, len(x), rows):
                part, here = x[begin : begin + rows], starts[begin : begin + rows + 1]
                timed("quantise_rows", part, c["tiles"], unit, length)
                timed(
                    "rough_scores", c["tiles"][: -(-len(part) // loops.TILE_ROWS)], 1 / unit, c["shadow"],
                    c["shift"], c["unit"], c["bias"], c["scores"], c["best"],
                )  # fmt: skip
                scale = c["sigmas"] / np.sqrt(12)
                ratio = (length / unit)[: len(part)].max()
                loops.uncertainty(c["length"], c["unit"], ratio, scale, c["size"], c["off"])
                least = c["least"][begin : begin + rows] / unit[: len(part)]
                timed(
                    "candidates", c["scores"], c["best"], c["off"], c["size"], c["wanted"], least, here,
                    c["latents"],
                )  # fmt: skip
                timed("pre_activations", part, c["W"], c["b_enc"], here, c["latents"], c["values"])
            many += int(starts[-1])
        return many

    by_thread: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
    for call in calls:
        by_thread[id(call["tiles"])].append(call)  # what a thread writes into is its own
    with ThreadPoolExecutor(threads) as pool:
        found = sum(pool.map(again, by_thread.values()))
    return {name: value / threads for name, value in spent.items()}, found


def step_of(settings: dict[str, Any], given: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """Milliseconds that each part of a step takes, and its floor; the rates, and what was counted."""
    d, width, n, threads = settings["d"], settings["width"], given.batch, given.threads
    torch.set_num_threads(1)
    rate = rates(d, width, threads)
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        x = synthetic(6 * n, d, 2 * width, 0)
        x[:n].tofile(Path(folder) / "x.bin")
        settings = settings | {"folder": folder, "level": level(settings, torch.from_numpy(x[:1024]))}
        step, _ = unbraid(settings)
    batches = torch.from_numpy(x).split(n)
    for i in range(given.steps // 2):  # compiled, and away from the start
        step(batches[i % 6])
    clock.spent.clear()
    whole: list[float] = []
    for i in range(given.steps):
        batch = batches[i % 6].clone()
        clock.calls = []
        started = time.perf_counter()
        step(batch)
        whole.append(time.perf_counter() - started)
    spent = {name: clock.spent[name] / given.steps / threads for name in clock.spent}
    candidates = 0
    if clock.calls:  # without int8 the choice of entries is part of all else
        in_pieces(clock.calls, threads)  # compiled
        pieces, candidates = in_pieces(clock.calls, threads)
        spent |= pieces | {"between": spent.pop(ENTRIES) - sum(pieces.values())}
    spent["rest"] = median(whole) - sum(spent.values())
    row, matrix = 4 * d, 4 * d * width
    errors = 1 + len(nested(settings)) if settings["arch"] == "matryoshka" else 1
    floors = {
        "rough_scores": 2 * n * d * width / rate["product"],
        "pre_activations": candidates * row / rate["rows"],
        "decode_and_compare": clock.entries * row / rate["rows"] + (1 + errors) * n * row / rate["pass"],
        "update": 2 * clock.entries * row / rate["rows"] + 12 * matrix / rate["pass"],
    }
    return {
        "ms": {name: 1000 * spent[name] for name in LABELS if name in spent} | {"step": 1000 * median(whole)},
        "floor": {name: 1000 * f for name, f in floors.items()} | {"step": 1000 * sum(floors.values())},
        "rate": rate, "candidates": candidates / n, "entries": clock.entries / n,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", nargs="+", choices=tuple(WORK), default=tuple(WORK))
    for name, value in (("batch", 4096), ("k", 32), ("steps", 24), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path, help="file for the result as JSON")
    given = parser.parse_args()
    clock = Clock()
    for name in (ENTRIES, "best_entries", "decode_and_compare", "update"):
        clock.around(loops, name)
    clock.around(cpu.Lists, "of")
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    for work in given.work:
        arch, d, width = WORK[work]
        settings = {
            "arch": arch, "d": d, "width": width, "k": given.k, "batch": given.batch, "seed": 0, "lr": 1e-3,
            "sparsity": 1.0, "bandwidth": 0.3,
        }  # fmt: skip
        found = step_of(settings, given, clock)
        rate = found["rate"]
        print(
            f"{work}: d {d}, width {width}, {given.threads} threads; product {rate['product'] / 1e9:,.0f} "
            f"GOP/s, random rows {rate['rows'] / 1e9:.0f} GB/s, a pass {rate['pass'] / 1e9:.0f} GB/s; "
            f"{found['candidates']:.1f} candidates a row, {found['entries']:.1f} entries\n"
            f"{'':32}{'ms':>8}{'floor':>8}"
        )
        for name, ms in found["ms"].items():
            floor = found["floor"].get(name)
            print(f"{LABELS.get(name, name):32}{ms:8.1f}" + (f"{floor:8.1f}" if floor else ""))
            rows.append({"name": f"{work}_{name}", "value": ms, "unit": "ms"})
        rows += [{"name": f"{work}_floor_{k}", "value": v, "unit": "ms"} for k, v in found["floor"].items()]
        rows += [{"name": f"{work}_rate_{k}", "value": v, "unit": "1/s"} for k, v in rate.items()]
        ratios[f"{work}_step_over_floor"] = found["ms"]["step"] / found["floor"]["step"]
        print(flush=True)
    if given.out:
        result = {
            "work": {k: v for k, v in vars(given).items() if k != "out"}, "machine": machine(),
            "versions": {"unbraid": versions(sys.executable)}, "rows": rows, "ratios": ratios,
        }  # fmt: skip
        given.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
