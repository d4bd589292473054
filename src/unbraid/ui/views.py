"""What each page shows, as plain JSON values: the page's JSON twin is exactly this."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any, cast

import numpy as np

from unbraid.causal.finding import Finding, Row
from unbraid.features.labels.label import checked_status
from unbraid.features.page import Example, LatentPage
from unbraid.manifest.errors import IntegrityError, UserError
from unbraid.ui import maps
from unbraid.ui.shelf import FoundFinding, NotFoundError, Shelf, Source
from unbraid.ui.text import STACKED

PAGE = 50
"""Rows of a table on one page."""
DENSE = 0.1
"""A latent that fires on more of the tokens than this is called dense."""
STEER = 3.0
"""Steering begins at this multiple of the largest activation."""
BOOKMARKS = "bookmarks"
"""The list that the bookmark button of a feature page keeps."""
EXAMPLES = ("top", "intervals", "quantiles")
"""Fields of a latent's page that hold examples."""
SORTS = ("latent", "density", "count", "documents", "max", "mean", "distinct_tokens")
"""Columns that the table of latents can be ordered by."""


def home(shelf: Shelf) -> dict[str, Any]:
    """The indexes in the folder."""
    return {
        "folder": str(shelf.folder),
        "indexes": [about(source) for source in shelf.sources],
        "problems": list(shelf.problems),
    }


def about(source: Source) -> dict[str, Any]:
    manifest = source.index.manifest
    return {
        "key": source.key,
        "id": manifest.id,
        "name": source.name,
        "site": source.site,
        "model": source.model_name,
        "model_id": manifest.inputs["model"],
        "sae_id": source.sae_id,
        "latents": source.index.d_sae,
        "tokens": source.index.n_tokens,
        "documents": manifest.facts.get("documents"),
        "url": f"/i/{source.key}",
    }


def overview(source: Source, *, sort: str, where: Mapping[str, Any], page: int) -> dict[str, Any]:
    """An index at a glance: densities, health, its map, and a table of latents to sort and filter."""
    densities = source.index.densities
    dead, dense = int((densities == 0).sum()), int((densities > DENSE).sum())
    n = max(source.index.d_sae, 1)
    return {
        "index": about(source),
        "health": {
            "latents": source.index.d_sae,
            "dead": dead,
            "dead_share": dead / n,
            "dense": dense,
            "dense_share": dense / n,
            "dense_above": DENSE,
            "median_density": float(np.median(densities[densities > 0])) if dead < n else None,
            "mean_l0": float(densities.sum()),
            "single_token": _count(source, "count > 0 AND distinct_tokens = 1"),
        },
        "densities": _density_bins(densities),
        "structure": maps.overview(source),
        "labels": source.labels.counts(),
        "lists": source.labels.lists(),
        "findings": [
            {"id": f.id, "latents": list(f.latents), "name": f.folder.name} for f in source.findings
        ],
        "table": latents_table(source, sort=sort, where=where, page=page),
    }


def _count(source: Source, condition: str) -> int:
    return int(source.index.query(f"SELECT count(*) AS n FROM latents WHERE {condition}")[0]["n"])


def _density_bins(densities: np.ndarray[Any, np.dtype[np.float64]]) -> list[dict[str, Any]]:
    """Latents by density, four bins a power of ten; those that never fire are left out."""
    alive = densities[densities > 0]
    if not len(alive):
        return []
    steps = np.floor(np.log10(alive) * 4 + 1e-9).astype(int)
    return [
        {"low": 10 ** (s / 4), "high": 10 ** ((s + 1) / 4), "count": int((steps == s).sum())}
        for s in range(int(steps.min()), int(steps.max()) + 1)
    ]


