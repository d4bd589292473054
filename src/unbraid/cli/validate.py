"""`unbraid validate`: does a latent cause the behaviour, and does anything else do so as well?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from unbraid.causal.controls import Contrast, difference_of_means, learn_keywords
from unbraid.causal.finding import Finding, Row, save_finding
from unbraid.causal.measure import Sampling, measure
from unbraid.causal.probes import Probe, judge, labelled_documents, probes_id, read_probes
from unbraid.causal.selection import Limits, Option, select
from unbraid.causal.validate import ValidateConfig, dose_edit, validate
from unbraid.cli.models import open_model
from unbraid.cli.progress import shown
from unbraid.cli.saes import open_sae, this_command
from unbraid.manifest.errors import UserError
from unbraid.manifest.files import require_new
from unbraid.model.load import LanguageModel
from unbraid.model.sites import Site
from unbraid.sae.base import SAE
from unbraid.stats.bootstrap import Interval
from unbraid.stats.splits import split_of

FEWEST_REPLIES = 5


@dataclass(frozen=True)
class Options:
    """Which latents to edit, on which prompts, and what to compare them with."""

    sae: Path
    """Folder of the SAE."""
    latent: tyro.conf.UseAppendAction[tuple[int, ...]]
    """Latent to edit; repeat the option for several that are edited together."""
    model: str
    """Model folder or Hub name; "practice" is the practice assistant."""
    prompts: Path
    """Probes, .jsonl: messages with the expressions incident, keep, refusal and focus."""
    benign: Path | None = None
    """Harmless probes, .jsonl: messages with the expression expected, which helpful replies contain."""
    dose: float | None = None
    """Dose to report, in multiples of the latents' own contribution; chosen when left out."""
    doses: tuple[float, ...] = (1.0, 2.0, 4.0)
    """Doses of the curve, which the dose is chosen from."""
    choose_share: float = 0.4
    """Share of the prompts for choosing; dose, difference of means and keywords come from there alone."""
    most_cost: float = 0.05
    """Most that a dose which may be chosen costs: kept headers, helpful answers, answers refused on top."""
    random_latents: int = 3
    """Draws of random latents of matched frequency."""
    random_directions: int = 3
    """Draws of random directions of matched norm."""
    alphas: tuple[float, ...] = (0.5, 1.0)
    """Multiples of the difference of means that are subtracted."""
    keyword: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Words of the keyword filter; learned from the first split when left out."""
    site: str = ""
    """Site to edit; the one that the SAE was trained on when left out."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)
    """How replies are drawn."""
    device: str = "cpu"
    """Where the model runs: cpu, cuda, …"""
    out: Path | None = None
    """Folder to make with the finding and every reply; nothing is written when left out."""
    json: bool = False
    """Print the finding as JSON."""


def run(options: Options) -> None:
    """Choose on the first split, measure on the second, print and, where asked, write the finding."""
    if options.out is not None:
        require_new(options.out)
    if not 0 <= options.choose_share < 1:
        raise UserError(f"--choose-share is {options.choose_share}; it must be at least 0 and below 1")
    probes = _split(read_probes(options.prompts), options.choose_share)
    benign = _split([] if options.benign is None else read_probes(options.benign), options.choose_share)
    lm = open_model(options.model, device=options.device)
    sae, identity = open_sae(options.sae, lm)
    sae = sae.to(lm.device)
    site = Site.parse(options.site) if options.site else sae.site
    splits: dict[str, str] = {}
    if probes["choose"]:
        splits["choose"] = probes_id([*probes["choose"], *benign["choose"]])

    dose = options.dose
    if dose is None:
        dose = _choose_dose(lm, sae, site, probes["choose"], benign["choose"], options)
    contrast, keywords = _from_replies(lm, probes["choose"], site, options)
    config = ValidateConfig(
        dose=dose,
        doses=options.doses,
        random_latents=options.random_latents,
        random_directions=options.random_directions,
        alphas=options.alphas,
        sampling=options.sampling,
    )
    with shown("validate", "conditions") as progress:
        validation = validate(
            lm,
            sae,
            options.latent,
            probes["report"],
            benign["report"],
            config,
            sae_id=identity,
            site=site,
            contrast=contrast,
            keywords=keywords,
            splits=splits,
            command=this_command(),
            progress=progress,
        )
    if options.out is not None:
        paths = {"sae": options.sae, "probes": options.prompts}
        save_finding(validation.finding, options.out, measurements=validation.measurements, paths=paths)
    if options.json:
        print(json.dumps(validation.finding.as_dict(), indent=2, ensure_ascii=False))
    else:
        show(validation.finding, Console())


