"""What `unbraid evaluate --out` writes: numbers as JSON, a page with plots, SAEBench's files, a manifest."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import unbraid
from unbraid.evaluation import saebench, saebench_suites
from unbraid.evaluation.evaluate import Evaluation
from unbraid.evaluation.gates import Verdict
from unbraid.evaluation.labelled import SuiteResult
from unbraid.evaluation.report import table
from unbraid.evaluation.suites import DEFINITIONS as SUITES
from unbraid.evaluation.suites import as_record
from unbraid.manifest.errors import UserError
from unbraid.manifest.files import building, write_json, write_text
from unbraid.manifest.record import write_manifest
from unbraid.sae.base import SAE
from unbraid.stats.bootstrap import Interval
from unbraid.ui.charts import Bar, Point, Series, bars, scatter

KIND = "evaluation"
SAEBENCH = {
    "probing": saebench_suites.sparse_probing_results,
    "tpp": saebench_suites.tpp_results,
    "scr": saebench_suites.scr_results,
    "absorption": saebench_suites.absorption_results,
}
"""Suites that SAEBench has a file for."""
MATCHED = 0.1
"""How much higher an L0 may be, as a share, and still count as the same."""
STYLES = 6
"""Colours that the page has."""
PLOTTED = {"fvu": "variance left unexplained (FVU)", "delta_ce": "cross-entropy added, nats (ΔCE)"}


@dataclass(frozen=True, eq=False)
class Scored:
    """An autoencoder with what was found."""

    name: str
    """What tables call it."""
    identity: str
    """Its content id."""
    sae: SAE
    """The autoencoder."""
    found: Evaluation
    """What was measured."""
    verdicts: Sequence[Verdict]
    """Of each limit that was asked for, whether it was kept."""
    folder: Path
    """Where it lies."""

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "sae": self.name,
            "sae_id": self.identity,
            **self.found.as_dict(),
            "verdicts": [verdict.as_dict() for verdict in self.verdicts],
        }


def write(
    scored: Sequence[Scored], out: Path, *, command: str, seed: int, suites: Sequence[SuiteResult] = ()
) -> None:
    """Make the folder `out`. Raises UserError when it exists, and when definitions differ."""
    labels = _labels(scored)
    page = render(scored, command, suites)
    with building(out) as folder:
        write_json(
            folder / "evaluation.json",
            {"evaluations": [one.as_dict() | {"histograms": histograms(one.found)} for one in scored]},
        )
        write_text(folder / "report.html", page)
        for one, label in zip(scored, labels, strict=True):
            write_json(folder / saebench.file_name(label), saebench.core(one.found, one.sae, label))
            for result in suites:
                if result.suite in SAEBENCH and one.name in result.rows:
                    there = SAEBENCH[result.suite](
                        result, one.name, one.sae, release=saebench.RELEASE, sae_id=label, seed=seed,
                        millis=int(time.time() * 1000),
                    )  # fmt: skip
                    write_json(folder / there["eval_type_id"] / saebench.file_name(label), there)
        if suites:
            write_json(folder / "suites.json", {"suites": [as_record(result) for result in suites]})
        first = scored[0].found
        write_manifest(
            folder,
            kind=KIND,
            command=command,
            seed=seed,
            inputs={"model": first.model_id}
            | {f"sae {label}": one.identity for one, label in zip(scored, labels, strict=True)},
            facts={
                "tokens": first.tokens,
                "documents": first.documents,
                "kept": all(verdict.kept for one in scored for verdict in one.verdicts),
            },
            paths={f"sae {label}": one.folder for one, label in zip(scored, labels, strict=True)},
        )


def _labels(scored: Sequence[Scored]) -> list[str]:
    """A name for each autoencoder's file: its folder's, with a number where two would be the same."""
    labels: list[str] = []
    files: set[str] = set()
    for one in scored:
        base = Path(one.name).resolve().name or "sae"
        label, number = base, 2
        while saebench.file_name(label) in files:
            label, number = f"{base}-{number}", number + 1
        files.add(saebench.file_name(label))
        labels.append(label)
    return labels


def histograms(found: Evaluation) -> dict[str, Any]:
    """Latents by how often they fire (a bin for each third of a power of ten) and firings by strength, with
    the bins' edges; empty bins at both ends are left out. `never` counts the latents that did not fire."""
    density = found.details.latents.density
    alive = density[density > 0]
    steps = np.arange(-3 * 9, 1)
    edges = 10.0 ** (steps / 3)
    counts, _ = np.histogram(np.clip(alive, edges[0], edges[-1]), edges)
    strengths = found.details.latents
    return {
        "density": {**_trimmed(counts.tolist(), edges.tolist()), "never": int((density == 0).sum())},
        "activation": _trimmed(strengths.histogram.tolist(), strengths.edges().tolist()),
    }


