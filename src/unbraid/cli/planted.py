"""`unbraid practice planted` and `judge`: a world whose features are known, and how much of it was found."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from unbraid.cli.progress import shown
from unbraid.cli.saes import this_command
from unbraid.cli.tables import side_by_side
from unbraid.evaluation.synthetic import PlantedConfig, read_world, write_world
from unbraid.evaluation.truth import DEFINITIONS, Verdict, judge
from unbraid.manifest.errors import UserError
from unbraid.manifest.record import MANIFEST, check_files
from unbraid.sae.base import SAE
from unbraid.sae.formats.detect import detect
from unbraid.stats.bootstrap import Interval

WIDEST_CELL = len("-0.000 ±0.000")


@dataclass(frozen=True)
class Planted:
    """Write a world of planted features, as activations to train on and as the truth to judge by."""

    out: Path
    """Folder to write into; it must not exist."""
    features: int = 1024
    """Features that are planted, the most frequent firing at 40 % of the samples and the rarest at 0.05 %."""
    d_in: int = 128
    """Dimensions of an activation."""
    samples: int = 1_000_000
    """Activations to write."""
    seed: int = 0
    """Seed of the world and its samples."""


@dataclass(frozen=True)
class Judge:
    """Hold autoencoders against the truth of the planted world that they were trained on."""

    world: Path
    """Folder that `practice planted` wrote."""
    sae: tuple[Path, ...]
    """Folders of autoencoders; several are seeds of one setting."""
    samples: int = 32_768
    """Fresh samples to judge on."""
    json: bool = False
    """Print everything as JSON instead of a table."""


def plant(options: Planted) -> None:
    """Write a world, and say how to go on."""
    config = PlantedConfig(features=options.features, d_in=options.d_in, seed=options.seed)
    with shown("practice planted", "samples") as progress:
        store = write_world(
            config, options.out, options.samples, command=this_command(), progress=progress
        )  # fmt: skip
    active = store.manifest.facts["active"]
    print(f"{options.out}: {options.features:,} features, {active:.1f} of them fire at a sample")
    print(
        f"go on with: unbraid train --activations {options.out} --arch topk --k {max(1, round(active))} "
        f"--width {max(1, options.features // 4)} --out SAE"
    )


def weigh(options: Judge) -> None:
    """Judge, and print the table."""
    if not options.sae:
        raise UserError("--sae names no autoencoder; give one or more folders")
    if options.samples < 1:
        raise UserError(f"--samples is {options.samples}; give 1 or more")
    world, identity = read_world(options.world)
    saes = {str(folder): _open(folder, options.world, identity) for folder in options.sae}
    with shown("practice judge", "rows") as progress:
        verdict = judge(saes, world, samples=options.samples, progress=progress)
    if options.json:
        record = {"world": str(options.world), "world_id": identity, **verdict.as_dict()}
        print(json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        _show(verdict, options.world)


def _open(folder: Path, world: Path, identity: str) -> SAE:
    source = detect(folder)
    if (source.weights.parent / MANIFEST).is_file():
        check_files(source.weights.parent)
    sae = source.load()
    if sae.config.model_id and sae.config.model_id != identity:
        raise UserError(
            f"the SAE in {folder} was trained on {sae.config.model_id[:12]}…, not on the world in {world}, "
            f"{identity[:12]}…; name the world that it was trained on"
        )
    return sae.requires_grad_(False)


def _show(verdict: Verdict, world: Path) -> None:
    judged = [row for row in verdict.rows if row.kind == "judged"]
    rows = [row for row in verdict.rows if row.kind != "judged" or row is judged[-1]]
    names = ["autoencoder" if row is judged[0] else row.name for row in rows]
    print(
        f"{world}: {verdict.active:.1f} features fire at a sample; judged on {verdict.samples:,} fresh ones"
    )
    console = Console()
    for metrics in side_by_side(tuple(DEFINITIONS), console.width, names, WIDEST_CELL):
        table = Table("", *metrics)
        for name, row in zip(names, rows, strict=True):
            table.add_row(escape(name), *(_cell(row.metrics.get(metric)) for metric in metrics))
        console.print(table)
    for name, definition in DEFINITIONS.items():
        print(f"{name}: {definition.meaning}")
    print("±: 95 % interval of a mean over seeds, Student's; --json has every autoencoder by itself")


def _cell(found: Interval | None) -> str:
    """A value, and half of its interval where it is a mean over seeds."""
    if found is None:
        return "–"
    return f"{found.value:.3f}" + (f" ±{(found.high - found.low) / 2:.3f}" if found.n > 1 else "")
