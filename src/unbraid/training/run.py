"""One training run: weights, optimiser, counters, and the folder they are saved in.

Training sees (x − mean) · scale with a mean square of 1 per dimension, so that one learning rate suits
every model. The two are folded into the weights at the end: the saved autoencoder eats raw activations,
its decoder rows have unit length, and a latent's value is in the model's own units.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from unbraid.activations.inorder import InOrder
from unbraid.manifest.errors import UserError
from unbraid.manifest.files import write_bytes
from unbraid.manifest.record import MANIFEST, write_manifest
from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.formats.saelens import save as save_sae
from unbraid.sae.objective import StepContext, StepReport
from unbraid.sae.options import plain
from unbraid.sae.registry import architecture, build
from unbraid.sae.scaling import Scaling
from unbraid.training.adam import Adam
from unbraid.training.calibrate import calibrate
from unbraid.training.checkpoint import FILE, Checkpoint
from unbraid.training.config import TrainConfig
from unbraid.training.revival import DeadWatch, resample
from unbraid.training.schedule import ramp, rate
from unbraid.training.sources import Source, Sources, names
from unbraid.training.steppers import stepper

KIND = "sae"
LOG = "log.jsonl"
SPARSITY = "sparsity.safetensors"
STATISTICS_TOKENS = 100_000


def _with_threads(config: TrainConfig, checkpoint: Checkpoint | None) -> TrainConfig:
    """Settle the number of threads: what was asked for, what the run began with, or what torch has."""
    if config.threads is not None:
        return config
    begun = checkpoint.facts["settings"]["config"]["threads"] if checkpoint is not None else None
    return replace(config, threads=begun or torch.get_num_threads())


class Run:
    """One autoencoder on its way; `trainer` hands it the batches."""

    def __init__(self, sources: Sources, config: TrainConfig, folder: Path) -> None:
        self.sources, self.config, self.folder = sources, config, folder
        self.device = torch.device(config.device)
        self.scaling, self.target_scaling = (s.to(self.device) for s in _measure(sources, config.seed))
        self.middle = torch.zeros(())  # the mean of scaled targets, (d_out,) where it is not 0
        if not config.centre:
            self.middle = self.target_scaling.mean * self.target_scaling.scale
            self.scaling, self.target_scaling = self.scaling.uncentred(), self.target_scaling.uncentred()
        self.sae = self._initialised()
        self.optimizer = Adam(self.sae, config.beta2)
        self.stepper = stepper(
            self.sae, self.optimizer, config.kernels, config.precision, config.max_grad_norm
        )
        self.step = 0
        # Tokens since each latent last fired; since the last log: squared error, Σ‖target − its mean‖²,
        # active latents, tokens.
        self.silent = torch.zeros(config.d_sae, dtype=torch.int64, device=self.device)
        self.sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        self.watch = DeadWatch()
        self.log_bytes = 0
        self.note = ""
        self.on_log: Callable[[Mapping[str, Any]], None] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What a checkpoint must have been made with to be gone on from."""
        sources = self.sources
        found = {
            "config": asdict(self.config),
            "beta2": self.optimizer.beta2,  # another version may have another
            "site": names(sources.inputs),
            "activations": self.sources.so_far(self.step * self.config.batch_size),
        }
        return found | ({"target_site": names(sources.targets)} if sources.across else {})

    @classmethod
    def begin(cls, sources: Sources, config: TrainConfig, folder: Path) -> Run:
        """A run at its start, or where the last checkpoint in `folder` left it; sets torch's threads."""
        checkpoint = Checkpoint.read(folder)
        config = _with_threads(config, checkpoint)
        torch.set_num_threads(config.threads or torch.get_num_threads())
        run = cls(sources, config, folder)
        if checkpoint is not None:
            run.restore(checkpoint)
        return run

    def cut_log(self) -> None:
        """Take away the lines after the checkpoint, which are written again."""
        with (self.folder / LOG).open("ab") as log:
            log.truncate(self.log_bytes)

    def learn(self, found: Mapping[Source, Tensor]) -> None:
        """Take a step on a batch of the stream; write log and checkpoint where they are due."""
        config = self.config
        threads = 1 if self.stepper.own_threads else config.threads or 1
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        self._one_step(*self._scaled(*self.sources.of(found)))
        if self.step % config.log_every == 0 or self.step == config.steps:
            self.note = self._log()
        if self.step % config.checkpoint_every == 0 and self.step < config.steps:
            self.checkpoint()

    def _scaled(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        scaled = self.scaling(x.to(self.device))
        across = self.sources.across
        return scaled, self.target_scaling(target.to(self.device)) if across else scaled

    def _one_step(self, x: Tensor, target: Tensor) -> None:
        """One batch of scaled activations, (n, d_in), and what to reconstruct, (n, d_out)."""
        config = self.config
        dead = self.silent >= config.dead_after
        ramped = ramp(self.step, config.steps, config.warmup_share)
        context = StepContext(dead, ramped, config.auxk_alpha)
        lr = config.peak_lr * rate(self.step, config.steps, config.warmup_share, config.decay_share)
        report = self.stepper.step(x, target, context, self.step + 1, lr)
        self._count(target, report)
        self.step += 1
        if config.resample_every and self.step % config.resample_every == 0:
            self._resample(x, target)

    def _resample(self, x: Tensor, target: Tensor) -> None:
        """Start dead latents anew, but not once the rate falls, when they could not learn any more."""
        config, dead = self.config, self.silent >= self.config.dead_after
        if self.step <= (1 - config.decay_share) * config.steps:
            # A seed of the step's own, so that a resumed run draws the same.
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + self.step)
            resample(self.sae, self.optimizer, x, target, dead, generator)
            self.stepper.refresh()
            self.silent[dead] = 0

    def _count(self, target: Tensor, report: StepReport) -> None:
        self.silent += len(target)
        self.silent[report.fired] = 0
        spread = target if self.config.centre else target - self.middle
        values = (report.squared_error, spread.square().sum(), report.active, torch.tensor(len(target)))
        self.sums += torch.stack([value.detach().to(self.device, torch.float64) for value in values])

    def _log(self) -> str:
        """Write what the last steps showed as one line; returns it in short."""
        self._check_finite()
        config = self.config
        error, total, active, tokens = self.sums.tolist()
        self.sums.zero_()
        dead = float((self.silent >= config.dead_after).double().mean())
        row: dict[str, Any] = {"step": self.step, "fvu": error / total, "l0": active / tokens, "dead": dead}
        note = f"fvu {row['fvu']:.4f}  l0 {row['l0']:.1f}  dead {dead:.2%}"
        # Before that all latents have had the chance to be dead, a rise says nothing.
        if self.step * config.batch_size >= 2 * config.dead_after:
            watch = self.watch.look(dead)
            if watch.warned and not self.watch.warned:
                row["note"] = (
                    f"the dead share has risen from {watch.lowest:.2%} to {dead:.2%}; try a smaller --lr, "
                    f"{self.sae.against_death} or --resample-every {max(1, config.steps // 10)}"
                )
                note = f"{note}  {row['note']}"
            self.watch = watch
        line = (json.dumps(row) + "\n").encode()
        with (self.folder / LOG).open("ab") as log:
            log.write(line)
        self.log_bytes += len(line)
        if self.on_log is not None:
            self.on_log(row)
        return note

    def _check_finite(self) -> None:
        """Stop before what is no number reaches the log or a checkpoint."""
        if not self.sums.isfinite().all():
            raise UserError(
                f"{self.sources.stores[0]}: by step {self.step} the loss was no number any more; "
                "either activations there are not (capture them with --dtype float32), or --lr is too high"
            )

    def checkpoint(self) -> None:
        """Write down where the run is."""
        self._check_finite()
        with (self.folder / LOG).open("ab") as log:
            os.fsync(log.fileno())  # the checkpoint must not know more of the log than the disk does
        tensors = {name: value for name, value in self.sae.state_dict().items()}
        tensors |= self.optimizer.tensors() | {"silent": self.silent, "sums": self.sums}
        facts = {
            "step": self.step,
            "log_bytes": self.log_bytes,
            "settings": self.settings,
            "watch": asdict(self.watch),
        }
        Checkpoint(tensors, facts).write(self.folder)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to a checkpoint. Raises UserError when it belongs to a run with other settings."""
        self.step, self.log_bytes = checkpoint.facts["step"], checkpoint.facts["log_bytes"]
        checkpoint.require(self.settings, self.folder)
        self.sae.load_state_dict({name: checkpoint.tensors[name] for name in self.sae.state_dict()})
        self.optimizer.restore(checkpoint.tensors)
        self.stepper.refresh()
        self.silent.copy_(checkpoint.tensors["silent"])
        self.sums.copy_(checkpoint.tensors["sums"])
        self.watch = DeadWatch(**checkpoint.facts["watch"])

    def finish(self, command: str) -> SAE:
        """Fold the scaling in, measure firing, and write the artifact's files and manifest."""
        config = self.config
        size = min(config.batch_size, config.calibration_tokens)
        steps = -(-config.calibration_tokens // size)
        if any(isinstance(store, InOrder) for store in self.sources.stores):
            self.checkpoint()  # the wait for a capture's end may be long, and in vain
        origin = self.sources.origin(max(config.steps * config.batch_size, steps * size))
        torch.set_num_threads(config.threads or torch.get_num_threads())
        last = json.loads((self.folder / LOG).read_text(encoding="utf-8").splitlines()[-1])
        sources, first = self.sources, self.sources.stores[0]
        self.sae.fold(self.scaling, self.target_scaling)
        # Another seed than training's, so that the tokens are not those of the first batches.
        drawn = self.sources.batches(size, seed=config.seed + 1, steps=steps)
        measured = calibrate(self.sae, (x.to(self.device) for x, _ in drawn))
        sae = measured.sae.requires_grad_(False).cpu()
        save_sae(sae, self.folder)
        write_bytes(self.folder / SPARSITY, save({"sparsity": (measured.frequency + 1e-10).log10().float()}))
        (self.folder / MANIFEST).unlink(missing_ok=True)
        write_manifest(
            self.folder,
            kind=KIND,
            command=command,
            seed=config.seed,
            inputs=origin.inputs,
            facts={
                "architecture": sae.config.architecture,
                "site": names(sources.inputs),
                **({"target_site": names(sources.targets)} if sources.across else {}),
                "model": first.model_name,
                "model_id": first.model_id,
                "tokenizer_id": first.tokenizer_id,
                "train": asdict(config) | {"options": plain(self.sae.options)},
                "tokens": config.steps * config.batch_size,
                "fvu_last": last["fvu"],
                "l0": measured.l0,
                "dead": float((measured.frequency == 0).double().mean()),
                "measured_on_tokens": measured.tokens,
                **origin.facts,
            },
            paths=origin.paths,
            without=FILE,
        )
        (self.folder / FILE).unlink(missing_ok=True)  # not before: a kill would have lost the whole run
        return sae

    @torch.no_grad()
    def _initialised(self) -> SAE:
        """Weights to start from, which the first batch decides on."""
        config = self.config
        sae = build(sae_config(self.sources, config)).to(self.device)
        (batch,) = self.sources.batches(config.batch_size, seed=config.seed, steps=1)
        sae.initialise(*self._scaled(*batch), first_weights(config.seed))
        return sae


def first_weights(seed: int) -> torch.Generator:
    """What draws the first directions.

    Not torch's generator with that very seed: who plants features in a world of their own draws them with it,
    and would find them in the first weights (cosine 0.96), learned or not.
    """
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, 1]).generate_state(1)[0]))


