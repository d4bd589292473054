"""Pages that read a text with the model, or look things up: search, prompts, two prompts, lists, reviews."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import numpy as np

from unbraid.features.labels.label import checked_status
from unbraid.features.labels.store import Labels
from unbraid.features.search import Hit
from unbraid.features.search_activation import Reading
from unbraid.manifest.errors import UserError
from unbraid.ui.shelf import NotFoundError, Shelf, Source
from unbraid.ui.views import about, feature, named
from unbraid.ui.workbench import Workbench, by_latent

WAYS = ("text", "meaning", "activation", "statistics")
"""How latents can be searched."""
ORDERS = ("", "surprise", "activation")
"""Of what a pasted text activates; see `Search.activation`."""
FOUND = 50
"""Latents that a search or a reading shows."""
PER_TOKEN = 8
"""Latents that a prompt's page names for each token."""


def search(source: Source, bench: Workbench, *, query: str, by: str, order: str) -> dict[str, Any]:
    """Latents that fit a query, with the reason for each; no hits for an empty query."""
    if by not in WAYS:
        raise UserError(f"there is no search by {by[:40]!r}; choose one of {', '.join(WAYS)}")
    problem = None
    hits: list[Hit] = []
    try:
        if query.strip():
            hits = _hits(source, bench, query, by, order)
    except NotFoundError:
        raise
    except UserError as error:
        problem = str(error)
    return {
        "index": about(source),
        "query": query,
        "by": by,
        "ways": list(WAYS),
        "order": order,
        "problem": problem,
        "hits": named(source, [hit.as_dict() for hit in hits]),
    }


def _hits(source: Source, bench: Workbench, query: str, by: str, order: str) -> list[Hit]:
    found = source.search
    if order and by in ("text", "meaning"):
        raise UserError(f"a search by {by} has an order of its own; leave out order")
    if by == "text":
        return found.text(query, FOUND)
    if by == "meaning":
        return found.meaning(query, FOUND)
    if by == "statistics":
        return found.statistics(query.replace(",", " ").split(), order or "-density", FOUND)
    if order not in ORDERS:
        raise UserError(f"order is {order[:40]!r}; with activation use {' or '.join(ORDERS[1:])}")
    bench.check_text(query)
    sae = bench.sae(source)
    with bench.turn():
        way: Any = order or "surprise"
        return found.activation(sae, bench.model(source), query, FOUND, order=way)


def prompt(source: Source, bench: Workbench, text: str) -> dict[str, Any]:
    """Which latents fire where in a text: for each token its strongest, and the strongest of all by token."""
    record: dict[str, Any] = {"index": about(source), "text": text, "problem": bench.missing(source) or None}
    record |= {"tokens": [], "latents": []}
    if record["problem"] or not text.strip():
        return record
    try:
        reading = bench.read(source, text)
    except UserError as error:
        return record | {"problem": str(error)}
    fired = by_latent(reading)
    strongest = sorted(fired, key=lambda j: (-max(fired[j].values()), j))[:FOUND]
    each: list[list[dict[str, Any]]] = [[] for _ in reading.tokens]
    for latent, values in fired.items():
        for token, value in values.items():
            each[token].append({"latent": latent, "value": value})
    return record | {
        "tokens": [
            {"token": token, "latents": sorted(found, key=lambda f: (-f["value"], f["latent"]))[:PER_TOKEN]}
            for token, found in zip(reading.tokens, each, strict=True)
        ],
        "latents": named(
            source,
            [
                {
                    "latent": j,
                    "max": max(fired[j].values()),
                    "activations": [fired[j].get(i, 0.0) for i in range(len(reading.tokens))],
                }
                for j in strongest
            ],
        ),
    }


def activations(source: Source, bench: Workbench, latent: int, text: str) -> dict[str, Any]:
    """One latent's activation at each token of a text."""
    source.check(latent)
    reading = bench.read(source, text)
    values = by_latent(reading).get(latent, {})
    return {
        "latent": latent,
        "tokens": list(reading.tokens),
        "activations": [values.get(i, 0.0) for i in range(len(reading.tokens))],
        "max": max(values.values(), default=0.0),
    }


