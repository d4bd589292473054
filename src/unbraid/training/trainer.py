"""Train an autoencoder on captured activations, killable at any moment.

Training sees (x − mean) · scale with a mean square of 1 per dimension, so that one learning rate suits
every model. The two are folded into the weights at the end: the saved autoencoder eats raw activations,
its decoder rows have unit length, and a latent's value is in the model's own units.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from unbraid.activations.store import ActivationStore
from unbraid.activations.stream import batches
from unbraid.manifest.errors import UserError
from unbraid.manifest.files import building, write_bytes
from unbraid.manifest.progress import Progress
from unbraid.manifest.record import MANIFEST, write_manifest
from unbraid.model.sites import Site
from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.formats.saelens import save as save_sae
from unbraid.sae.registry import build
from unbraid.training.adam import Adam
from unbraid.training.calibrate import calibrate
from unbraid.training.checkpoint import FILE, Checkpoint
from unbraid.training.config import TrainConfig
from unbraid.training.objective import StepReport, backward_dense, backward_sparse
from unbraid.training.schedule import ramp, rate

KIND = "sae"
LOG = "log.jsonl"
SPARSITY = "sparsity.safetensors"
STATISTICS_TOKENS = 100_000


def train(
    store: ActivationStore,
    site: Site | str | None,
    config: TrainConfig,
    out: Path | str,
    *,
    command: str = "",
    progress: Progress | None = None,
) -> SAE:
    """Train an autoencoder on the activations of `site` (the only one captured, if None) into the folder
    `out`.

    Killed and run again with the same arguments it goes on from its last checkpoint, and the files are
    the same, bit for bit, as an undisturbed run's. Returns the autoencoder as it was saved. Raises
    UserError for settings that cannot be trained with, an `out` that exists, and a partial run with other
    settings.
    """
    config.check()
    chosen = _site(store, site)
    out = Path(out)
    with building(out) as folder:
        checkpoint = Checkpoint.read(folder)
        config = _with_threads(config, checkpoint)
        before = torch.get_num_threads()
        torch.set_num_threads(config.threads or before)
        try:
            run = Run(store, chosen, config, folder)
            if checkpoint is not None:
                run.restore(checkpoint)
            run.go(progress)
            sae = run.finish(command)
        finally:
            torch.set_num_threads(before)
    return sae


def _site(store: ActivationStore, site: Site | str | None) -> Site:
    if site is not None:
        return store.site(site)
    if len(store.sites) != 1:
        names = ", ".join(map(str, store.sites))
        raise UserError(f"{store.folder} holds several sites; choose one with --site: {names}")
    return store.sites[0]


def _with_threads(config: TrainConfig, checkpoint: Checkpoint | None) -> TrainConfig:
    """Settle the number of threads: what was asked for, what the run began with, or what torch has."""
    if config.threads is not None:
        return config
    begun = checkpoint.facts["settings"]["config"]["threads"] if checkpoint is not None else None
    return replace(config, threads=begun or torch.get_num_threads())


@dataclass(frozen=True, eq=False)
class Scaling:
    """How activations are centred and scaled for training."""

    mean: Tensor
    """Mean activation, (d_in,)."""
    scale: float
    """1 / root mean square of a centred activation's entries."""

    def __call__(self, x: Tensor) -> Tensor:
        """(x − mean) · scale, shape (n, d_in)."""
        return (x - self.mean) * self.scale

    @torch.no_grad()
    def fold(self, sae: SAE) -> None:
        """Change an autoencoder of scaled activations into the same one of raw activations, in place.

        With p the pre-activation in training, W_enc stays, b_enc and b_dec are divided by the scale, and
        the mean goes into b_dec: then p' = p / scale and x̂' = x̂ / scale + mean.
        """
        sae.b_enc.div_(self.scale)
        sae.b_dec.div_(self.scale).add_(self.mean)


