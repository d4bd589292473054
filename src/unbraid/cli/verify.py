"""`unbraid verify DIR`: does everything below a folder still fit its manifest and what it was made from?"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from unbraid.cli.progress import shown
from unbraid.manifest.errors import IntegrityError
from unbraid.manifest.lineage import LineageReport, verify
from unbraid.manifest.remote import is_url


@dataclass(frozen=True)
class Options:
    """What to verify and how to say it."""

    dir: tyro.conf.Positional[str]
    """Folder that holds artifacts, or is one; or the URL of one."""
    json: bool = False
    """Print the report as JSON instead of a table."""


def run(options: Options) -> None:
    """Print what lies below a folder; IntegrityError naming the first file that does not fit."""
    with shown("verify", "artifacts") as progress:
        report = verify(options.dir if is_url(options.dir) else Path(options.dir), progress=progress)
    if options.json:
        print(json.dumps(report.as_dict(), indent=2, ensure_ascii=False))
    else:
        _print(report)
    if report.problems:
        others = len(report.problems) - 1
        more = f" (and {others} more)" if others else ""
        raise IntegrityError(report.problems[0] + more)


def _print(report: LineageReport) -> None:
    table = Table("artifact", "kind", "id", "")
    for artifact in report.artifacts:
        fits = "[green]fits[/]" if artifact.problem is None else "[red]does not fit[/]"
        table.add_row(artifact.path, artifact.kind, artifact.id[:12], fits)
    for name, identity in sorted(report.external.items()):
        table.add_row(name, "external", identity[:12], "[dim]not here[/]", style="dim")
    Console().print(table)
