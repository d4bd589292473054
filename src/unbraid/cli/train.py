"""`unbraid train`: an autoencoder from captured activations, or straight from the model."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from unbraid.activations.documents import read_documents
from unbraid.activations.follow import Following
from unbraid.activations.inorder import BUFFER_TOKENS
from unbraid.activations.live import Live
from unbraid.activations.reading import CaptureConfig, ReadOptions
from unbraid.activations.store import ActivationStore
from unbraid.cli.models import open_model
from unbraid.cli.progress import shown
from unbraid.cli.sinks import Tool, logging_to
from unbraid.manifest.errors import UserError
from unbraid.manifest.record import read_manifest
from unbraid.model.sites import Site
from unbraid.sae.options import check_options, plain, read_options
from unbraid.sae.registry import architecture
from unbraid.training.config import TrainConfig, TrainOptions
from unbraid.training.sources import Activations
from unbraid.training.trainer import train


@dataclass(frozen=True)
class Options:
    """What to train on, what to train, and where to put it."""

    out: Path
    """Folder to make; a run that was killed goes on from its last checkpoint."""
    activations: tuple[str, ...] = ()
    """Folder or URL that `unbraid capture` or `unbraid import` made; several of the same text for a
    crosscoder of several models. What is read from a URL is kept in UNBRAID_CACHE (~/.cache/unbraid), up to
    UNBRAID_CACHE_SIZE (20GB)."""
    follow: bool = False
    """Read the activations in the order of capture, shuffled within a buffer, and wait for what is not there
    yet: the capture may still run. The autoencoder is finished when the capture is."""
    model: str = ""
    """In place of --activations: a model, read at --site as training goes on, in the order of capture; no
    activations are written to disk."""
    text: Path | None = None
    """The corpus for --model, as `unbraid capture` takes it; read again when it is used up."""
    read: Annotated[ReadOptions, tyro.conf.arg(name="")] = field(default_factory=ReadOptions)
    """How to read --model."""
    model_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What --model computes in; bfloat16 is fast where the processor or GPU has units for it, else slow."""
    buffer_tokens: int | None = None
    """Tokens held in memory and shuffled by --follow and --model; 131,072 if left out."""
    arch: str = "topk"
    """Architecture: topk, batchtopk, matryoshka, relu, jumprelu, matryoshka_jumprelu, gated,
    matching_pursuit, lista, transcoder, skip_transcoder, jumprelu_transcoder, jumprelu_skip_transcoder,
    topk_transcoder, topk_skip_transcoder, crosscoder or clt."""
    k: int | None = None
    """Latents that fire at a token, or do on average, for the architectures that fix this; 32 if left out."""
    width: int = 8192
    """Number of latents."""
    site: tuple[str, ...] = ()
    """Which of the captured sites; may be left out when there is one. Several for a crosscoder or clt. Which
    to read of --model."""
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
    stores = _activations(options)
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
    model = facts["model"] or "an unknown model"
    print(
        f"{options.out}: {options.arch} of width {options.width:,} on {facts['site']} of {model}, "
        f"{facts['tokens']:,} tokens; fvu {facts['fvu_last']:.4f}, l0 {facts['l0']:.1f}, "
        f"dead {facts['dead']:.2%} of the latents over {facts['measured_on_tokens']:,} tokens"
    )


def _activations(options: Options) -> list[Activations]:
    """What to train on. Raises UserError for options that do not go together."""
    live = options.model != ""
    buffer = BUFFER_TOKENS if options.buffer_tokens is None else options.buffer_tokens
    if live == bool(options.activations):
        raise UserError("give either --activations, or --model with --text and --site")
    given = [f"--{name.replace('_', '-')}" for name in _changed(options.read)]
    given += ["--text"] * (options.text is not None)
    given += ["--model-dtype"] * (options.model_dtype != "float32")
    if given and not live:
        raise UserError(f"{', '.join(given)} say how to read a --model; leave them out with --activations")
    if options.buffer_tokens is not None and not (live or options.follow):
        raise UserError("--buffer-tokens belongs to --follow and --model; add one of them or leave it out")
    if options.follow and (live or len(options.activations) > 1):
        raise UserError("--follow reads one folder of --activations; give one, or leave --follow out")
    if options.follow:
        return [Following(folder, buffer_tokens=buffer, say=_say) for folder in options.activations]
    if not live:
        return [ActivationStore(folder) for folder in options.activations]
    text = options.text
    if text is None or not options.site:
        raise UserError("--model needs --text and --site as well")
    sites = dict.fromkeys(map(Site.parse, (*options.site, *options.target_site)))
    config = CaptureConfig(**asdict(options.read), sites=tuple(sites))
    next(read_documents(text))  # a wrong file is told before a large model is loaded
    lm = open_model(options.model, device=options.config.device, dtype=options.model_dtype)
    seed = options.config.seed
    return [Live(lm, lambda: read_documents(text), config, buffer_tokens=buffer, seed=seed)]


def _say(what: str) -> None:
    print(f"train: {what}", file=sys.stderr, flush=True)


def _changed(options: ReadOptions | TrainOptions) -> dict[str, Any]:
    """The options that are not at their defaults."""
    default = type(options)()
    values = {option.name: getattr(options, option.name) for option in fields(options)}
    return {name: value for name, value in values.items() if value != getattr(default, name)}


def _command(options: Options) -> str:
    words = ["unbraid", "train"]
    if options.model:
        words += ["--model", options.model, "--text", str(options.text)]
        if options.model_dtype != "float32":
            words += ["--model-dtype", options.model_dtype]
    else:
        words += ["--activations", *map(str, options.activations), *(["--follow"] if options.follow else [])]
    if options.buffer_tokens is not None:
        words += ["--buffer-tokens", str(options.buffer_tokens)]
    words += ["--arch", options.arch]
    if options.k is not None:
        words += ["--k", str(options.k)]
    words += ["--width", str(options.width), "--out", str(options.out)]
    for name in ("site", "target_site", "set"):
        if given := getattr(options, name):
            words += [f"--{name.replace('_', '-')}", *given]
    for name, value in (_changed(options.read) | _changed(options.config)).items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return shlex.join(words)
