"""The tools of `training.py`, each run by its own interpreter: `python workers.py TOOL FOLDER`.

A worker reads one request a line and answers with one: {"steps": 3} trains three steps and gives their
times, {"finish": true} writes the weights (W_enc (d, F), b_enc, W_dec (F, d), b_dec) and gives the peak
memory. It calls the tool's own training step on weights that the tool itself begins with; only what a tool
leaves to its caller is written here.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

Step = Callable[[torch.Tensor], None]
Weights = Callable[[], dict[str, torch.Tensor]]


def unit_rows(s: dict[str, Any]) -> torch.Tensor:
    """What ReLU and JumpReLU start from, (F, d), in every tool: they would need thousands of steps to become
    sparse from where they begin by themselves.
    """
    rows = torch.randn(s["width"], s["d"], generator=torch.Generator().manual_seed(s["seed"]))
    return rows / rows.norm(dim=1, keepdim=True)


def read(folder: Path, s: dict[str, Any], at: int) -> torch.Tensor:
    """A batch of activations from row `at` on, (batch, d). Not mapped: mapped pages count as memory used."""
    size = s["batch"] * s["d"]
    x = np.fromfile(folder / "x.bin", np.float32, size, offset=4 * s["d"] * at)
    return torch.from_numpy(x.reshape(s["batch"], s["d"]))


def nested(s: dict[str, Any]) -> list[int]:
    """Matryoshka's widths."""
    return [s["width"] // part for part in (16, 8, 4, 2)]


def unbraid(s: dict[str, Any], kernels: str = "auto") -> tuple[Step, Weights]:
    """The trainer's own step, with its dead counters."""
    from unbraid.sae.base import SAEConfig
    from unbraid.sae.objective import StepContext
    from unbraid.sae.registry import build
    from unbraid.training.adam import Adam
    from unbraid.training.steppers import stepper

    arch, own = s["arch"], s["arch"] in ("relu", "jumprelu")
    options: dict[str, Any] = {
        "matryoshka": {"widths": tuple(nested(s))},
        "relu": {"l1": s["sparsity"]},
        "jumprelu": {"l0": s["sparsity"], "bandwidth": s["bandwidth"]},
    }.get(arch, {})
    sae = build(SAEConfig(arch, s["d"], s["width"], 0 if own else s["k"], options=options))
    with torch.no_grad():
        if own:
            sae.W_dec.copy_(unit_rows(s))
            sae.W_enc.copy_(unit_rows(s).T)
        else:
            x = read(Path(s["folder"]), s, 0)
            sae.initialise(x, x, torch.Generator().manual_seed(s["seed"]))
        if arch == "jumprelu":
            sae.threshold.fill_(s["level"])
        elif arch == "relu":
            sae.b_enc.fill_(-s["level"])
    move = stepper(sae, Adam(sae), kernels)  # type: ignore[arg-type]
    if move.own_threads:
        torch.set_num_threads(1)  # as the trainer does
    silent, count = torch.zeros(s["width"], dtype=torch.int64), 0

    def step(x: torch.Tensor) -> None:
        nonlocal count
        count += 1
        report = move.step(x, x, StepContext(silent >= 10_000_000, 1.0, 1 / 32), count, s["lr"])
        silent.add_(len(x))
        silent[report.fired] = 0

    return step, lambda: {name: w.detach().contiguous() for name, w in sae.named_parameters()}


def saelens(s: dict[str, Any]) -> tuple[Step, Weights]:
    """SAELens's `SAETrainer.step`."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
    from sae_lens.saes.matryoshka_batchtopk_sae import (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
    )
    from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    arch, size = s["arch"], {"d_in": s["d"], "d_sae": s["width"]}
    jump = {"l0_coefficient": s["sparsity"], "jumprelu_bandwidth": s["bandwidth"]}
    sae: Any = {
        "topk": lambda: TopKTrainingSAE(TopKTrainingSAEConfig(**size, k=s["k"])),
        "batchtopk": lambda: BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**size, k=float(s["k"]))),
        "matryoshka": lambda: MatryoshkaBatchTopKTrainingSAE(
            MatryoshkaBatchTopKTrainingSAEConfig(**size, k=float(s["k"]), matryoshka_widths=nested(s))
        ),
        "jumprelu": lambda: JumpReLUTrainingSAE(
            JumpReLUTrainingSAEConfig(**size, jumprelu_init_threshold=s["level"], **jump)
        ),
        "relu": lambda: StandardTrainingSAE(StandardTrainingSAEConfig(**size, l1_coefficient=s["sparsity"])),
    }[arch]()
    if arch in ("relu", "jumprelu"):
        with torch.no_grad():
            sae.W_dec.copy_(unit_rows(s))
            sae.W_enc.copy_(unit_rows(s).T)
            sae.b_enc.fill_(-s["level"] if arch == "relu" else 0.0)
    config = SAETrainerConfig(
        total_training_samples=10**9, train_batch_size_samples=s["batch"], lr=s["lr"], lr_end=s["lr"],
        logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    trainer: Any = SAETrainer(config, sae, iter(()))

    def step(x: torch.Tensor) -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    def weights() -> dict[str, torch.Tensor]:
        # Its codes are multiplied by the decoder rows' lengths before the k largest are chosen.
        found = {name: w.detach().clone() for name, w in sae.named_parameters()}
        if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
            norms = found["W_dec"].norm(dim=1)
            found["W_enc"], found["b_enc"] = found["W_enc"] * norms, found["b_enc"] * norms
            found["W_dec"] = found["W_dec"] / norms[:, None]
        return {name: w.contiguous() for name, w in found.items()}

    return step, weights


def dictionary_learning(s: dict[str, Any]) -> tuple[Step, Weights]:
    """dictionary_learning's `TopKTrainer.update`."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=10**6, activation_dim=s["d"], dict_size=s["width"], k=s["k"], layer=0, lm_name="none",
        lr=s["lr"], warmup_steps=0, device="cpu", seed=s["seed"],
    )  # fmt: skip
    ae, count = trainer.ae, 0

    def step(x: torch.Tensor) -> None:
        nonlocal count
        trainer.update(count, x)
        count += 1

    return step, lambda: {
        "W_enc": ae.encoder.weight.detach().T.contiguous(), "b_enc": ae.encoder.bias.detach(),
        "W_dec": ae.decoder.weight.detach().T.contiguous(), "b_dec": ae.b_dec.detach(),
    }  # fmt: skip


