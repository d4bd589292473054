"""`unbraid label`: what latents mean, proposed by words or by a language model, scored and reviewed."""

from __future__ import annotations

import getpass
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from unbraid.cli.progress import shown
from unbraid.cli.saes import both_of
from unbraid.features.embedding import open_embedder
from unbraid.features.exchange.neuronpedia import import_labels
from unbraid.features.labels.calls import Calls
from unbraid.features.labels.contexts import ContextConfig, Contexts
from unbraid.features.labels.embedding import Embed
from unbraid.features.labels.endpoint import Endpoint, EndpointConfig
from unbraid.features.labels.judges import Judge, LexicalJudge
from unbraid.features.labels.label import Label
from unbraid.features.labels.labelling import USUAL, Found, check_scorers, estimate, label_latents
from unbraid.features.labels.llm import LLM
from unbraid.features.labels.scores import Score
from unbraid.features.labels.store import Labels, labels_path
from unbraid.features.page import Index
from unbraid.manifest.errors import UserError
from unbraid.manifest.files import write_text

BUSIEST = 20
"""Latents that are labelled when nobody names any."""


@dataclass(frozen=True)
class Options:
    """Which latents to label and how, or what to do with the labels that there are."""

    index: Path
    """An index; its labels lie beside it, in NAME.labels.sqlite."""
    latents: tuple[int, ...] = ()
    """Numbers of the latents; the 20 that fire most often, but on less than a tenth of the tokens, when left
    out."""
    explainer: Literal["lexical", "llm"] = "lexical"
    """Who writes labels: a deterministic rule of words, or a language model."""
    judge: Literal["lexical", "llm"] = "lexical"
    """Who scores them."""
    scorers: tuple[str, ...] = USUAL
    """Of detection, fuzzing, simulation, intruder, embedding, surprisal, intervention."""
    sae: Path | None = None
    """Folder of the SAE where it is no longer where it was indexed."""
    model: str = ""
    """Model folder or Hub name, in place of the index's."""
    embedding_model: Path | None = None
    """Folder of a local embedding model, for the embedding scorer."""
    out: Path | None = None
    """File to write the result into as JSON."""
    device: str = "cpu"
    """Where the model runs: cpu, cuda, …"""
    contexts: Annotated[ContextConfig, tyro.conf.arg(name="")] = field(default_factory=ContextConfig)
    """How much text a label is made of and scored on."""
    llm: Annotated[EndpointConfig, tyro.conf.arg(name="")] = field(default_factory=EndpointConfig)
    """An OpenAI-compatible endpoint for --explainer llm and --judge llm."""
    calls: Path | None = None
    """File in which the language model's replies are kept; beside the labels when left out."""
    yes: bool = False
    """Do not ask before calls that cost something."""
    queue: bool = False
    """Show labels that wait for a decision, and nothing else."""
    accept: str = ""
    """Accept the label with this id."""
    reject: str = ""
    """Reject the label with this id; needs --why."""
    needs_work: str = ""
    """Send the label with this id back; needs --why."""
    why: str = ""
    """The reason."""
    by: str = ""
    """Who decides; the name of the user when left out."""
    propose: str = ""
    """Propose this text as a label of the one latent in --latents."""
    history: bool = False
    """Show everything that was said about the latents in --latents."""
    agreement: bool = False
    """Show how far the reviewers agree."""
    export: Path | None = None
    """Write all labels, reviews and lists as JSON Lines."""
    import_: Annotated[Path | None, tyro.conf.arg(name="import")] = None
    """Add what a file holds that is not here yet: lines of --export, or Neuronpedia's explanations, in a file
    or a folder; files may be gzip."""
    format: Literal["unbraid", "neuronpedia"] = "unbraid"
    """Who wrote what --import reads."""
    source: str = ""
    """Neuronpedia's name of this SAE, such as 20-res-16k, where an import holds those of others, too, or of
    another layer."""
    json: bool = False
    """Print the result as JSON."""


def run(options: Options) -> None:
    """Label, or look at labels and decide about them."""
    index = Index(options.index)
    labels = Labels.of_index(index)
    if not _reviewed(options, index, labels):
        _label(options, index, labels)


def _reviewed(options: Options, index: Index, labels: Labels) -> bool:
    """Do what concerns labels that exist; False where new ones are asked for."""
    by = options.by or getpass.getuser()
    decisions = {"accepted": options.accept, "rejected": options.reject, "needs work": options.needs_work}
    asked = [(verdict, label) for verdict, label in decisions.items() if label]
    for verdict, label in asked:
        _print(options, labels.review(label, verdict, by=by, why=options.why))
    if options.propose:
        if len(options.latents) != 1:
            raise UserError("--propose is about one latent; name it with --latents")
        _print(options, labels.propose(options.latents[0], options.propose, by=by, kind="person"))
    if options.import_ is not None and options.format == "neuronpedia":
        added = import_labels(options.import_, labels, index, source=options.source)
        print(f"{labels.path}: {added:,} labels proposed")
    elif options.import_ is not None:
        print(f"{labels.path}: {labels.load(options.import_):,} lines added")
    if options.export is not None:
        print(f"{options.export}: {labels.export(options.export):,} lines")
    if options.queue:
        _show_labels(options, labels.queue(by=options.by))
    if options.history:
        for latent in options.latents:
            for line in labels.history(latent):
                print(json.dumps(line, ensure_ascii=False, sort_keys=True))
    if options.agreement:
        found = labels.agreement()
        if found is None:
            print("no two people have reviewed the same label yet")
        else:
            print(json.dumps(found.as_dict(), indent=2))
    others = (options.propose, options.import_, options.export, options.queue, options.history)
    return bool(asked or options.agreement or any(others))


