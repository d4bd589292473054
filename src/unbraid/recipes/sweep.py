"""A sweep: many autoencoders on one capture, measured on held-out text, and the Pareto front among them.

Those of one seed learn from the same stream, as many at a time as fit into memory; each is what
`unbraid train` would have made of it. What is finished, trained or measured, is not done again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

import unbraid
from unbraid.activations.documents import Document
from unbraid.activations.text import require_tokenizer
from unbraid.evaluation.evaluate import evaluate_all
from unbraid.manifest.files import building, write_json, write_text
from unbraid.manifest.record import MANIFEST, read_manifest, write_manifest
from unbraid.model.load import LanguageModel
from unbraid.recipes.workshop import Stage, remember_settings
from unbraid.sae.base import SAE
from unbraid.stats.bootstrap import Interval, mean_of_runs
from unbraid.training.config import LoopOptions
from unbraid.training.grid import Grid, Trial, trials
from unbraid.training.memory import available, needed
from unbraid.training.run import sae_config
from unbraid.training.sources import Activations
from unbraid.training.trainer import Job, OnLog, train_together
from unbraid.ui.charts import Point, Series, scatter

KIND = "sweep"
MEASURED = "measured"
"""Folder of the evaluations, a file for each autoencoder."""
SHARE = 0.5
"""Share of the free memory that autoencoders in training together may take."""
MEASURED_TOGETHER = 8
"""Autoencoders that are held in memory while one reading of the text measures them."""
MATCHED = 0.03
"""How much higher one L0 may be than another to count as no higher: BatchTopK meets its k on average only."""
STYLES = 6
"""Line styles of the page's charts."""


@dataclass(frozen=True)
class Text:
    """What the autoencoders are measured on."""

    documents: Callable[[], Iterable[Document]]
    """Reads it from its beginning."""
    name: str
    """What to call it."""
    tokens: int
    """How much of it is used."""
    context: int
    """Tokens that the model reads at once."""


def run_sweep(
    store: Activations,
    lm: LanguageModel,
    text: Text,
    grid: Grid,
    options: LoopOptions,
    out: Path,
    *,
    command: str,
    stage: Stage,
    on_log: OnLog | None = None,
) -> dict[str, Any]:
    """Train, measure and compare into the folder `out`; returns the content of its sweep.json. `on_log` is
    handed every line of the trainings' logs. A `follow.Following` may still be written while they train.

    Raises UserError for a grid that cannot be trained, and as `train` and `evaluate` do.
    """
    require_tokenizer(lm, store.tokenizer_id, str(store))
    every = trials(grid, options, store)
    read = every[0].sources
    with building(out) as folder:
        remember_settings(
            folder,
            {
                "activations": read.so_far(1), "model": lm.id,
                "grid": asdict(grid), "options": asdict(options),
                "text": {"name": text.name, "tokens": text.tokens, "context": text.context},
            },
        )  # fmt: skip
        for group in _groups([t for t in every if not (folder / t.name / MANIFEST).exists()]):
            title = f"train {len(group)} of {len(every)}, seed {group[0].config.seed}"
            with stage(title, "steps") as progress:
                jobs = [Job(trial.sources, trial.config, folder / trial.name) for trial in group]
                train_together(jobs, command=command, progress=progress, on_log=on_log)
        left = [t for t in every if not _measured(folder, t).exists()]
        for start in range(0, len(left), MEASURED_TOGETHER):
            group = left[start : start + MEASURED_TOGETHER]
            with stage(f"evaluate {start + 1} to {start + len(group)} of {len(left)}", "batches") as progress:
                found = evaluate_all(
                    [SAE.from_pretrained(folder / trial.name).to(lm.device) for trial in group],
                    lm,
                    text.documents(),
                    tokens=text.tokens,
                    context=text.context,
                    progress=progress,
                )
            for trial, evaluation in zip(group, found, strict=True):
                write_json(_measured(folder, trial), evaluation.as_dict())
        evaluations = {t.name: json.loads(_measured(folder, t).read_text("utf-8")) for t in every}
        summary = summarise(every, evaluations)
        write_json(folder / "sweep.json", summary)
        write_text(folder / "report.html", render(summary, command))
        origin = read.origin(1)
        write_manifest(
            folder,
            kind=KIND,
            command=command,
            seed=grid.seed[0],
            inputs={**origin.inputs, "model": lm.id}
            | {t.name: read_manifest(folder / t.name).id for t in every},
            facts={"points": len(summary["points"]), "tokens": summary["tokens"], **origin.facts},
            paths={**origin.paths} | {t.name: folder / t.name for t in every},
        )
    return summary