def _trimmed(counts: list[int], edges: list[float]) -> dict[str, list[int] | list[float]]:
    filled = [i for i, count in enumerate(counts) if count]
    if not filled:
        return {"counts": [], "edges": []}
    return {
        "counts": counts[filled[0] : filled[-1] + 1],
        "edges": edges[filled[0] : filled[-1] + 2],
    }


def render(scored: Sequence[Scored], command: str, suites: Sequence[SuiteResult] = ()) -> str:
    """The page as one HTML string that loads nothing and runs no script.

    Raises UserError when two of the evaluations define a metric differently.
    """
    if not scored:
        raise UserError("there is no evaluation to show")
    environment = Environment(
        loader=PackageLoader("unbraid.recipes"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    subjects, rows = table([(one.name, one.found) for one in scored])
    return environment.get_template("evaluation.html.j2").render(
        scored=scored,
        first=scored[0].found,
        subjects=subjects,
        rows=rows,
        is_interval=lambda cell: isinstance(cell, Interval),
        shown=[(one, *_histogram_charts(one, number % STYLES)) for number, one in enumerate(scored)],
        frontiers=[(site, _frontiers([one for one in scored if one.found.site == site]))
                   for site in dict.fromkeys(one.found.site for one in scored)],
        matched=matched(scored),
        suites=suites,
        suite_definitions=SUITES,
        match_percent=f"{100 * MATCHED:g}",
        command=command,
        version=unbraid.__version__,
    )  # fmt: skip


def _histogram_charts(one: Scored, style: int) -> tuple[Markup, Markup, int]:
    found = histograms(one.found)

    def chart(name: str, x_label: str, y_label: str) -> Markup:
        counts, edges = found[name]["counts"], found[name]["edges"]
        each = [Bar(a, b, n) for a, b, n in zip(edges, edges[1:], counts, strict=False)]
        return bars(each, x_label=x_label, y_label=y_label, style=style)

    return (
        chart("density", "share of tokens at which it fires", "latents"),
        chart("activation", "activation of a latent that fires", "firings"),
        found["density"]["never"],
    )


def _frontiers(scored: Sequence[Scored]) -> list[Markup]:
    """L0 against each of PLOTTED: every autoencoder a point, its references hollow points beside it, and the
    band of what is best at that L0 or below. What says nothing, an L0 of 0, has no place on a logarithm."""
    charts: list[Markup] = []
    for metric, label in PLOTTED.items():
        series: list[Series] = []
        points: list[Point] = []
        for number, one in enumerate(scored):
            l0, y = one.found.metrics["l0"].value, one.found.metrics[metric]
            points.append(Point(l0, y.value, y.low, y.high))
            series.append(Series(one.name, (points[-1],), number % STYLES))
            series += [
                Series(
                    f"{name} beside {one.name}",
                    (Point(its["l0"].value, its[metric].value, its[metric].low, its[metric].high),),
                    number % STYLES,
                    hollow=True,
                )
                for name, its in one.found.references.items()
                if its["l0"].value > 0
            ]
        charts.append(
            scatter(series, x_label="latents that fire at a token (L0)", y_label=label, band=front(points))
        )
    return charts


def front(points: Sequence[Point]) -> list[Point]:
    """Of points where lower is better in both, those that nothing at the same or a lower x beats, by x."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, p.y)):
        if not kept or point.y < kept[-1].y:
            kept.append(point)
    return kept


def matched(scored: Sequence[Scored]) -> list[Mapping[str, Any]]:
    """Pairs of autoencoders of one site whose L0 is the same but for MATCHED, and what the one has less of
    than the other: told apart only where the intervals do not overlap."""
    pairs: list[Mapping[str, Any]] = []
    for i, one in enumerate(scored):
        for other in scored[i + 1 :]:
            a, b = one.found.metrics["l0"].value, other.found.metrics["l0"].value
            if one.found.site != other.found.site or max(a, b) > (1 + MATCHED) * min(a, b):
                continue
            for metric in PLOTTED:
                x, y = one.found.metrics[metric], other.found.metrics[metric]
                better = one if x.high < y.low else other if y.high < x.low else None
                pairs.append({
                    "one": one.name, "other": other.name, "metric": metric, "a": x, "b": y,
                    "l0": (a, b), "better": better.name if better else None,
                })  # fmt: skip
    return pairs