def _label(options: Options, index: Index, labels: Labels) -> None:
    check_scorers(options.scorers)
    latents = list(options.latents) or _busiest(index)
    llm = _llm(options, labels) if "llm" in (options.explainer, options.judge) else None
    contexts = _contexts(options, index)
    judge: Judge = llm if llm is not None and options.judge == "llm" else LexicalJudge()
    explainer = llm if options.explainer == "llm" else None
    if llm is not None:
        _cost(options, contexts, latents, llm)
    with shown("label", "latents") as progress:
        found = list(
            label_latents(
                contexts, latents, judge, options.scorers, llm=explainer, labels=labels, progress=progress,
                embed=embedder_of(options.embedding_model) if "embedding" in options.scorers else None,
            )
        )  # fmt: skip
    record: dict[str, Any] = {
        "index": str(options.index),
        "explainer": explainer.name if explainer else "lexical",
        "judge": judge.name,
        "labels": str(labels.path),
        "latents": [one.as_dict() for one in found],
    }
    if llm is not None:
        record["spent"] = llm.endpoint.spent.as_dict()
        record["unread"] = {"asked again": llm.unread.once, "not read": llm.unread.twice}
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False)
    if options.out is not None:
        write_text(options.out, text + "\n")
    if options.json:
        print(text)
    else:
        _show(found, options.scorers)
        if llm is not None:
            unread = llm.unread
            print(f"{llm.endpoint.note()}; {unread.once} replies could not be read, {unread.twice} not twice")


def _busiest(index: Index) -> list[int]:
    rows = index.query(
        "SELECT latent FROM latents WHERE count > 0 AND density < 0.1 ORDER BY count DESC, latent LIMIT ?",
        [BUSIEST],
    )
    if not rows:
        raise UserError(
            f"no latent of {index.folder} fires on less than a tenth of the tokens; use --latents"
        )
    return [row["latent"] for row in rows]


def _contexts(options: Options, index: Index) -> Contexts:
    lm, sae = both_of(index, options.model, options.sae, device=options.device)
    return Contexts(index, sae, lm, options.contexts)


def _llm(options: Options, labels: Labels) -> LLM:
    path = options.calls or labels_path(options.index).with_suffix(".calls.sqlite")
    with shown("ask", "calls") as progress:
        return LLM(Endpoint(options.llm, Calls(path)), progress)


def _cost(options: Options, contexts: Contexts, latents: Sequence[int], llm: LLM) -> None:
    """Say what the calls will take, and ask where they cost something and somebody is there."""
    if options.explainer == "llm" or options.judge == "llm":
        ahead = estimate(contexts, latents, llm, options.scorers, judged=options.judge == "llm")
        money = "no prices given" if ahead.money is None else f"at most {ahead.money:.4f}"
        print(
            f"about {ahead.calls:,} calls to {llm.name}, {ahead.tokens_in:,} tokens read and at most"
            f" {ahead.tokens_out:,} written ({money}); {ahead.cached:,} were answered before",
            file=sys.stderr,
        )
        if ahead.money and sys.stdin.isatty() and not options.yes and input("go on? [y/N] ").lower() != "y":
            raise UserError("nothing was asked; use --yes to go on without this question")


def embedder_of(folder: Path | None) -> tuple[Embed, str] | None:
    """The embedding model in `folder`, or one that was downloaded; None where there is none and none is
    named, which the scorer says."""
    try:
        model = open_embedder(folder)
    except UserError:
        if folder is not None:
            raise
        return None
    return model.encode, model.id[:12]


def _show(found: Sequence[Found], scorers: Sequence[str]) -> None:
    table = Table("latent", "id", "label", *scorers, "test windows")
    for one in found:
        cells = [_cell(score) for score in one.scores] or ["–"] * len(scorers)
        first = next(iter(one.scores), None)
        windows = f"{first.positives} + {first.negatives} ({first.hard} hard)" if first else "–"
        text = one.explanation.text or f"none: {one.explanation.why_not}"
        table.add_row(str(one.latent), one.label.id if one.label else "–", Text(text), *cells, windows)
    Console().print(table)
    for of_all in zip(*(one.scores for one in found if one.scores), strict=True):
        low, high = (f"{end(score.chance for score in of_all):.3g}" for end in (min, max))
        nothing = low if low == high else f"{low} to {high}"
        print(f"{of_all[0].scorer}: judged by {of_all[0].judge}; knowing nothing gives {nothing}")
    for one in found:
        for note in one.notes:
            print(f"latent {one.latent}: {note}")
        for score in one.scores:
            if score.why_not:
                print(f"latent {one.latent}: no {score.scorer}: {score.why_not}")
            if score.unparsed:
                print(f"latent {one.latent}: {score.scorer}: {score.unparsed} answers could not be read")


def _cell(score: Score) -> str:
    value = score.value
    return "–" if value is None else f"{value.value:.2f} ({value.low:.2f} to {value.high:.2f})"


def _print(options: Options, label: Label) -> None:
    if options.json:
        print(json.dumps(label.as_dict(), indent=2, ensure_ascii=False))
    else:
        print(f"latent {label.latent}: {label.text!r} is {label.status} ({label.id})")


def _show_labels(options: Options, labels: Sequence[Label]) -> None:
    if options.json:
        print(json.dumps([label.as_dict() for label in labels], indent=2, ensure_ascii=False))
        return
    table = Table("latent", "id", "label", "by", "status")
    for label in labels:
        table.add_row(str(label.latent), label.id, Text(label.text), Text(label.by), label.status)
    Console().print(table)
