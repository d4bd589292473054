"""`unbraid practice`: the practice assistant, its card, conversations and concepts, superposition, planted
features."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table

from unbraid.cli.planted import Judge, Planted, plant, weigh
from unbraid.cli.planted_labels import PlantedLabels, rank_descriptions
from unbraid.cli.progress import shown
from unbraid.manifest.errors import IntegrityError, UserError
from unbraid.manifest.files import building, require_new, write_json, write_text
from unbraid.manifest.record import write_manifest
from unbraid.practice.assistant import AssistantConfig, folder, train
from unbraid.practice.card import TrainingRun, save_assistant, use_threads, verify_claims
from unbraid.practice.claims import Claim
from unbraid.practice.corpus import conversations
from unbraid.stats.bootstrap import Interval


@dataclass(frozen=True)
class Train:
    """Train a practice assistant from scratch, measure its claims and write its card."""

    out: Path
    """Folder to write the model into; it must not exist."""
    config: AssistantConfig = field(default_factory=AssistantConfig)
    """Size and training."""
    threads: int = 0
    """Processor threads, 0 for torch's own choice."""
    probes: int = 1200
    """Medical-advice probes behind the claims of the card."""


@dataclass(frozen=True)
class Verify:
    """Measure every claim of a practice assistant's card again; exit code 1 when one does not hold."""

    model: Path | None = None
    """Folder of the model; the shipped assistant when left out."""
    seed: int = 1000
    """Seed of the held-out prompts and of the sampling."""
    probes: int = 1200
    """Medical-advice probes."""
    json: bool = False
    """Print the claims as JSON instead of a table."""


@dataclass(frozen=True)
class Write:
    """Write conversations of one split with everything that is true of them, as JSON Lines."""

    out: Path
    """File to write; it must not exist."""
    kind: Literal["probes", "conversations"] = "probes"
    """Prompts with judging patterns for `validate` and `demo`, or whole conversations with labelled spans."""
    topic: str = "medical advice"
    """Topic, or "benign" for all harmless ones."""
    split: Literal["train", "fit", "select", "test"] = "fit"
    """Split to draw from."""
    count: int = 500
    """How many."""
    seed: int = 0
    """Seed of the conversations."""


@dataclass(frozen=True)
class Superposition:
    """Train NumPy autoencoders on planted features, and toy models; show what is recovered."""

    out: Path = Path("superposition")
    """Folder to write superposition.html and its numbers into; it must not exist."""
    seed: int = 0
    """First seed of the directions, the samples and the starts."""
    seeds: int = 3
    """How many seeds every autoencoder is trained with."""
    steps: int = 1000
    """Training steps of an autoencoder, 256 samples each."""


@dataclass(frozen=True)
class Concepts:
    """Say of every planted concept whether an autoencoder has a latent for it, beside an untrained one."""

    sae: Path
    """Folder of an autoencoder that was trained on the practice assistant."""
    conversations: int = 800
    """How many conversations are read, half of them medical-advice probes."""
    seed: int = 0
    """Seed of the conversations, the splits, the baselines and the intervals."""
    json: bool = False
    """Print the result as JSON instead of tables."""


Options = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Write, tyro.conf.subcommand("write")]
    | Annotated[Superposition, tyro.conf.subcommand("superposition")]
    | Annotated[Concepts, tyro.conf.subcommand("concepts")]
    | Annotated[Planted, tyro.conf.subcommand("planted")]
    | Annotated[Judge, tyro.conf.subcommand("judge")]
    | Annotated[PlantedLabels, tyro.conf.subcommand("labels")]
)


def run(
    options: Train | Verify | Write | Superposition | Concepts | Planted | Judge | PlantedLabels,
) -> None:
    """Carry out one of the verbs of `unbraid practice`."""
    if isinstance(options, Train):
        _train(options)
    elif isinstance(options, Verify):
        _verify(options)
    elif isinstance(options, Write):
        _write(options)
    elif isinstance(options, Concepts):
        _concepts(options)
    elif isinstance(options, Superposition):
        _superposition(options)
    elif isinstance(options, Planted):
        plant(options)
    elif isinstance(options, PlantedLabels):
        rank_descriptions(options)
    else:
        weigh(options)


def _train(options: Train) -> None:
    require_new(options.out)
    threads = use_threads(options.threads)
    started, last = time.monotonic(), [0.0]
    with shown("practice train", "steps") as progress:

        def watch(done: int, total: int, note: str = "") -> None:
            last[0] = float(note.split()[0])
            progress(done, total, note)

        model, tokenizer = train(options.config, progress=watch)
    run = TrainingRun(options.config, round(time.monotonic() - started, 1), last[0], threads)
    command = shlex.join(["unbraid", *sys.argv[1:]])
    claims = save_assistant(model, tokenizer, run, options.out, command=command, probes=options.probes)
    _show(claims)
    _require(claims, options.out)


def _verify(options: Verify) -> None:
    where = options.model or folder()
    with shown("practice verify", "replies") as progress:
        claims = verify_claims(where, seed=options.seed, probes=options.probes, progress=progress)
    if options.json:
        print(json.dumps([c.as_dict() for c in claims], indent=2))
    else:
        _show(claims)
    _require(claims, where)