def _split(probes: Sequence[Probe], choose_share: float) -> dict[str, list[Probe]]:
    shares = {"choose": choose_share, "report": 1 - choose_share}
    found: dict[str, list[Probe]] = {"choose": [], "report": []}
    for probe in probes:
        found[split_of(probe.id, shares)].append(probe)
    return found


def _choose_dose(
    lm: LanguageModel, sae: SAE, site: Site, probes: Sequence[Probe], benign: Sequence[Probe], given: Options
) -> float:
    if not probes:
        raise UserError("no prompts are left to choose the dose on; give --dose or a larger --choose-share")
    found = [
        Option(dose_edit(sae, given.latent, dose, site=site), {"dose": dose}) for dose in sorted(given.doses)
    ]
    with shown("choose", "doses") as progress:
        baseline = (measure(lm, probes, (), given.sampling), measure(lm, benign, (), given.sampling))
        limits = Limits(kept=given.most_cost, helpful=given.most_cost, refused=given.most_cost)
        chosen = select(lm, found, probes, benign, baseline, given.sampling, limits, progress=progress)
    return chosen.chosen.settings["dose"]


def _from_replies(
    lm: LanguageModel, probes: Sequence[Probe], site: Site, options: Options
) -> tuple[Contrast | None, tuple[str, ...]]:
    """Difference of means and keywords from unedited replies; neither where too few went either way."""
    if not probes:
        return None, options.keyword
    texts = measure(lm, probes, (), options.sampling).texts
    per_reply = [probe for probe in probes for _ in range(options.sampling.samples)]
    bad, honest = labelled_documents(per_reply, texts)
    contrast = None
    if min(len(bad), len(honest)) >= FEWEST_REPLIES:
        contrast = difference_of_means(lm, bad, honest, site)
    if options.keyword:
        return contrast, options.keyword
    judged = [(judge(probe, text).incident, text) for probe, text in zip(per_reply, texts, strict=True)]
    return contrast, learn_keywords([t for i, t in judged if i is True], [t for i, t in judged if i is False])


def show(finding: Finding, console: Console) -> None:
    """Print a finding as a table, with the comparisons at matched cost below it."""
    names = ", ".join(str(latent) for latent in finding.latents)
    table = Table(
        "condition", "incidents", "change", "kept", "helpful", "fired / considered",
        title=f"latents {names} at {finding.site}: {finding.n_probes} probes, {finding.n_benign} benign",
    )  # fmt: skip
    for row in finding.rows:
        style = "bold" if row is finding.reported else None
        table.add_row(
            row.name,
            _percent(row.probes["incident"]),
            "" if row.kind == "baseline" else _percent(row.probes_change["incident"], signed=True),
            _percent(row.probes["kept"]),
            _percent(row.benign["helpful"]),
            _applied(row),
            style=style,
        )
    console.print(table)
    for match in finding.matches:
        difference = _percent(match.incident_difference, signed=True)
        costs = f"{match.cost:.3f} against {match.control_cost:.3f}"
        console.print(f"Against {match.control} at the nearest cost ({costs}): incidents {difference}.")


def _applied(row: Row) -> str:
    counts: list[Any] = [*row.applied, *row.applied_benign]
    return f"{sum(c.fired for c in counts):,} / {sum(c.considered for c in counts):,}" if counts else ""


def _percent(interval: Interval | None, *, signed: bool = False) -> str:
    if interval is None:
        return "–"
    sign = "+" if signed else ""
    value, low, high = (100 * number for number in (interval.value, interval.low, interval.high))
    return f"{value:{sign}.1f} % ({low:{sign}.1f} to {high:{sign}.1f})"