def sparsify(s: dict[str, Any]) -> tuple[Step, Weights]:
    """sparsify's autoencoder, with the body of its trainer's loop, written out."""
    from sparsify import SparseCoder, SparseCoderConfig

    sae = SparseCoder(s["d"], SparseCoderConfig(num_latents=s["width"], k=s["k"]), device="cpu")
    adam = torch.optim.Adam(sae.parameters(), lr=s["lr"])

    def step(x: torch.Tensor) -> None:
        sae.set_decoder_norm_to_unit_norm()
        sae(x).fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()

    def weights() -> dict[str, torch.Tensor]:
        sae.set_decoder_norm_to_unit_norm()
        return {
            "W_enc": sae.encoder.weight.detach().T.contiguous(), "b_enc": sae.encoder.bias.detach(),
            "W_dec": sae.W_dec.detach(), "b_dec": sae.b_dec.detach(),
        }  # fmt: skip

    return step, weights


TOOLS: dict[str, Callable[[dict[str, Any]], tuple[Step, Weights]]] = {
    "unbraid": unbraid,
    "unbraid-plain": lambda s: unbraid(s, "plain"),
    "saelens": saelens,
    "dictionary_learning": dictionary_learning,
    "sparsify": sparsify,
}


def peak_mb() -> float:
    """The most memory this process has held. Not getrusage's: that begins with what the parent held."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
            2**20 if sys.platform == "darwin" else 1024
        )
    return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 1024


def main() -> None:
    tool, folder = sys.argv[1], Path(sys.argv[2])
    settings = json.loads((folder / "settings.json").read_text())
    settings["folder"] = str(folder)
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(settings["seed"])
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever a tool prints is no answer
    step, weights = TOOLS[tool](settings)
    at, n = 0, (folder / "x.bin").stat().st_size // (4 * settings["d"])
    for line in sys.stdin:
        request = json.loads(line)
        if request.get("finish"):
            peak = peak_mb()  # before the copies that writing makes
            save_file(weights(), folder / tool / "weights.safetensors")
            print(json.dumps({"peak_mb": peak}), file=answers, flush=True)
            return
        times = []
        for _ in range(request["steps"]):
            rows = read(folder, settings, at)
            at = (at + settings["batch"]) % n
            started = time.perf_counter()
            step(rows)
            times.append(1000 * (time.perf_counter() - started))
        print(json.dumps({"ms": times}), file=answers, flush=True)


if __name__ == "__main__":
    main()
