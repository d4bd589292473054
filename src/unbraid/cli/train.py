"""`unbraid train`: an autoencoder from captured activations."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated

import tyro

from unbraid.activations.store import ActivationStore
from unbraid.cli.progress import shown
from unbraid.cli.sinks import Tool, logging_to
from unbraid.manifest.errors import UserError
from unbraid.manifest.record import read_manifest
from unbraid.sae.options import check_options, plain, read_options
from unbraid.sae.registry import architecture
from unbraid.training.config import TrainConfig, TrainOptions
from unbraid.training.trainer import train


@dataclass(frozen=True)
class Options:
    """What to train on, what to train, and where to put it."""

    activations: tuple[Path, ...]
    """Folder that `unbraid capture` made; several of the same text for a crosscoder of several models."""
    out: Path
    """Folder to make; a run that was killed goes on from its last checkpoint."""
    arch: str = "topk"
    """Architecture: topk, batchtopk, matryoshka, relu, jumprelu, gated, matching_pursuit, lista, transcoder,
    skip_transcoder, jumprelu_transcoder, jumprelu_skip_transcoder, topk_transcoder, topk_skip_transcoder,
    crosscoder or clt."""
    k: int | None = None
    """Latents that fire at a token, or do on average, for the architectures that fix this; 32 if left out."""
    width: int = 8192
    """Number of latents."""
    site: tuple[str, ...] = ()
    """Which of the captured sites; may be left out when there is one. Several for a crosscoder or clt."""
    target_site: tuple[str, ...] = ()
    """The site that a transcoder predicts, or one for each --site of a clt."""
    set: tuple[str, ...] = ()
    """The architecture's own options, such as l1=0.5; a wrong name lists those that there are."""
    config: Annotated[TrainOptions, tyro.conf.arg(name="")] = field(default_factory=TrainOptions)
    """How to train."""
    log_to: tuple[Tool, ...] = ()
    """Also log to trackio, wandb or tensorboard, where installed; log.jsonl is written always."""
    json: bool = False
    """Print the result as JSON."""


def run(options: Options) -> None:
    """Train, and print what was made."""
    kind = architecture(options.arch)
    if options.k is not None and not kind.uses_k:
        raise UserError(f"architecture {options.arch} has no k; leave out --k")
    given = check_options(kind.Options, read_options(options.set), options.arch)
    values = {name: value for name, value in plain(given).items() if value != plain(kind.Options())[name]}
    config = TrainConfig(
        **asdict(options.config),
        architecture=options.arch,
        d_sae=options.width,
        k=TrainConfig.k if options.k is None else options.k,
        options=values,
    )
    config.check()
    stores = [ActivationStore(folder) for folder in options.activations]
    with logging_to(options.log_to) as on_log, shown("train", "steps") as progress:
        train(
            stores,
            options.site,
            config,
            options.out,
            target_site=options.target_site,
            command=_command(options),
            progress=progress,
            on_log=on_log,
        )
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
    words = ["unbraid", "train", "--activations", *map(str, options.activations), "--arch", options.arch]
    if options.k is not None:
        words += ["--k", str(options.k)]
    words += ["--width", str(options.width), "--out", str(options.out)]
    for name in ("site", "target_site", "set"):
        if given := getattr(options, name):
            words += [f"--{name.replace('_', '-')}", *given]
    default = TrainOptions()
    for option in fields(TrainOptions):
        value = getattr(options.config, option.name)
        if value != getattr(default, option.name):
            words += [f"--{option.name.replace('_', '-')}", str(value)]
    return shlex.join(words)
