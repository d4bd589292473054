"""`unbraid sweep`: many autoencoders on one capture, compared on held-out text."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from unbraid.activations.documents import read_documents
from unbraid.activations.follow import Following
from unbraid.activations.inorder import BUFFER_TOKENS
from unbraid.activations.store import ActivationStore
from unbraid.cli.models import open_model
from unbraid.cli.progress import shown
from unbraid.cli.saes import this_command
from unbraid.cli.sinks import Tool, logging_to
from unbraid.manifest.errors import UserError
from unbraid.recipes.sweep import Text, run_sweep
from unbraid.training.config import LoopOptions
from unbraid.training.grid import Grid


@dataclass(frozen=True)
class Options:
    """What to train on, what to compare, and on which text."""

    activations: str
    """Folder or URL that `unbraid capture` made."""
    model: str
    """The model that was captured, to measure on: folder or Hub name; "practice" is the practice assistant.
    """
    text: Path
    """Held-out corpus to measure on: .jsonl or .parquet with text or messages, .txt with documents between
    blank lines, or a Hugging Face dataset as hf:owner/name[:split]; #field names another field."""
    out: Path
    """Folder to make; a sweep that was killed goes on where it stopped."""
    follow: bool = False
    """Read the activations in the order of capture, shuffled within a buffer, and wait for what is not there
    yet: the capture may still run. Measuring begins when it has ended."""
    buffer_tokens: int | None = None
    """Tokens held in memory and shuffled by --follow; 131,072 if left out."""
    tokens: int = 20_000
    """Tokens to measure on."""
    context: int = 256
    """Tokens the model reads at once."""
    grid: Annotated[Grid, tyro.conf.arg(name="")] = field(default_factory=Grid)
    """What to combine."""
    config: Annotated[LoopOptions, tyro.conf.arg(name="")] = field(default_factory=LoopOptions)
    """How to train."""
    log_to: tuple[Tool, ...] = ()
    """Also log to trackio, wandb or tensorboard, where installed; log.jsonl is written always."""
    json: bool = False
    """Print the numbers as JSON."""


def run(options: Options) -> None:
    """Sweep, and print the table."""
    next(read_documents(options.text))  # a wrong file is told before a capture is waited for, or a model read
    store = _activations(options)
    lm = open_model(options.model, device=options.config.device)
    text = Text(lambda: read_documents(options.text), options.text.name, options.tokens, options.context)
    with logging_to(options.log_to) as on_log:
        found = run_sweep(
            store, lm, text, options.grid, options.config, options.out, command=this_command(), stage=shown,
            on_log=on_log,
        )  # fmt: skip
    if options.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        _show(found, options.out)


def _activations(options: Options) -> ActivationStore | Following:
    if options.follow:
        buffer = BUFFER_TOKENS if options.buffer_tokens is None else options.buffer_tokens
        return Following(options.activations, buffer_tokens=buffer, say=_say)
    if options.buffer_tokens is not None:
        raise UserError("--buffer-tokens belongs to --follow; add it or leave it out")
    return ActivationStore(options.activations)


def _say(what: str) -> None:
    print(f"sweep: {what}", file=sys.stderr, flush=True)


def _show(found: Mapping[str, Any], out: Path) -> None:
    title = f"{found['tokens']:,} held-out tokens; 95 % intervals; * where no other is better in both"
    table = Table(title=title, title_justify="left")
    table.add_column("autoencoder", overflow="fold")  # a long name gives way, no number does
    for column in ("seeds", "l0", "fvu", "delta_ce", "dead"):
        interval = column in ("fvu", "delta_ce")
        table.add_column(column, no_wrap=not interval, min_width=len("(0.0123 to") if interval else None)

    def between(point: Mapping[str, Any], name: str) -> str:
        m = point["metrics"][name]
        return f"{m['value']:.3g}{'*' * point[f'front_{name}']} ({m['low']:.3g} to {m['high']:.3g})"

    for point in found["points"]:
        l0, dead = (point["metrics"][name]["value"] for name in ("l0", "dead"))
        table.add_row(
            point["point"], str(point["seeds"]), f"{l0:.1f}", between(point, "fvu"),
            between(point, "delta_ce"), f"{dead:.1%}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(f"report: {out / 'report.html'}   numbers: {out / 'sweep.json'}")