def sae_config(sources: Sources, config: TrainConfig) -> SAEConfig:
    """The autoencoder that a run trains."""
    inputs, targets, first = sources.inputs, sources.targets, sources.stores[0]
    return SAEConfig(
        architecture=config.architecture,
        d_in=sum(source.d for source in inputs),
        d_sae=config.d_sae,
        k=config.k if architecture(config.architecture).uses_k else 0,
        site=names(inputs),
        model_name=first.model_name,
        model_id=first.model_id,
        metadata={"context_size": first.context} if first.context else {},
        d_out=sum(source.d for source in targets) if sources.across else 0,
        target_site=names(targets) if sources.across else "",
        blocks=tuple(source.d for source in inputs) if len(inputs) > 1 else (),
        options=config.options,
    )


def _measure(sources: Sources, seed: int) -> tuple[Scaling, Scaling]:
    """Mean and scale of inputs and targets, from up to 100,000 tokens."""
    size = min(STATISTICS_TOKENS, sources.at_hand)
    (batch,) = sources.batches(size, seed=seed, steps=1)
    found: list[Scaling] = []
    for x, parts in zip(batch, (sources.inputs, sources.targets), strict=True):
        scaling = Scaling.of(x, [source.d for source in parts])
        if scaling is None:
            raise UserError(
                f"{sources.stores[0]}: all activations at {names(parts)} are the same; capture more text"
            )
        if not (scaling.mean.isfinite().all() and scaling.scale.isfinite().all()):
            raise UserError(
                f"{sources.stores[0]}: activations at {names(parts)} hold NaN or infinity; capture "
                "them with --dtype float32"
            )
        found.append(scaling)
    return found[0], found[1]