def _measured(folder: Path, trial: Trial) -> Path:
    return folder / MEASURED / f"{trial.name}.json"


def _groups(every: Sequence[Trial]) -> Iterator[list[Trial]]:
    """Trials that learn from one stream, the same seed's, as many as fit into memory together."""
    free = available()
    room = float("inf") if free is None else SHARE * free
    for seed in dict.fromkeys(trial.config.seed for trial in every):
        group: list[Trial] = []
        taken = 0.0
        for trial in (t for t in every if t.config.seed == seed):
            need = needed(sae_config(trial.sources, trial.config), trial.config.batch_size)
            if group and taken + need > room:
                yield group
                group, taken = [], 0.0
            group.append(trial)
            taken += need
        yield group


def summarise(every: Sequence[Trial], evaluations: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Every point with its metrics over the seeds, and whether it lies on the front of its site."""
    grouped: dict[str, list[Trial]] = {}
    for trial in every:
        grouped.setdefault(trial.point, []).append(trial)
    points: list[dict[str, Any]] = []
    for name, group in grouped.items():
        config, measured = group[0].config, [evaluations[trial.name]["metrics"] for trial in group]
        points.append(
            {
                "point": name,
                "site": evaluations[group[0].name]["site"],
                "architecture": config.architecture,
                "width": config.d_sae,
                "seeds": len(group),
                "metrics": {
                    key: _over([m[key] for m in measured])
                    for key in measured[0]
                    if all(key in m for m in measured)  # where one has no value, there is no mean
                },
            }
        )
    for name in ("fvu", "delta_ce"):
        for point in points:
            point[f"front_{name}"] = not any(_better(other, point, name) for other in points)
    first = evaluations[every[0].name]
    facts = {key: first[key] for key in ("model", "tokens", "documents", "context")}
    return facts | {"points": points}


def _over(found: Sequence[Mapping[str, float]]) -> dict[str, float | int]:
    """The mean over seeds with Student's interval; of a single seed its own interval, by document."""
    if len(found) == 1:
        return dict(found[0])
    return mean_of_runs([one["value"] for one in found]).as_dict()


def _better(one: Mapping[str, Any], other: Mapping[str, Any], name: str) -> bool:
    """Whether a point beats another of its site in a metric at an L0 that is no higher, as far as L0 can be
    matched, or is as good at a lower one.
    """
    if one["site"] != other["site"]:
        return False
    (l0, value), (its_l0, its_value) = (
        [p["metrics"][m]["value"] for m in ("l0", name)] for p in (one, other)
    )
    return l0 <= (1 + MATCHED) * its_l0 if value < its_value else value == its_value and l0 < its_l0


def render(summary: Mapping[str, Any], command: str) -> str:
    """The page as one HTML string that loads nothing and runs no script."""
    environment = Environment(
        loader=PackageLoader("unbraid.recipes"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    points = summary["points"]
    lines = list(dict.fromkeys(_line(point) for point in points))
    labels = {"fvu": "variance left unexplained (FVU)", "delta_ce": "cross-entropy added, nats (ΔCE)"}
    return environment.get_template("sweep.html.j2").render(
        summary=summary,
        sites=list(dict.fromkeys(point["site"] for point in points)),
        lines=[(line, *_look(number)) for number, line in enumerate(lines)],
        charts={
            (site, name): scatter(
                [_series([p for p in points if p["site"] == site], line, number, name)
                 for number, line in enumerate(lines)],
                x_label="latents that fire at a token (L0)",
                y_label=label,
            )
            for site in dict.fromkeys(point["site"] for point in points)
            for name, label in labels.items()
        },
        command=command,
        matched=f"{100 * MATCHED:g}",
        version=unbraid.__version__,
    )  # fmt: skip


def _look(number: int) -> tuple[int, bool]:
    """Style of the page's lines, in turn, and whether with open dots, as every second turn has them."""
    return number % STYLES, number // STYLES % 2 == 1


def _line(point: Mapping[str, Any]) -> str:
    return f"{point['architecture']}, width {point['width']:,}"


def _series(points: Sequence[Mapping[str, Any]], line: str, number: int, name: str) -> Series:
    found: list[Point] = []
    for point in points:
        if _line(point) == line:
            y = Interval(**point["metrics"][name])
            found.append(
                Point(point["metrics"]["l0"]["value"], y.value, y.low, y.high, ringed=point[f"front_{name}"])
            )
    style, hollow = _look(number)
    return Series(line, tuple(found), style, hollow)
