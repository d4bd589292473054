"""What a training run does, in one dataclass: the same options the command line offers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from unbraid.manifest.errors import UserError
from unbraid.sae.options import check_options
from unbraid.sae.registry import architecture
from unbraid.training.step import Products
from unbraid.training.steppers import Kernels


def _none() -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True)
class LoopOptions:
    """How to train, on activations (centred and) scaled to a mean square of 1: what a sweep holds fixed."""

    steps: int = 5000
    """Number of batches."""
    batch_size: int = 2048
    """Tokens in a batch."""
    warmup_share: float = 0.05
    """Share of the steps over which the learning rate (and a penalty's weight) rises from zero."""
    decay_share: float = 0.2
    """Share of the steps, the last ones, over which the learning rate falls to zero."""
    auxk_alpha: float = 1 / 32
    """Weight of the auxiliary loss that revives dead latents, where k fixes how many fire."""
    dead_after: int = 100_000
    """Tokens without firing after which a latent counts as dead."""
    centre: bool = True
    """Whether the mean activation is taken out first, so that b_dec starts there, and not at 0. Activations
    that are sums of features, with nothing added, do without (benchmarks/RESULTS.md, "synthetic")."""
    beta2: float | None = None
    """Adam's β₂, how slowly the mean square of gradients forgets; the architecture's own when left out."""
    max_grad_norm: float = 0.0
    """Length to which the gradient of a token's squared error, the mean over a batch, is cut where it is
    longer, in plain PyTorch; 0 for never. With a β₂ of 0.999 the first gradients, large ones, slow Adam down
    for long."""
    resample_every: int = 0
    """Steps after which dead latents start anew where the loss is highest; 0 for never."""
    calibration_tokens: int = 65_536
    """Tokens read after training to measure firing frequencies and thresholds."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    log_every: int = 50
    """Steps summed up in one line of log.jsonl."""
    kernels: Kernels = "auto"
    """auto: a whole step in compiled loops, for the architectures that have one; plain: PyTorch's own."""
    precision: Products = "float32"
    """bf16: PyTorch multiplies matrices of bfloat16, while weights, sums and moments stay float32: faster on
    GPUs and processors that have instructions for it. Compiled loops and the GPU's kernels look by rough
    products anyway, and need no option."""
    device: str = "cpu"
    """Where it all runs: cpu, cuda, cuda:1, …"""
    threads: int | None = None
    """CPU threads, by default what torch uses now; recorded, because sums of floats depend on it."""


@dataclass(frozen=True)
class TrainOptions(LoopOptions):
    """How to train one autoencoder."""

    lr: float | None = None
    """Adam's learning rate at its highest; 0.006 · √(1024 / width), but not above 0.006, when left out."""
    seed: int = 0
    """Seed of the initial directions and of the order of the tokens."""


@dataclass(frozen=True)
class TrainConfig(TrainOptions):
    """What to train and how."""

    architecture: str = field(default="topk", kw_only=True)
    """One of the names in `sae.registry`."""
    d_sae: int = field(default=8192, kw_only=True)
    """Number of latents."""
    k: int = field(default=32, kw_only=True)
    """Latents that fire at a token, or do on average, for the architectures that fix this."""
    options: Mapping[str, Any] = field(default_factory=_none, kw_only=True)
    """The architecture's own options by name, where they are not its defaults."""

    @property
    def peak_lr(self) -> float:
        """The learning rate, settled."""
        return min(0.006, 0.006 * (1024 / self.d_sae) ** 0.5) if self.lr is None else self.lr

    def check(self) -> None:
        """Raise UserError, naming the option, for values that cannot be trained with."""
        kind = architecture(self.architecture)
        check_options(kind.Options, self.options, self.architecture)
        if self.d_sae < 1:
            raise UserError(f"width is {self.d_sae}; choose --width of 1 or more")
        if kind.uses_k and not 1 <= self.k <= self.d_sae:
            raise UserError(
                f"k is {self.k} but must lie between 1 and the width {self.d_sae}; change --k or --width"
            )
        for name in (
            "steps",
            "batch_size",
            "dead_after",
            "calibration_tokens",
            "checkpoint_every",
            "log_every",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; choose 1 or more")
        if self.beta2 is not None and not 0 <= self.beta2 < 1:
            raise UserError(f"beta2 is {self.beta2}; choose a number from 0 to below 1, as 0.999")
        if self.resample_every < 0:
            raise UserError(f"resample_every is {self.resample_every}; choose 0 (never) or more")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:  # unknown, not there, or not in this build of torch
            raise UserError(f"device {self.device!r} cannot be used here; choose --device cpu") from error
        if self.threads is not None and self.threads < 1:
            raise UserError(f"threads is {self.threads}; choose 1 or more")
        for name in ("peak_lr", "auxk_alpha", "max_grad_norm"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(
                    f"{name.removeprefix('peak_')} is {getattr(self, name)}; choose a number of 0 or more"
                )
        if not 0 <= self.warmup_share <= 1 or not 0 <= self.decay_share <= 1:
            raise UserError("warmup_share and decay_share must lie between 0 and 1")