def latents_table(source: Source, *, sort: str, where: Mapping[str, Any], page: int) -> dict[str, Any]:
    """One page of the table of latents; `where`: least and most density, a promoted token, a status."""
    column = sort.removeprefix("-")
    if column not in SORTS:
        raise UserError(f"latents cannot be sorted by {column[:40]!r}; choose one of {', '.join(SORTS)}")
    if page < 1:
        raise UserError(f"page is {page}; the first one is 1")
    conditions, values = ["true"], cast("list[Any]", [])
    for name, comparison in (("least", ">="), ("most", "<=")):
        if where.get(name) is not None:
            conditions.append(f"l.density {comparison} ?")
            values.append(float(where[name]))
    if token := where.get("token"):
        conditions.append("len(list_filter(w.promoted, lambda t: contains(lower(t), lower(?)))) > 0")
        values.append(str(token))
    if status := where.get("status"):
        checked_status(status)
        chosen = [j for j, label in source.labels.current().items() if label.status == status]
        conditions.append(f"l.latent IN ({','.join(map(str, chosen)) or 'NULL'})")
    way = "DESC" if sort.startswith("-") else "ASC"
    joined = "latents l JOIN weights w USING (latent)" if token else "latents l"
    filtered = f"FROM {joined} WHERE {' AND '.join(conditions)}"
    total = int(source.index.query(f"SELECT count(*) AS n {filtered}", values)[0]["n"])
    columns = ", ".join(f"l.{name}" for name in SORTS)
    rows = source.index.query(
        f"SELECT {columns} {filtered} ORDER BY l.{column} {way}, l.latent LIMIT ? OFFSET ?",
        [*values, PAGE, (page - 1) * PAGE],
    )
    return {
        "rows": named(source, rows),
        "total": total,
        "page": page,
        "pages": max(-(-total // PAGE), 1),
        "sort": sort,
        "where": {name: value for name, value in where.items() if value not in (None, "")},
    }


def named(source: Source, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with the latents' labels and most promoted tokens."""
    latents = [int(row["latent"]) for row in rows]
    labels = source.labels.current(latents)
    promoted: dict[int, list[str]] = {}
    if latents:
        found = source.index.query(
            "SELECT latent, promoted[:5] AS promoted FROM weights "
            f"WHERE latent IN ({','.join(map(str, latents))})"
        )
        promoted = {row["latent"]: row["promoted"] for row in found}
    return [
        row
        | {
            "label": labels[j].text if (j := int(row["latent"])) in labels else None,
            "status": labels[j].status if j in labels else None,
            "promoted": promoted.get(j, []),
            "url": f"/i/{source.key}/latents/{j}",
        }
        for row in rows
    ]


def feature(shelf: Shelf, source: Source, latent: int) -> dict[str, Any]:
    """Everything that is known about one latent; latents of the shelf's other indexes are linked."""
    source.check(latent)
    page = source.index.latent(latent)
    listed = {name: source.labels.list(name) for name in source.labels.lists()}
    neighbours = [asdict(n) for n in page.neighbours]
    for sae in {n["sae"] for n in neighbours}:
        home = source if sae is None else shelf.of("sae", sae)
        there = [n for n in neighbours if n["sae"] == sae]
        labels = home.labels.current([n["latent"] for n in there]) if home else {}
        for neighbour in there:
            label = labels.get(neighbour["latent"])
            neighbour["label"] = label.text if label else None
            neighbour["index"] = home.name if home else None
            neighbour["url"] = f"/i/{home.key}/latents/{neighbour['latent']}" if home else None
    return {
        "index": about(source),
        "latent": latent,
        "previous": latent - 1 if latent else None,
        "next": latent + 1 if latent + 1 < source.index.d_sae else None,
        "page": _facts(page) | {"neighbours": neighbours},
        "groups": _groups(page),
        "window": source.index.manifest.facts["config"]["window"],
        "labels": [label.as_dict() for label in source.labels.of(latent)],
        "history": source.labels.history(latent),
        "structure": maps.place(shelf, source, latent),
        "lists": [name for name, kept in listed.items() if latent in kept],
        "findings": [_finding(f) for f in source.findings if latent in f.latents],
        "steer": {"strength": STEER * page.max, "max": page.max},
    }


def _facts(page: LatentPage) -> dict[str, Any]:
    """All of a page but its examples, which stand in the groups."""
    record = {name: value for name, value in vars(page).items() if name not in EXAMPLES}
    for name, value in record.items():
        if is_dataclass(value):
            record[name] = vars(value)
        elif isinstance(value, tuple) and value and is_dataclass(cast(object, value[0])):
            record[name] = [vars(item) for item in cast("tuple[Any, ...]", value)]
    return record


def _groups(page: LatentPage) -> list[dict[str, Any]]:
    """The groups of examples in the order of the page: the strongest, then intervals and quantiles."""
    groups = [{"kind": "top", "low": None, "high": None, "share": None, "examples": _collapsed(page.top)}]
    for kind, found in (("interval", page.intervals), ("quantile", page.quantiles)):
        groups += [
            {
                "kind": kind,
                "low": group.low,
                "high": group.high,
                "count": group.count,
                "share": group.share,
                "examples": _collapsed(group.examples),
            }
            for group in reversed(found)
        ]
    return groups


def _collapsed(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Examples as JSON, those that read the same around their firing as one with the others' places."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for example in examples:
        centre = example.position - example.start
        around = example.tokens[max(centre - STACKED, 0) : centre + STACKED + 1]
        if around in found:
            found[around]["same"].append({"document": example.document, "position": example.position})
        else:
            found[around] = vars(example) | {"centre": centre, "same": []}
    return list(found.values())


def context(source: Source, latent: int, passage: int, position: int, reach: int) -> dict[str, Any]:
    """The tokens of a passage around one of a latent's examples, up to `reach` either side.

    Activations are known within the index's own window around each example, None elsewhere.
    """
    source.check(latent)
    page = source.index.latent(latent)
    every = [*page.top, *(e for group in (*page.intervals, *page.quantiles) for e in group.examples)]
    here = [e for e in every if e.passage == passage]
    if not any(e.position == position for e in here):
        raise NotFoundError(f"latent {latent} has no example at position {position} of passage {passage}")
    window = source.index.passages[passage]
    first, ids = int(window["first"]), window["tokens"]
    start, stop = max(position - reach, first), min(position + reach + 1, first + len(ids))
    known: dict[int, float] = {}
    for example in here:
        known |= dict(enumerate(example.activations, example.start))
    return {
        "latent": latent,
        "document": window["id"],
        "start": start,
        "centre": position - start,
        "max": page.max,
        "tokens": [source.index.vocabulary[int(ids[i - first])][0] for i in range(start, stop)],
        "activations": [known.get(i) for i in range(start, stop)],
    }


_SERIES = ("latents", "random latents", "random direction", "subtracted", "clipped", "keywords", "extra")


def _finding(found: FoundFinding) -> dict[str, Any]:
    """A finding's dose-response and controls; `problem` says so where it cannot be read."""
    try:
        finding = found.finding
    except (UserError, IntegrityError) as error:
        return {"id": found.id, "name": found.folder.name, "problem": str(error)}
    baseline = finding.row("baseline")
    return {
        "id": found.id,
        "name": found.folder.name,
        "problem": None,
        "latents": list(finding.latents),
        "site": finding.site,
        "dose": finding.dose,
        "n_probes": finding.n_probes,
        "n_benign": finding.n_benign,
        "seed": finding.seed,
        "command": finding.command,
        "rows": [_row(finding, row) for row in finding.rows],
        "curve": [
            {"dose": dose, "incident": row.probes["incident"], "helpful": row.benign.get("helpful")}
            for dose, row in [
                (0.0, baseline),
                *sorted(
                    ((r.settings["dose"], r) for r in finding.rows if r.kind == "latents"), key=lambda d: d[0]
                ),
            ]
        ],
        "matches": [asdict(match) for match in finding.matches],
    }


def _row(finding: Finding, row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "kind": row.kind,
        "settings": dict(row.settings),
        "reported": row is finding.reported,
        "incident": row.probes["incident"],
        "change": row.probes_change.get("incident"),
        "kept": row.probes.get("kept"),
        "helpful": row.benign.get("helpful"),
        "considered": sum(a.considered for a in row.applied),
        "fired": sum(a.fired for a in row.applied),
    }


def plain(value: Any) -> Any:
    """Values as JSON has them: what is not finite becomes its name, dataclasses become objects."""
    if isinstance(value, float):
        return value if np.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, np.generic):
        return plain(value.item())
    return value