def contrast(source: Source, bench: Workbench, a: str, b: str) -> dict[str, Any]:
    """Latents that fire more in one of two texts: by the difference of their largest activations."""
    record: dict[str, Any] = {
        "index": about(source), "a": a, "b": b, "problem": bench.missing(source) or None
    }  # fmt: skip
    record |= {"more_in_a": [], "more_in_b": []}
    if record["problem"] or not (a.strip() and b.strip()):
        return record
    try:
        readings = bench.read(source, a), bench.read(source, b)
    except UserError as error:
        return record | {"problem": str(error)}
    rows = _differences(*readings)
    more_in_a = [row for row in rows if row["difference"] > 0][: FOUND // 2]
    more_in_b = [row for row in reversed(rows) if row["difference"] < 0][: FOUND // 2]
    return record | {"more_in_a": named(source, more_in_a), "more_in_b": named(source, more_in_b)}


def _differences(a: Reading, b: Reading) -> list[dict[str, Any]]:
    """Every latent that fires in either, the one that is most a's first."""
    peaks = [{j: max(v.values()) for j, v in by_latent(reading).items()} for reading in (a, b)]
    shares = [
        {j: len(v) / max(len(reading.tokens), 1) for j, v in by_latent(reading).items()} for reading in (a, b)
    ]
    rows = [
        {
            "latent": j,
            "difference": peaks[0].get(j, 0.0) - peaks[1].get(j, 0.0),
            "max_a": peaks[0].get(j, 0.0),
            "max_b": peaks[1].get(j, 0.0),
            "share_a": shares[0].get(j, 0.0),
            "share_b": shares[1].get(j, 0.0),
        }
        for j in peaks[0].keys() | peaks[1].keys()
    ]
    return sorted(rows, key=lambda row: (-row["difference"], row["latent"]))


def lists(source: Source) -> dict[str, Any]:
    """All lists with their sizes."""
    return {
        "index": about(source),
        "lists": [
            {"name": name, "size": size, "url": f"/i/{source.key}/lists/{quote(name, safe='')}"}
            for name, size in source.labels.lists().items()
        ],
    }


def one_list(source: Source, name: str) -> dict[str, Any]:
    """The latents of one list; raises NotFoundError where there is none of that name."""
    latents = source.labels.list(name)
    if not latents:
        raise NotFoundError(f"there is no list {name[:120]!r}, or it is empty")
    rows = source.index.query(
        "SELECT latent, count, density, max FROM latents WHERE latent IN "
        f"({','.join(str(source.check(j)) for j in latents)})"
    )
    by_number = {row["latent"]: row for row in rows}
    return {"index": about(source), "name": name, "latents": named(source, [by_number[j] for j in latents])}


def review(shelf: Shelf, source: Source, *, by: str, status: str, at: int) -> dict[str, Any]:
    """One label of the queue with its latent's examples, and where the others are."""
    labels: Labels = source.labels
    if status:
        checked_status(status)
    queue = labels.queue(by=by, status=status, limit=500)
    at = min(max(at, 0), max(len(queue) - 1, 0))
    label = queue[at] if queue else None
    shown = feature(shelf, source, label.latent) if label else None
    agreement = labels.agreement()
    return {
        "index": about(source),
        "by": by,
        "status": status,
        "counts": labels.counts(),
        "agreement": None if agreement is None else vars(agreement),
        "at": at,
        "waiting": len(queue),
        "label": label.as_dict() if label else None,
        "queue": [{"id": q.id, "latent": q.latent, "text": q.text, "status": q.status} for q in queue],
        "feature": shown,
    }


def neuronpedia(shelf: Shelf, source: Source, latent: int, vector: Sequence[float] | None) -> dict[str, Any]:
    """A latent in the shape of Neuronpedia's GET /api/feature."""
    shown = feature(shelf, source, latent)
    page: Mapping[str, Any] = shown["page"]
    layer = source.site
    top, width = page["histogram_top"], page["histogram_top"] / max(len(page["histogram"]), 1)
    logits = page["logits"]
    step = 0.0 if logits is None else (logits["high"] - logits["low"]) / max(len(logits["counts"]), 1)
    same = {"modelId": source.model_name, "layer": layer, "index": str(latent)}
    decoder = [n for n in page["neighbours"] if n["kind"] == "decoder" and n["sae"] is None]
    return {
        **same,
        "sourceSetName": source.key,
        "hookName": source.site,
        "maxActApprox": page["max"],
        "frac_nonzero": page["density"],
        "freq_hist_data_bar_heights": list(page["histogram"]),
        "freq_hist_data_bar_values": [width * (i + 0.5) for i in range(len(page["histogram"]))]
        if top
        else [],
        "logits_hist_data_bar_heights": [] if logits is None else list(logits["counts"]),
        "logits_hist_data_bar_values": []
        if logits is None
        else [logits["low"] + step * (i + 0.5) for i in range(len(logits["counts"]))],
        "pos_str": [t["token"] for t in page["promoted"]],
        "pos_values": [t["logit"] for t in page["promoted"]],
        "neg_str": [t["token"] for t in page["suppressed"]],
        "neg_values": [t["logit"] for t in page["suppressed"]],
        "topkCosSimIndices": [n["latent"] for n in decoder],
        "topkCosSimValues": [n["value"] for n in decoder],
        "vector": [] if vector is None else list(vector),
        "hasVector": vector is not None,
        "vectorDefaultSteerStrength": shown["steer"]["strength"],
        "explanations": [explanation(source, label) | same for label in shown["labels"]],
        "activations": [
            same | activation(e["tokens"], e["activations"]) for g in shown["groups"] for e in g["examples"]
        ],
    }


def explanation(source: Source, label: Mapping[str, Any]) -> dict[str, Any]:
    """A label in Neuronpedia's shape."""
    return {
        "id": label["id"],
        "modelId": source.model_name,
        "layer": source.site,
        "index": str(label["latent"]),
        "description": label["text"],
        "authorId": label["by"],
        "typeName": label["kind"],
        "explanationModelName": label["model"],
        "scores": label["scores"],
        "status": label["status"],
    }


def activation(tokens: Sequence[str], values: Sequence[float]) -> dict[str, Any]:
    """Tokens and a latent's values on them in Neuronpedia's shape."""
    place = int(np.argmax(values)) if len(values) else 0
    return {
        "tokens": list(tokens),
        "values": list(values),
        "maxValue": max(values, default=0.0),
        "minValue": min(values, default=0.0),
        "maxValueTokenIndex": place,
    }