class Run:
    """One training run: weights, optimiser, counters, and the folder they are saved in."""

    def __init__(self, store: ActivationStore, site: Site, config: TrainConfig, folder: Path) -> None:
        self.store, self.site, self.config, self.folder = store, site, config, folder
        self.scaling = _measure(store, site, config.seed)
        self.sae = self._initialised()
        self.optimizer = Adam(self.sae)
        self.step = 0
        self.silent = torch.zeros(config.d_sae, dtype=torch.int64)  # tokens since each latent last fired
        self.sums = torch.zeros(
            4, dtype=torch.float64
        )  # squared error, Σ‖x‖², active latents, tokens: since last log
        self.log_bytes = 0

    @property
    def settings(self) -> dict[str, Any]:
        """What a checkpoint must have been made with to be gone on from."""
        return {"config": asdict(self.config), "site": str(self.site), "activations": self.store.id}

    def go(self, progress: Progress | None) -> None:
        """Train up to the last step, writing log and checkpoints."""
        with (self.folder / LOG).open("ab") as log:
            log.truncate(self.log_bytes)  # lines after the checkpoint are written again
        config = self.config
        started, first, note = monotonic(), self.step, ""
        stream = batches(
            self.store, self.site, config.batch_size, seed=config.seed, steps=config.steps, start=self.step
        )
        for x in stream:
            self._one_step(self.scaling(x))
            if self.step % config.log_every == 0 or self.step == config.steps:
                note = self._log()
            if self.step % config.checkpoint_every == 0 and self.step < config.steps:
                self._checkpoint()
            if progress is not None:
                speed = (self.step - first) * config.batch_size / max(monotonic() - started, 1e-9)
                progress(self.step, config.steps, f"{note}  {speed:,.0f} tokens/s".strip())

    def _one_step(self, x: Tensor) -> None:
        """One batch of scaled activations, (n, d_in)."""
        config, sae = self.config, self.sae
        self.optimizer.zero_grad()
        if config.architecture == "relu":
            report = backward_dense(sae, x, config.l1 * ramp(self.step, config.steps, config.warmup_share))
        else:
            report = backward_sparse(sae, x, self.silent >= config.dead_after, config.auxk_alpha)
        _remove_parallel_gradient(sae.W_dec)
        factor = rate(self.step, config.steps, config.warmup_share, config.decay_share)
        self.optimizer.step(self.step + 1, config.peak_lr * factor)
        _normalise(sae.W_dec)
        self._count(x, report)
        self.step += 1

    def _count(self, x: Tensor, report: StepReport) -> None:
        self.silent += len(x)
        self.silent[report.fired] = 0
        values = (report.squared_error, x.square().sum(), report.active, torch.tensor(len(x)))
        self.sums += torch.stack([value.detach().double() for value in values])

    def _log(self) -> str:
        """Write what the last steps showed as one line; returns it in short."""
        error, total, active, tokens = self.sums.tolist()
        self.sums.zero_()
        dead = float((self.silent >= self.config.dead_after).double().mean())
        row = {"step": self.step, "fvu": error / total, "l0": active / tokens, "dead": dead}
        line = (json.dumps(row) + "\n").encode()
        with (self.folder / LOG).open("ab") as log:
            log.write(line)
        self.log_bytes += len(line)
        return f"fvu {row['fvu']:.4f}  l0 {row['l0']:.1f}  dead {dead:.2%}"

    def _checkpoint(self) -> None:
        with (self.folder / LOG).open("ab") as log:
            os.fsync(log.fileno())  # the checkpoint must not know more of the log than the disk does
        tensors = {name: value for name, value in self.sae.state_dict().items()}
        tensors |= self.optimizer.tensors() | {"silent": self.silent, "sums": self.sums}
        facts = {"step": self.step, "log_bytes": self.log_bytes, "settings": self.settings}
        Checkpoint(tensors, facts).write(self.folder)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to a checkpoint. Raises UserError when it belongs to a run with other settings."""
        if checkpoint.facts["settings"] != json.loads(json.dumps(self.settings)):
            raise UserError(
                f"{self.folder} holds an unfinished run with other settings; run it again with those, "
                "choose another --out or delete it"
            )
        self.sae.load_state_dict({name: checkpoint.tensors[name] for name in self.sae.state_dict()})
        self.optimizer.restore(checkpoint.tensors)
        self.silent, self.sums = checkpoint.tensors["silent"].clone(), checkpoint.tensors["sums"].clone()
        self.step, self.log_bytes = checkpoint.facts["step"], checkpoint.facts["log_bytes"]

    def finish(self, command: str) -> SAE:
        """Fold the scaling in, measure firing, and write the artifact's files and manifest."""
        config = self.config
        last = json.loads((self.folder / LOG).read_text(encoding="utf-8").splitlines()[-1])
        self.scaling.fold(self.sae)
        size = min(config.batch_size, config.calibration_tokens)
        steps = -(-config.calibration_tokens // size)
        # Another seed than training's, so that the tokens are not those of the first batches.
        drawn = batches(self.store, self.site, size, seed=config.seed + 1, steps=steps)
        measured = calibrate(self.sae, drawn)
        sae = measured.sae.requires_grad_(False)
        save_sae(sae, self.folder)
        write_bytes(self.folder / SPARSITY, save({"sparsity": (measured.frequency + 1e-10).log10().float()}))
        (self.folder / FILE).unlink(missing_ok=True)
        (self.folder / MANIFEST).unlink(missing_ok=True)
        write_manifest(
            self.folder,
            kind=KIND,
            command=command,
            seed=config.seed,
            inputs={"activations": self.store.id},
            facts={
                "architecture": sae.config.architecture,
                "site": str(self.site),
                "model": self.store.model_name,
                "model_id": self.store.model_id,
                "tokenizer_id": self.store.tokenizer_id,
                "train": asdict(config),
                "tokens": config.steps * config.batch_size,
                "fvu_last": last["fvu"],
                "l0": measured.l0,
                "dead": float((measured.frequency == 0).double().mean()),
                "measured_on_tokens": measured.tokens,
            },
            paths={"activations": self.store.folder},
        )
        return sae

    @torch.no_grad()
    def _initialised(self) -> SAE:
        """Weights to start from: the data decides how far the encoder reaches.

        Decoder rows are random unit vectors, the encoder is their transpose, shrunk so that the codes of
        the first batch reconstruct it as well as one common factor can make them (otherwise k overlapping
        latents overshoot).
        """
        config = self.config
        sae = build(
            SAEConfig(
                architecture=config.architecture,
                d_in=self.store.d_in(self.site),
                d_sae=config.d_sae,
                k=0 if config.architecture == "relu" else config.k,
                site=str(self.site),
                model_name=self.store.model_name,
                model_id=self.store.model_id,
                metadata={"context_size": self.store.context},
            )
        )
        generator = torch.Generator().manual_seed(config.seed)
        sae.W_dec.copy_(torch.randn(sae.W_dec.shape, generator=generator))
        _normalise(sae.W_dec)
        sae.W_enc.copy_(sae.W_dec.T)
        x = self.scaling(next(batches(self.store, self.site, config.batch_size, seed=config.seed, steps=1)))
        x_hat = sae(x).x_hat
        sae.W_enc *= (x * x_hat).sum() / x_hat.square().sum().clamp(min=1e-12)
        return sae


def _measure(store: ActivationStore, site: Site, seed: int) -> Scaling:
    """Mean and scale of the activations, from up to 100,000 of them, in float64."""
    size = min(STATISTICS_TOKENS, store.n_tokens)
    (x,) = batches(store, site, size, seed=seed, steps=1)
    x = x.double()
    mean = x.mean(dim=0)
    spread = float((x - mean).square().mean())
    if spread == 0:
        raise UserError(f"{store.folder}: all activations at {site} are the same; capture more text")
    return Scaling(mean.float(), spread**-0.5)


@torch.no_grad()
def _remove_parallel_gradient(W_dec: Tensor) -> None:
    """Take out of each row's gradient what would only change the row's length, which stays 1."""
    grad = W_dec.grad
    assert grad is not None
    grad -= (grad * W_dec).sum(dim=1, keepdim=True) * W_dec


@torch.no_grad()
def _normalise(W_dec: Tensor) -> None:
    W_dec /= W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12)
