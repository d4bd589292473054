"""`unbraid demo`: the whole story, from activations to a proven guard, on the practice assistant or on your
model.
"""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from unbraid.cli.models import open_model
from unbraid.cli.progress import shown
from unbraid.manifest.errors import UserError
from unbraid.recipes.audit import run_audit
from unbraid.recipes.demo import practice_prompts
from unbraid.recipes.prompts import from_files
from unbraid.recipes.workshop import AuditConfig


@dataclass(frozen=True)
class Options:
    """Which model, which prompts, and where the result goes."""

    model: str = "practice"
    """A Hugging Face model folder, or "practice" for the embedded practice assistant."""
    probes: Path | None = None
    """JSON Lines of red-team prompts with judging patterns; needed for any model but "practice"."""
    benign: Path | None = None
    """JSON Lines of harmless prompts with judging patterns; needed together with --probes."""
    out: Path = Path("demo")
    """Folder of the audit; run again with the same options it goes on where it stopped."""
    config: AuditConfig = field(default_factory=AuditConfig)
    """Layers, autoencoders, doses and limits."""
    json: bool = False
    """Print summary.json instead of the table."""


def run(options: Options) -> None:
    """Carry out the audit and show its outcome."""
    if (options.probes is None) != (options.benign is None):
        raise UserError("--probes and --benign belong together; give both")
    if options.probes is not None and options.benign is not None:
        source, origin = (
            from_files(options.probes, options.benign),
            f"{options.probes.name}, {options.benign.name}",
        )
    elif options.model == "practice":
        source, origin = practice_prompts(options.config.seed), "practice"
    else:
        raise UserError(f"--model {options.model} needs prompts; give --probes FILE and --benign FILE")
    command = shlex.join(["unbraid", *sys.argv[1:]])
    summary = run_audit(
        open_model(options.model),
        source,
        options.out,
        options.config,
        origin=origin,
        command=command,
        stage=shown,
    )
    if options.json:
        print(json.dumps(summary, indent=2, ensure_ascii=False))
    else:
        _show(summary, options.out)


def _show(summary: dict[str, Any], out: Path) -> None:
    def rate(interval: dict[str, Any] | None) -> str:
        return (
            ""
            if interval is None
            else f"{interval['value']:.1%} ({interval['low']:.1%} to {interval['high']:.1%})"
        )

    table = Table(
        "on held-out test prompts, 95 % intervals", "incidents", "header kept", "helpful", "false refusals"
    )
    names = ("incidents", "header_kept", "helpfulness", "false_refusals")
    contrast = summary["contrastive"]
    lines = [
        ("no guard", {n: summary[f"{n}_before"] for n in names}),
        ("policy", {n: summary[f"{n}_after"] for n in names}),
        *(("best latent zeroed", c) for c in summary["zero_best_latent"]),
        ("contrastive, subtracted", contrast["subtracted"]),
        ("contrastive, clipped", contrast["clipped"]),
        *((f"random latents {i}", c) for i, c in enumerate(summary["random_latents"], 1)),
        *((f"random direction {i}", c) for i, c in enumerate(summary["random_direction"], 1)),
        ("keyword guardrail", summary["keyword_guardrail"]),
    ]
    for label, condition in lines:
        table.add_row(label, *(rate(condition[n]) for n in names), style="bold" if label == "policy" else "")
    console = Console()
    console.print(table)
    latent, sae = summary["latent"], summary["sae"]
    console.print(
        f"latent {latent['index']} at {latent['site']}: AUROC {latent['auroc']['value']:.3f} before the "
        f"texts differ (best linear read-out {latent['linear_readout_auroc']['value']:.3f}); "
        f"SAE: FVU {sae['fvu']['value']:.3f}, L0 {sae['l0']['value']:.1f}, dead {sae['dead']['value']:.1%}"
    )
    console.print(
        f"report: {out / 'report.html'}   policy: {out / 'policy.yaml'}   check: unbraid verify {out}"
    )
