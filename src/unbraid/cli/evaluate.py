"""`unbraid evaluate`: how good autoencoders are, every number with its interval."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from unbraid.activations.documents import read_documents
from unbraid.cli.models import open_model
from unbraid.cli.progress import shown
from unbraid.cli.saes import open_sae, this_command
from unbraid.cli.tables import WIDEST_NAME, side_by_side
from unbraid.evaluation.evaluate import Evaluation, evaluate_all
from unbraid.evaluation.gates import Verdict, judge, read_limits
from unbraid.evaluation.labelled import SuiteResult
from unbraid.evaluation.references import REFERENCES, Reference
from unbraid.evaluation.report import table
from unbraid.evaluation.suites import Suite, as_record, check_suites, run_suites
from unbraid.manifest.errors import UserError
from unbraid.manifest.files import require_new
from unbraid.recipes.scorecard import Scored, write
from unbraid.stats.bootstrap import Interval

COMPARED = ("l0", "fvu", "delta_ce", "recovered_mean")
"""What the terminal shows of references; the page has all."""
WIDEST_INTERVAL = 20
"""Characters of an interval."""


@dataclass(frozen=True)
class Options:
    """What to evaluate, and on which text."""

    sae: tuple[Path, ...]
    """Folder of the autoencoder; several are read with one pass over the model."""
    model: str
    """Model folder or Hub name; "practice" is the practice assistant."""
    text: Path
    """Corpus: .jsonl or .parquet with text or messages, .txt with documents between blank lines, or a Hugging
    Face dataset as hf:owner/name[:split]; #field after it names another field of text or messages."""
    tokens: int | None = None
    """Tokens to reconstruct; the whole corpus when left out."""
    site: str | None = None
    """Site to splice into; the one that the autoencoder was trained on when left out."""
    context: int = 256
    """Tokens the model reads at once."""
    positions: Literal["all", "reply"] = "all"
    """Which tokens are reconstructed: all, or those of assistant replies."""
    references: tuple[Reference, ...] = REFERENCES
    """What to measure beside each autoencoder, at its L0: untrained, pca, neurons, directions, mean; nothing
    after the option measures none, which is faster."""
    suite: tuple[Suite, ...] = ()
    """Suites to run as well: probing, tpp, scr and removal want documents with labels, concepts those with
    concepts, stability several autoencoders, absorption nothing."""
    suite_documents: int = 2000
    """Documents that the suites read at most."""
    require: str = ""
    """Limits to keep, such as "fvu<=0.05 dead<0.02 delta_ce<=0.1", also of a suite's metrics: judged on the
    95 % interval, and exit code 1 where one is broken."""
    out: Path | None = None
    """Folder to make, with evaluation.json, report.html and a file of SAEBench's for each autoencoder."""
    seed: int = 0
    """Seed of the intervals, and of what is drawn."""
    device: str = "cpu"
    """Where the model runs: cpu, cuda, …"""
    json: bool = False
    """Print the result as JSON instead of a table."""


