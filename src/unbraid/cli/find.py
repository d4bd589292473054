"""`unbraid find`: the latents that separate two sets of documents, or the news that none does."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from unbraid.activations.documents import read_documents
from unbraid.activations.text import require_tokenizer
from unbraid.cli.models import name_of, open_model
from unbraid.cli.progress import shown
from unbraid.cli.saes import folder_of, open_sae, this_command
from unbraid.features.find import FindConfig, FindResult, find
from unbraid.features.page import Index
from unbraid.features.scores import document_scores
from unbraid.manifest.errors import IntegrityError, UserError
from unbraid.manifest.files import building, write_json
from unbraid.manifest.record import write_manifest
from unbraid.model.sites import Site
from unbraid.stats.bootstrap import Interval


@dataclass(frozen=True)
class Options:
    """Which latents to search, and the two sets of documents."""

    positive: Path
    """Documents that show the behaviour: .jsonl with text or messages and optionally focus, or .txt."""
    negative: Path
    """Documents that do not."""
    index: Path | None = None
    """An index; it names the SAE and the model."""
    sae: Path | None = None
    """Folder of the SAE, instead of the index's."""
    model: str = ""
    """Model folder or Hub name, instead of the index's."""
    site: str = ""
    """Site to read; the index's or the SAE's own when left out."""
    positions: Literal["focus", "reply", "all"] = "focus"
    """Tokens that are read; focus means replies, or whole texts, where no document names a focus."""
    top: int = 10
    """At most this many latents are reported."""
    alpha: float = 0.05
    """Chance of reporting anything when the two sets do not differ."""
    permutations: int = 200
    """Permutations of the labels behind that chance."""
    seed: int = 0
    """Seed of permutations and intervals."""
    context: int = 256
    """Longer documents are read in windows of this many tokens."""
    device: str = "cpu"
    """Where the model runs: cpu, cuda, …"""
    out: Path | None = None
    """Folder to make with the result; nothing is written when left out."""
    json: bool = False
    """Print the result as JSON."""


def run(options: Options) -> None:
    """Search, print and, where asked, write the result."""
    config = FindConfig(
        alpha=options.alpha, top=options.top, permutations=options.permutations, seed=options.seed
    )
    positive, negative = list(read_documents(options.positive)), list(read_documents(options.negative))
    index = None if options.index is None else Index(options.index)
    sae_folder, model, site = _sources(options, index)
    lm = open_model(model, device=options.device)
    if index is not None:
        require_tokenizer(lm, index.manifest.inputs["tokenizer"], index.folder)
    sae, identity = open_sae(sae_folder, lm)
    if index is not None and options.sae is None and index.manifest.inputs["sae"] != identity:
        raise IntegrityError(
            f"{sae_folder} is not the SAE that {options.index} was made from; index it again"
        )
    sae = sae.to(lm.device)
    with shown("find", "documents") as progress:
        # Both sets in one pass, so that a focus in one set and none in the other is noticed.
        scores = document_scores(
            sae,
            lm,
            [*positive, *negative],
            Site.parse(site) if site else None,
            positions=options.positions,
            context=options.context,
            progress=progress,
        )
    n = len(positive)
    result = find(
        scores.latents[:n], scores.latents[n:], scores.ids, config, raw=(scores.raw[:n], scores.raw[n:])
    )
    if options.out is not None:
        inputs = {"sae": identity, "model": lm.id}
        if index is not None:
            inputs["index"] = index.manifest.id
        with building(options.out) as folder:
            write_json(folder / "result.json", result.as_dict())
            write_manifest(
                folder,
                kind="search",
                command=this_command(),
                seed=config.seed,
                inputs=inputs,
                facts={"documents": sorted(scores.ids), "positions": options.positions},
                paths={"sae": sae_folder, **({} if options.index is None else {"index": options.index})},
            )
    if options.json:
        print(json.dumps(result.as_dict(), indent=2))
    else:
        show(result, Console())


def _sources(options: Options, index: Index | None) -> tuple[Path, str, str]:
    """Folder of the SAE, name of the model and the site, from the options first and the index else."""
    if index is None:
        if options.sae is None or not options.model:
            raise UserError("say where to search: --index DIR, or --sae DIR with --model M")
        return options.sae, options.model, options.site
    site = options.site or str(index.manifest.facts["site"])
    return folder_of(index, options.sae), name_of(index, options.model), site


def show(result: FindResult, console: Console) -> None:
    """Print a result as a table, or say that there is none and how near the best latent came."""
    positive, negative = result.counts["report"]
    if not result.latents:
        ranked = result.counts["rank"]
        console.print(
            f"No latent separates the two sets: the best of {result.searched:,} reaches AUROC "
            f"{result.best_seen:.3f} where chance reaches {result.null_quantile:.3f} "
            f"(p = {result.p_anything:.3f}, {result.config['permutations']} permutations), on the "
            f"{ranked[0]} + {ranked[1]} documents that rank the latents."
        )
        return
    table = Table(
        "latent", "pole", "AUROC, held out", "Cohen's d", "hits", "false alarms", "threshold", "q", "p, best",
        title=f"{result.passed} of {result.searched:,} latents pass; held out: {positive} + {negative}",
    )  # fmt: skip
    for latent in result.latents:
        d = "∞" if latent.cohens_d is None else f"{latent.cohens_d:.2f}"
        table.add_row(
            str(latent.latent),
            "+" if latent.pole > 0 else "−",
            interval(latent.auroc) + ("" if latent.holds else "  [yellow]does not hold[/]"),
            d,
            f"{latent.hit_rate:.2f}",
            f"{latent.false_alarm_rate:.2f}",
            f"{latent.threshold:.3g}",
            f"{latent.q_value:.1e}",
            f"{latent.p_best_of_all:.3f}",
        )
    for readout in result.baselines:
        table.add_row("", "", interval(readout.auroc), "", "", "", "", "", readout.name, style="dim")
    console.print(table)
    if (smallest := result.minimum_detectable_difference) is not None:
        console.print(
            f"Differences of rates below {smallest:.2f} could not be seen with this many documents."
        )


def interval(value: Interval) -> str:
    """A number with its interval."""
    return f"{value.value:.3f} ({value.low:.3f} to {value.high:.3f})"
