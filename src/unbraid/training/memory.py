"""Whether a training fits into memory, told before it starts instead of by the system's killer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from unbraid.manifest.errors import UserError
from unbraid.sae.base import SAEConfig
from unbraid.sae.registry import build

COPIES = 4
"""Weights, both of Adam's moments, and a gradient or the copy that a screen or a checkpoint makes."""
ROWS = 3
"""A batch as it is read, scaled and centred; what is to be reconstructed, the error and its gradient."""


def needed(config: SAEConfig, batch_size: int) -> int:
    """Bytes that training an autoencoder holds for as long as it goes on, at the least."""
    with torch.device("meta"):
        weights = sum(p.numel() for p in build(config).parameters())
    return 4 * (COPIES * weights + ROWS * batch_size * (config.d_in + (config.d_out or config.d_in)))


def available(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes of memory that are free, or could be freed, here and in the container around; None where the
    system does not say so (not Linux)."""
    try:
        lines = (proc / "meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        # Cached files count as used there, but go when the memory is wanted.
        statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        used -= int(statistics.get("inactive_file", 0)) + int(statistics.get("active_file", 0))
    except (OSError, ValueError):  # no container, or one without a limit: "max"
        return free
    return min(free, limit - used)


def check_memory(configs: Iterable[SAEConfig], batch_size: int, free: int | None) -> None:
    """Raise UserError when autoencoders that are trained together need more than `free` bytes."""
    configs = list(configs)
    total = sum(needed(config, batch_size) for config in configs)
    if free is None or total <= free:
        return
    widest = max(configs, key=lambda config: config.d_sae)
    many = len(configs) > 1
    what = f"{len(configs)} autoencoders of width up to" if many else "width"
    raise UserError(
        f"training {what} {widest.d_sae:,} on {widest.d_in} dimensions in batches of {batch_size:,} needs "
        f"about {_size(total)} of memory but {_size(free)} are free; choose a smaller --width or --batch-size"
        f"{', or fewer at a time' * many}"
    )


def _size(n: int) -> str:
    return f"{n / 1e9:,.1f} GB" if n >= 1e8 else f"{n / 1e6:,.0f} MB"