def run(options: Options) -> int:
    """Evaluate, print what was measured, and return 1 where a limit is broken."""
    limits = read_limits(options.require, options.suite) if options.require else []
    check_suites(options.suite, len(options.sae))
    if options.suite_documents < 1:
        raise UserError(f"suite_documents is {options.suite_documents}; choose 1 or more")
    if options.out is not None:
        require_new(options.out)
    next(read_documents(options.text))  # a wrong file is told before a large model is loaded
    lm = open_model(options.model, device=options.device)
    opened = [open_sae(folder, lm) for folder in options.sae]
    saes = [sae.to(lm.device) for sae, _ in opened]
    names = [str(folder) for folder in options.sae]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"--sae names {twice} twice; name it once")
    results: list[SuiteResult] = []
    if options.suite:  # first, since these are particular about the text
        with shown("evaluate", "documents") as progress:
            results = run_suites(
                options.suite,
                dict(zip(names, saes, strict=True)),
                lm,
                list(islice(read_documents(options.text), options.suite_documents)),
                site=options.site,
                positions=options.positions,
                context=options.context,
                seed=options.seed,
                progress=progress,
            )
    with shown("evaluate", "batches") as progress:
        found = evaluate_all(
            saes,
            lm,
            read_documents(options.text),
            site=options.site,
            tokens=options.tokens,
            context=options.context,
            positions=options.positions,
            references=options.references,
            names=names,
            seed=options.seed,
            progress=progress,
        )
    scored = [
        Scored(name, identity, sae, its, judge(limits, its, name, results), folder)
        for name, (_, identity), sae, its, folder in zip(names, opened, saes, found, options.sae, strict=True)
    ]
    if options.out is not None:
        write(scored, options.out, command=this_command(), seed=options.seed, suites=results)
    if options.json:
        records = [one.as_dict() for one in scored]
        printed: Any = records[0] if len(records) == 1 else {"evaluations": records}
        if results:
            printed |= {"suites": [as_record(result) for result in results]}
        print(json.dumps(printed, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        _show([(one.name, one.found) for one in scored])
        _show_suites(results)
        if options.out is not None:
            print(f"{options.out}: {options.out / 'report.html'} shows the same with plots")
    broken = [(one.name, verdict) for one in scored for verdict in one.verdicts if not verdict.kept]
    for name, verdict in [(one.name, v) for one in scored for v in one.verdicts]:
        _say(name, verdict)
    return 1 if broken else 0


def _say(name: str, verdict: Verdict) -> None:
    print(f"evaluate: {name}: {verdict}", file=sys.stderr)


def _show(found: list[tuple[str, Evaluation]]) -> None:
    subjects, rows = table(found)
    first = found[0][1]
    title = (
        f"{first.model} at {', '.join(dict.fromkeys(one.site for _, one in found))}: {first.tokens:,} tokens "
    )
    title += f"of {first.documents:,} documents; 95 % intervals"
    own = [subjects.index(name) for name, _ in found]
    every = Table("metric", title=escape(title), title_justify="left")
    for number in own:
        every.add_column(escape(subjects[number]), overflow="fold")
    every.add_column("what it is")
    for row in rows:
        every.add_row(row.metric, *(_cell(row.cells[number]) for number in own), row.definition.meaning)
    console = Console()
    console.print(every)
    for name, one in found:
        for metric, why in one.undefined.items():
            print(f"{name}: {metric} has no value: {why}")
        if one.references:
            beside = Table(
                "", *COMPARED, title=escape(f"{name} and what took no training"), title_justify="left"
            )
            for kind, metrics in {name: one.metrics, **one.references}.items():
                beside.add_row(escape(kind), *(_cell(metrics.get(metric, "")) for metric in COMPARED))
            console.print(beside)


def _show_suites(results: Sequence[SuiteResult]) -> None:
    console = Console()
    for result in results:
        metrics = result.metrics
        title = escape(f"suite {result.suite} at {result.site}")
        for some in side_by_side(metrics, console.width, tuple(result.rows), WIDEST_INTERVAL):
            shown = Table(title=title, title_justify="left")
            shown.add_column("", max_width=WIDEST_NAME, overflow="fold")
            for metric in some:
                shown.add_column(metric, min_width=len(metric))
            for name, row in result.rows.items():
                shown.add_row(escape(name), *(_cell(row.get(metric, "")) for metric in some))
            if any(result.detectable.get(metric) is not None for metric in some):
                least = [result.detectable.get(metric) for metric in some]
                shown.add_section()
                shown.add_row("detectable difference", *("" if d is None else f"{d:.3g}" for d in least))
            console.print(shown)
        for note in result.notes:
            print(note)


def _cell(cell: Interval | str) -> str:
    if isinstance(cell, str):
        return "none" if cell else ""
    return f"{cell.value:.4g}\n{cell.low:.3g} to {cell.high:.3g}"
