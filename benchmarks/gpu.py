"""The GPU's training step: is it right, how fast is it, and how near to what the machine can do?

    python benchmarks/gpu.py                       # on a machine with a GPU and Triton
    python benchmarks/gpu.py --d 2304 --width 65536 --out out.json

First the step is held to the plain one on a small autoencoder, in bfloat16 as it is used. Then both, and
sparsify's own step where it is installed, take turns on the same random activations. The roofline is what the
encoder's product alone would take at the rate that torch multiplies bfloat16 matrices of that shape here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from statistics import median

import torch

from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.objective import StepContext
from unbraid.sae.registry import build
from unbraid.training.adam import Adam
from unbraid.training.gpu import GPUTopKStep
from unbraid.training.step import PlainStep

DEVICE = torch.device("cuda")
Step = Callable[[torch.Tensor], None]


def made(d: int, width: int, k: int) -> SAE:
    """A TopK autoencoder with random unit decoder rows, the encoder their transpose."""
    sae = build(SAEConfig("topk", d, width, k)).to(DEVICE)
    with torch.no_grad():
        sae.W_dec.normal_(generator=torch.Generator(DEVICE).manual_seed(0))
        sae.constrain()
        sae.W_enc.copy_(sae.W_dec.T)
    return sae


def activations(n: int, d: int, seed: int) -> torch.Tensor:
    """Rows (n, d) whose dimensions differ in size, as those of real models do."""
    x = torch.randn(n, d, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE)
    return x * torch.linspace(0.3, 1.7, d, device=DEVICE)


def check() -> float:
    """The largest difference in any weight after a few steps of both; stops where it is too large."""
    plain = made(512, 8192, 32)
    fast = deepcopy(plain)
    one, two = Adam(plain), Adam(fast)
    slow, step = PlainStep(plain, one), GPUTopKStep(fast, two)
    dead = torch.zeros(8192, dtype=torch.bool, device=DEVICE)
    for number in range(1, 6):
        x = activations(1024, 512, number)
        dead[: 100 * (number - 1)] = True
        context = StepContext(dead, auxk_alpha=1 / 32)
        a = slow.step(x, x, context, number, 1e-3)
        b = step.step(x, x, context, number, 1e-3)
        torch.testing.assert_close(b.squared_error.double(), a.squared_error.double(), rtol=1e-4, atol=0)
    again = deepcopy(plain)
    third = GPUTopKStep(again, Adam(again))
    first = GPUTopKStep(other := deepcopy(plain), Adam(other))
    for number in range(1, 4):
        x, context = activations(1024, 512, number), StepContext(dead)
        third.step(x, x, context, number, 1e-3)
        first.step(x, x, context, number, 1e-3)
    assert torch.equal(other.W_dec, again.W_dec), "equal input must give equal bits"
    return max(float((p - q).abs().max()) for p, q in zip(plain.parameters(), fast.parameters(), strict=True))


def ours(d: int, width: int, k: int, plain: bool) -> Step:
    """Our step, in kernels or in PyTorch's operations."""
    sae = made(d, width, k)
    adam = Adam(sae)
    move = PlainStep(sae, adam) if plain else GPUTopKStep(sae, adam)
    context = StepContext(torch.zeros(width, dtype=torch.bool, device=DEVICE))
    count = 0

    def step(x: torch.Tensor) -> None:
        nonlocal count
        count += 1
        move.step(x, x, context, count, 1e-3)

    return step


def sparsify(d: int, width: int, k: int) -> Step:
    """sparsify's autoencoder with its Triton decoder, in bfloat16 autocast, and the body of its loop."""
    from sparsify import SparseCoder, SparseCoderConfig

    sae = SparseCoder(d, SparseCoderConfig(num_latents=width, k=k), device=DEVICE)
    adam = torch.optim.Adam(sae.parameters(), lr=1e-3)

    def step(x: torch.Tensor) -> None:
        sae.set_decoder_norm_to_unit_norm()
        with torch.autocast("cuda", torch.bfloat16):
            loss = sae(x).fvu
        loss.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()

    return step


def timed(run: Callable[[], object]) -> float:
    """Milliseconds on the GPU's own clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def product_ms(d: int, width: int, batch: int) -> float:
    """How long the encoder's product takes by itself in bfloat16, in the best chunks of rows."""
    x = torch.randn(batch, d, device=DEVICE, dtype=torch.bfloat16)
    W = torch.randn(width, d, device=DEVICE, dtype=torch.bfloat16)
    found: list[float] = []
    for rows in (1024, 2048, 8192):
        out = torch.empty(min(rows, batch), width, device=DEVICE, dtype=torch.bfloat16)

        def run(rows: int = rows, out: torch.Tensor = out) -> None:
            for part in x.split(rows):
                torch.mm(part, W.T, out=out[: len(part)])

        run()
        found.append(median(timed(run) for _ in range(5)))
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in (("d", 4096), ("width", 131_072), ("k", 64), ("batch", 8192), ("rounds", 20)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path, help="file for the result as JSON")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs a GPU; the tests run its kernels in Triton's interpreter")
    print(f"right: weights differ from the plain step's by at most {check():.1e}")
    size = (given.d, given.width, given.k)
    tools: dict[str, Step] = {"unbraid": ours(*size, plain=False), "plain PyTorch": ours(*size, plain=True)}
    try:
        tools["sparsify"] = sparsify(*size)
    except ImportError as error:
        print(f"without sparsify ({error})")
    times: dict[str, list[float]] = {name: [] for name in tools}
    for turn in range(given.rounds):
        x = activations(given.batch, given.d, turn)
        for name, step in tools.items():
            ms = timed(lambda step=step, x=x: step(x))
            if turn >= 3:
                times[name].append(ms)
    floor = product_ms(given.d, given.width, given.batch)
    best = median(times["unbraid"])
    for name, found in times.items():
        ms = median(found)
        print(f"{name:15}{ms:9.2f} ms a step {1000 * given.batch / ms:12,.0f} tokens/s{ms / best:8.2f}× ours")
    print(f"encoder product alone {floor:.2f} ms: {floor / best:.0%} of our step")
    if given.out:
        work = {k: v for k, v in vars(given).items() if k != "out"}
        result = {
            "work": work, "machine": torch.cuda.get_device_name(), "versions": {"torch": torch.__version__},
            "rows": [
                {"name": n, "value": 1000 * given.batch / median(t), "unit": "tokens/s"}
                for n, t in times.items()
            ],
            "ratios": {f"train_gpu_vs_{n}".replace(" ", "_"): median(t) / best for n, t in times.items()}
            | {"train_gpu_share_of_roofline": floor / best},
        }  # fmt: skip
        given.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
