"""`unbraid train`: an autoencoder from captured activations."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal

import tyro

from unbraid.activations.store import ActivationStore
from unbraid.cli.progress import shown
from unbraid.manifest.record import read_manifest
from unbraid.training.config import TrainConfig, TrainOptions
from unbraid.training.trainer import train


@dataclass(frozen=True)
class Options:
    """What to train on, what to train, and where to put it."""

    activations: Path
    """Folder that `unbraid capture` made."""
    out: Path
    """Folder to make; a run that was killed goes on from its last checkpoint."""
    arch: Literal["topk", "batchtopk", "relu"] = "topk"
    """Architecture."""
    k: int = 32
    """Latents that fire at a token (topk), or do on average (batchtopk); unused by relu."""
    width: int = 8192
    """Number of latents."""
    site: str | None = None
    """Which of the captured sites; may be left out when there is one."""
    config: Annotated[TrainOptions, tyro.conf.arg(name="")] = field(default_factory=TrainOptions)
    """How to train."""
    json: bool = False
    """Print the result as JSON."""


def run(options: Options) -> None:
    """Train, and print what was made."""
    config = TrainConfig(
        **asdict(options.config), architecture=options.arch, d_sae=options.width, k=options.k
    )
    config.check()
    store = ActivationStore(options.activations)
    with shown("train", "steps") as progress:
        train(store, options.site, config, options.out, command=_command(options), progress=progress)
    manifest = read_manifest(options.out)
    facts = manifest.facts
    if options.json:
        print(json.dumps({"out": str(options.out), "id": manifest.id, **facts}, indent=2, ensure_ascii=False))
        return
    print(
        f"{options.out}: {options.arch} of width {options.width:,} on {facts['site']} of {facts['model']}, "
        f"{facts['tokens']:,} tokens; fvu {facts['fvu_last']:.4f}, l0 {facts['l0']:.1f}, "
        f"dead {facts['dead']:.2%} of the latents over {facts['measured_on_tokens']:,} tokens"
    )


def _command(options: Options) -> str:
    words = ["unbraid", "train", "--activations", str(options.activations), "--arch", options.arch]
    words += ["--k", str(options.k), "--width", str(options.width), "--out", str(options.out)]
    if options.site:
        words += ["--site", options.site]
    default = TrainOptions()
    for option in fields(TrainOptions):
        value = getattr(options.config, option.name)
        if value != getattr(default, option.name):
            words += [f"--{option.name.replace('_', '-')}", str(value)]
    return shlex.join(words)
