"""`unbraid structure`: kinds of latents, clusters, opposites, a map, and what a wider SAE splits."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from unbraid.cli.saes import sae_of, this_command
from unbraid.features.page import Index
from unbraid.features.structure import Structure, StructureConfig, Wider, build_structure
from unbraid.manifest.identity import sha256_file
from unbraid.manifest.record import MANIFEST, check_files
from unbraid.sae.formats.detect import detect


@dataclass(frozen=True)
class Options:
    """Which index, and where to put its structure."""

    index: Path
    """The index."""
    out: Path
    """Folder to make."""
    sae: Path | None = None
    """Folder of the SAE, where it is not where the index says."""
    wider: Path | None = None
    """Folder of a wider SAE of the same site, in which latents may have been split."""
    wider_index: Path | None = None
    """An index of a wider SAE over the same text, whose latents that fire almost only where one of this index
    does are its parts."""
    config: Annotated[StructureConfig, tyro.conf.arg(name="")] = field(default_factory=StructureConfig)
    """What counts as what."""
    json: bool = False
    """Print the result as JSON."""


def run(options: Options) -> None:
    """Build the structure and print what there is."""
    index = Index(options.index)
    sae, _ = sae_of(index, options.sae)
    wider = None
    if options.wider is not None:
        source = detect(options.wider)
        place = source.weights.parent
        identity = check_files(place).id if (place / MANIFEST).is_file() else sha256_file(source.weights)
        wider = Wider(source.load(), identity)
    made = build_structure(
        index,
        sae,
        options.out,
        options.config,
        wider=wider,
        wider_index=None if options.wider_index is None else Index(options.wider_index),
        command=this_command(),
    )
    facts = made.manifest.facts
    if options.json:
        print(json.dumps({"id": made.manifest.id, **facts}, indent=2, allow_nan=False))
        return
    show(made, Console())


def show(made: Structure, console: Console) -> None:
    """Print how many latents are of each kind, and how many clusters and pairs there are."""
    facts = made.manifest.facts
    table = Table("what", "how many", title=f"{facts['d_sae']:,} latents; map by {facts['map']}")
    for kind, count in facts["kinds"].items():
        table.add_row(kind, f"{count:,}")
    levels = [row["level"] for row in made.table("clusters").to_pylist()]
    for level, least in enumerate(facts["config"]["levels"]):
        table.add_row(f"clusters, Jaccard {least}", f"{levels.count(level):,}")
    pairs = facts["antonyms"]
    table.add_row("antonyms", "not searched, too wide" if pairs is None else f"{pairs:,}")
    if "wider" in made.manifest.inputs:
        table.add_row("parts in the wider SAE", f"{made.table('children').num_rows:,}")
    if (firing := facts["contained"]) is not None:
        table.add_row("parts in the wider index, by firing", f"{firing['parts']:,}")
        table.add_row("latents with two parts or more there", f"{firing['split']:,}")
    console.print(table)
