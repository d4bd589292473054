"""`unbraid practice labels`: whether scorers prefer true descriptions where the truth is known."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from unbraid.cli.label import embedder_of
from unbraid.cli.progress import shown
from unbraid.cli.saes import open_sae
from unbraid.features.labels.calls import Calls
from unbraid.features.labels.contexts import ContextConfig
from unbraid.features.labels.endpoint import Endpoint, EndpointConfig
from unbraid.features.labels.llm import LLM
from unbraid.manifest.errors import UserError
from unbraid.recipes.labels import PURE, RANKING, TOGETHER, LabelReport, practice_labels
from unbraid.recipes.planted_search import FIRST
from unbraid.stats.bootstrap import Interval


@dataclass(frozen=True)
class PlantedLabels:
    """Rank the true description of every planted concept with a pure latent among twenty wrong ones."""

    sae: Path
    """Folder of an autoencoder that was trained on the practice assistant."""
    out: Path
    """Folder to make with the index of its latents."""
    conversations: int = 1000
    """How many conversations are read to find concepts, and how many others to index."""
    seed: int = 0
    """Seed of everything."""
    base_url: str = ""
    """Address of an OpenAI-compatible endpoint whose model labels the latents too."""
    model_name: str = ""
    """The language model's name there."""
    embedding_model: Path | None = None
    """Folder of a local embedding model for the embedding scorer, which is left out where there is none."""
    key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key."""
    json: bool = False
    """Print the result as JSON instead of tables."""


def rank_descriptions(options: PlantedLabels) -> None:
    """Rank, let explainers label, and print."""
    if options.conversations < 1 or options.seed < 0:
        raise UserError("--conversations must be 1 or more and --seed 0 or more")
    from unbraid.cli.models import PRACTICE, open_model

    lm = open_model(PRACTICE)
    sae, identity = open_sae(options.sae, lm)
    llms: list[LLM] = []
    if options.base_url or options.model_name:
        config = EndpointConfig(options.base_url, options.model_name, options.key_env)
        calls = Calls(options.out.parent / f"{options.out.name}.calls.sqlite")
        llms.append(LLM(Endpoint(config, calls)))
    with shown("practice labels", "documents") as progress:
        report = practice_labels(
            sae, lm, options.out, sae_id=identity, count=options.conversations, seed=options.seed, llms=llms,
            config=ContextConfig(seed=options.seed), embed=embedder_of(options.embedding_model),
            progress=progress,
        )  # fmt: skip
    if options.json:
        record = {"sae": str(options.sae), "sae_id": identity, "seed": options.seed, **report.as_dict()}
        print(json.dumps(record, indent=2, ensure_ascii=False))
    else:
        show(report, options.sae)
    for llm in llms:
        print(f"{llm.name}: {llm.endpoint.note()}; {llm.unread.twice} replies could not be read")


def show(report: LabelReport, sae: Path) -> None:
    """Print which concepts have a pure latent, how they are found, and how their descriptions fare."""
    print(
        f"{sae}: of {report.concepts} planted concepts {report.standing_out} have a latent that stands out,"
        f" {report.pure} of these a pure one ({PURE:g} or more of its firings are on the concept)"
    )
    names = list(report.first)
    console = Console()
    found = Table("concept", "latent", "purity", *report.ways)
    for one in report.rankings:
        cells = ["yes" if way.found[one.concept] else "–" for way in report.ways.values()]
        found.add_row(one.concept, str(one.latent), f"{one.purity:.2f}", *cells)
    console.print(found)
    print("by which way of searching each is found")
    # Two tables of scorers, for one would be wider than a terminal.
    for some in (names[:4], names[4:]):
        above = Table("concept", *some)
        for one in report.rankings:
            above.add_row(one.concept, *(f"{one.above[name]}/{one.wrong[name]}" for name in some))
        console.print(above)
    print("above how many of the wrong descriptions the true one is")
    for name, share in report.first.items():
        judge = f", judged by the {report.judge} judge" if name in (*RANKING, TOGETHER) else ""
        print(f"{name}: above all of them for {_of(share)}{judge}")
    for how, way in report.ways.items():
        guessed = "" if way.guessed is None else f"; of unrelated concepts' latents {way.guessed:.0%}"
        print(f"found by {how}, in the first {FIRST}: {_of(way.share)}{guessed}")
    for name, found in report.labellers.items():
        d = found["detection"]
        print(
            f"labels by {name}: detection {d['value']:.2f} ({d['low']:.2f} to {d['high']:.2f}) over"
            f" {found['latents']} latents, {found['labelled']} of them labelled"
        )
    for note in report.notes:
        print(note)


def _of(share: Interval) -> str:
    return (
        f"{round(share.value * share.n)} of {share.n} concepts, {share.value:.0%}"
        f" ({share.low:.0%} to {share.high:.0%})"
    )