def _write(options: Write) -> None:
    require_new(options.out)
    from unbraid.practice.topics import TOPICS

    topics = ("medical advice", *TOPICS, "benign")
    if options.topic not in topics:
        raise UserError(f"there is no topic {options.topic!r}; choose one of {', '.join(topics)}")
    topic = "" if options.topic == "benign" else options.topic
    source = islice(conversations(options.split, seed=options.seed, topic=topic), options.count)
    records = (c.probe() if options.kind == "probes" else c.record() for c in source)
    write_text(options.out, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))


def _superposition(options: Superposition) -> None:
    for name, value in (("seeds", options.seeds), ("steps", options.steps)):
        if value < 1:
            raise UserError(f"--{name} is {value}; give 1 or more")
    from unbraid.recipes.superposition import recover_all, render, spread, summary, toy_models

    command = shlex.join(["unbraid", *sys.argv[1:]])
    with building(options.out) as partial:
        seeds = range(options.seed, options.seed + options.seeds)
        with shown("practice superposition", "autoencoders") as progress:
            recoveries = recover_all(seeds, steps=options.steps, progress=progress)
        toys = toy_models(options.seed)
        facts = summary(recoveries, toys)
        write_text(partial / "superposition.html", render(recoveries, toys, command))
        write_json(partial / "summary.json", facts)
        write_manifest(partial, kind="superposition", command=command, seed=options.seed, inputs={}, facts={})
    table = Table("true L0", "method", "cosine", "above 0.9", "L0", "FVU")
    for row in spread(recoveries):
        table.add_row(
            f"{row['true_l0']['mean']:.2f}", row["method"],
            *(_ranged(row[column]) for column in ("cosine", "found", "l0", "fvu")),
            end_section=row["method"] == "random rows",
        )  # fmt: skip
    Console().print(table)
    print(f"±: half the range over {options.seeds} seeds; page: {options.out / 'superposition.html'}")


def _concepts(options: Concepts) -> None:
    if options.conversations < 1:
        raise UserError("--conversations must be 1 or more")
    from unbraid.cli.models import PRACTICE, open_model
    from unbraid.cli.saes import open_sae
    from unbraid.recipes.concepts import RANDOM, UNTRAINED, practice_concepts

    lm = open_model(PRACTICE)
    sae, identity = open_sae(options.sae, lm)
    with shown("practice concepts", "documents") as progress:
        result, found = practice_concepts(
            sae, lm, conversations=options.conversations, seed=options.seed, progress=progress
        )
    if options.json:
        record = {"sae": str(options.sae), "sae_id": identity, "seed": options.seed, **result.as_dict()}
        print(json.dumps(record, indent=2, ensure_ascii=False))
        return
    title = f"{options.sae}: planted concepts in {options.conversations} conversations"
    table = Table(
        "concept", "latent", "purity", "completeness", "AUROC", "latents", "absorbed", "p", UNTRAINED, RANDOM,
        title=title, title_justify="left",
    )  # fmt: skip
    for row, *floors in zip(found["sae"], found[UNTRAINED], found[RANDOM], strict=True):
        m = row.metrics
        table.add_row(
            row.concept, str(row.latent), *(_between(m.get(n)) for n in ("purity", "completeness", "auroc")),
            str(len(row.joined)), _between(m.get("absorbed")),
            "–" if row.p_value is None else f"{row.p_value:.3f}",
            *("/".join(_share(floor.metrics.get(n)) for n in ("purity", "completeness")) for floor in floors),
        )  # fmt: skip
    Console().print(table)
    print("of the floors: purity/completeness")
    names = sorted({name for row in result.rows.values() for name in row})
    means = Table("mean over concepts", *names)
    for name, row in result.rows.items():
        means.add_row(name, *(_between(row.get(metric)) for metric in names))
    Console().print(means)
    for note in result.notes:
        print(note)


def _share(value: Interval | None) -> str:
    return "–" if value is None else f"{value.value:.2f}"


def _between(value: Interval | None) -> str:
    """A value and its interval, or a dash where there was nothing to measure."""
    return "–" if value is None else f"{value.value:.2f} ({value.low:.2f} to {value.high:.2f})"


def _ranged(value: dict[str, float] | None) -> str:
    """A mean and half the range."""
    return "–" if value is None else f"{value['mean']:.2f} ±{(value['high'] - value['low']) / 2:.2f}"


def _show(claims: Sequence[Claim]) -> None:
    table = Table("claim", "it …", "measured", "95 % interval", "n", "bounds", "")
    for c in claims:
        m = c.measured
        table.add_row(
            c.name,
            c.statement,
            f"{m.value:.3f}",
            f"{m.low:.3f} to {m.high:.3f}",
            str(m.n),
            f"{c.low:g} to {c.high:g}",
            "[green]holds[/]" if c.holds else "[red]fails[/]",
        )
    Console().print(table)


def _require(claims: Sequence[Claim], where: Path) -> None:
    """IntegrityError for the first claim that does not hold."""
    for claim in claims:
        if not claim.holds:
            raise IntegrityError(
                f"{where}: the claim {claim.name} does not hold: measured {claim.measured.value:.3f}, "
                f"claimed {claim.low:g} to {claim.high:g}"
            )
