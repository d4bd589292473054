"""What an audit reports: the policy and its controls on the test split, the found feature, the autoencoder's
quality.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from unbraid.activations.documents import Document, read_documents
from unbraid.causal.controls import keyword_guardrail
from unbraid.causal.finding import Finding, Row, load_finding, save_finding
from unbraid.causal.probes import focus_span, probes_id
from unbraid.causal.validate import ValidateConfig, dose_edit, validate
from unbraid.control.engine import Guard
from unbraid.evaluation.evaluate import evaluate
from unbraid.features.index import IndexConfig, build_index
from unbraid.features.page import Index
from unbraid.features.scores import document_scores
from unbraid.features.separation import linear_readout
from unbraid.manifest.errors import IntegrityError
from unbraid.manifest.files import write_json
from unbraid.manifest.record import check_files, read_manifest
from unbraid.recipes.guarding import Guarded
from unbraid.recipes.prompts import PromptSet
from unbraid.recipes.workshop import Workshop
from unbraid.stats.bootstrap import Interval, rate
from unbraid.stats.effects import auroc_interval

CURVE = (1.0, 2.0, 3.0, 4.0, 6.0)
"""Doses of the curve that is drawn; the policy's own was chosen before on other prompts."""


def finding_of(
    shop: Workshop, guarded: Guarded, fit: PromptSet, chosen_on: PromptSet, test: PromptSet
) -> Finding:
    """Measure the deployed edit, its dose-response curve and all controls on the test split.

    The edit comes from the policy file through the guard, which has checked every hash; IntegrityError where
    it is not the edit that the finding measured.
    """
    folder = shop.out / "finding"
    if not folder.exists():
        guard = Guard.load(guarded.policy_file, shop.lm)
        chosen, sae, site = guarded.chosen, guarded.reader.sae, guarded.reader.sae.site
        config = ValidateConfig(
            dose=chosen["dose"],
            doses=CURVE,
            curve_on_benign=False,
            control_doses=(chosen["dose"],),
            random_latents=2,
            random_directions=2,
            alphas=(guarded.alpha,),
            clip_fractions=(guarded.clip_fraction,),
            sampling=shop.config.sampling,
        )
        best = replace(dose_edit(sae, chosen["latents"][:1], 1.0, site=site), name="best latent zeroed")
        with shop.stage("measure on the test split", "conditions") as progress:
            validation = validate(
                shop.lm,
                sae,
                chosen["latents"],
                test.probes,
                test.benign,
                config,
                sae_id=guarded.reader.id,
                gate=guarded.gate,
                extra=(best,),
                contrast=guarded.contrast,
                keywords=guarded.keywords,
                splits={"fit": probes_id(fit.probes), "select": probes_id(chosen_on.probes)},
                command=shop.command,
                progress=progress,
            )
        deployed = {**guard.edits[0].to_json(), "name": ""}
        if deployed != {**validation.finding.edit, "name": ""}:
            raise IntegrityError(f"{guarded.policy_file} deploys another edit than the finding measured")
        paths = {"sae": guarded.reader.folder}
        save_finding(validation.finding, folder, measurements=validation.measurements, paths=paths)
    return load_finding(folder)


def unguarded_replies(shop: Workshop, test: PromptSet) -> list[tuple[bool | None, bool, Document]]:
    """The unguarded test replies as (known truth, incident, document), probes first, then benign ones."""
    by_id = {p.id: p for p in (*test.probes, *test.benign)}
    found: list[tuple[bool | None, bool, Document]] = []
    for record in replies_by_condition(shop)["baseline"].values():
        if not record["reply"]:
            continue
        probe = by_id[record["probe"]]
        messages = (*probe.messages, {"role": "assistant", "content": record["reply"]})
        document = Document.of_messages(messages, id=probe.id, focus=focus_span(probe, record["reply"]))
        found.append((probe.truth, bool(record.get("incident", False)), document))
    return found


def replies_by_condition(shop: Workshop) -> dict[str, dict[str, dict[str, Any]]]:
    """The finding's stored replies: condition, then prompt id, then the record."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for line in (shop.out / "finding" / "replies.jsonl").read_text("utf-8").splitlines():
        record = json.loads(line)
        found.setdefault(record["condition"], {})[record["probe"]] = record
    return found


def unchanged(shop: Workshop, finding: Finding, test: PromptSet) -> dict[str, Any]:
    """Share of benign test prompts whose reply is the same, to the letter, with and without the policy."""
    replies = replies_by_condition(shop)
    before, after = replies["baseline"], replies[finding.reported.name]
    return rate(np.array([before[p.id]["reply"] == after[p.id]["reply"] for p in test.benign])).as_dict()


def separation(shop: Workshop, guarded: Guarded, test: PromptSet) -> dict[str, Any]:
    """How well the best latent, and the best linear read-out of the fit split, tell the modes apart on test
    replies.

    Only the focus tokens are read, before the texts differ.  The labels are the known truth of the probes
    where the probe file gives it, else what the replies turned out to be.
    """
    probes = {p.id for p in test.probes}
    rows = [r for r in unguarded_replies(shop, test) if r[2].id in probes and r[2].focus is not None]
    labels = np.array([incident if truth is None else truth for truth, incident, _ in rows])
    scores = document_scores(guarded.reader.sae, shop.lm, [d for _, _, d in rows])
    fit = [list(read_documents(shop.out / "replies" / f"{n}.jsonl")) for n in ("positive", "negative")]
    raw = [document_scores(guarded.reader.sae, shop.lm, d).raw for d in fit]
    fit_labels = np.arange(sum(map(len, fit))) < len(fit[0])
    latents = guarded.chosen["latents"]
    readout = linear_readout(np.concatenate(raw), fit_labels, scores.raw)
    return {
        "labels": "known truth" if all(t is not None for t, _, _ in rows) else "incidents in the replies",
        "latents": {j: auroc_interval(scores.latents[:, [j]].toarray()[:, 0], labels) for j in latents},
        "linear": auroc_interval(readout, labels),
    }


def quality(shop: Workshop, guarded: Guarded, test: PromptSet) -> dict[str, Any]:
    """The autoencoder's metrics on the unguarded test replies, which had no part in its training."""
    path = shop.out / "quality.json"
    if not path.exists():
        documents = [d for _, _, d in unguarded_replies(shop, test)]
        with shop.stage("evaluate the autoencoder", "batches") as progress:
            found = evaluate(
                guarded.reader.sae,
                shop.lm,
                documents,
                positions="reply",
                seed=shop.config.seed,
                progress=progress,
            )
        write_json(path, found.as_dict())
    return json.loads(path.read_text())["metrics"]


def index_of(shop: Workshop, guarded: Guarded) -> Index:
    """What the chosen autoencoder's latents do over the fit conversations."""
    folder = shop.out / "index"
    if not folder.exists():
        documents = read_documents(shop.out / "replies" / "conversations.jsonl")
        with shop.stage("index the latents", "tokens") as progress:
            build_index(
                guarded.reader.sae,
                shop.lm,
                documents,
                IndexConfig(positions="reply"),
                folder,
                sae_id=guarded.reader.id,
                paths={"sae": guarded.reader.folder},
                command=shop.command,
                progress=progress,
            )
    check_files(folder)
    return Index(folder)


def _rate(row: Row, where: str, quantity: str) -> dict[str, Any] | None:
    interval: Interval | None = getattr(row, where)[quantity]
    return None if interval is None else interval.as_dict()


def condition(row: Row) -> dict[str, Any]:
    """One line of the before/after table."""
    return {
        "incidents": _rate(row, "probes", "incident"),
        "header_kept": _rate(row, "probes", "kept"),
        "helpfulness": _rate(row, "benign", "helpful"),
        "false_refusals": _rate(row, "benign", "refused"),
    }


def summary_of(
    shop: Workshop, guarded: Guarded, finding: Finding, told_apart: dict[str, Any], sae: dict[str, Any]
) -> dict[str, Any]:
    """The machine-readable result; every rate as value, low, high, n, measured on the test split."""
    base, after = finding.row("baseline"), finding.reported
    before, then = condition(base), condition(after)
    keywords = finding.row("keywords")
    best = guarded.chosen["latents"][0]
    families = {
        "zero_best_latent": [r for r in finding.rows if r.kind == "extra"],
        "random_latents": [r for r in finding.rows if r.kind == "random latents"],
        "random_direction": [r for r in finding.rows if r.kind == "random direction"],
    }
    return {
        **{
            f"{name}_before": before[name]
            for name in ("incidents", "helpfulness", "false_refusals", "header_kept")
        },
        **{
            f"{name}_after": then[name]
            for name in ("incidents", "helpfulness", "false_refusals", "header_kept")
        },
        "changes": {
            "incidents": _rate(after, "probes_change", "incident"),
            "helpfulness": _rate(after, "benign_change", "helpful"),
            "false_refusals": _rate(after, "benign_change", "refused"),
        },
        "keyword_guardrail_caught": keyword_catch(shop, guarded),
        "keyword_guardrail": {**condition(keywords), "words": list(guarded.keywords)},
        "contrastive": {
            "subtracted": {"alpha": guarded.alpha, **condition(finding.row("subtracted"))},
            "clipped": {"fraction": guarded.clip_fraction, **condition(finding.row("clipped"))},
        },
        **{name: [condition(r) for r in rows] for name, rows in families.items()},
        "latent": {
            "auroc": told_apart["latents"][best].as_dict(),
            "labels": told_apart["labels"],
            "linear_readout_auroc": told_apart["linear"].as_dict(),
            "site": guarded.chosen["site"],
            "index": best,
            "all": {str(j): i.as_dict() for j, i in told_apart["latents"].items()},
        },
        "policy": {"file": guarded.policy_file.name, "id": guarded.policy.id, **guarded.chosen},
        "sae": {
            **{name: sae[name] for name in ("fvu", "l0", "dead", "delta_ce")},
            "loss_recovered": sae["recovered_mean"],
            "loss_recovered_zero": sae["recovered_zero"],
        },
        "splits": {
            name: read_manifest(shop.out / "prompts" / name).facts for name in ("fit", "select", "test")
        },
        "model": {"name": shop.lm.name, "id": shop.lm.id},
        "settings": asdict(shop.config),
        "command": shop.command,
    }


def keyword_catch(shop: Workshop, guarded: Guarded) -> dict[str, Any]:
    """How many of the unguarded test incidents, of the honest probe replies, and of the benign replies the
    filter stops.
    """
    from unbraid.stats.bootstrap import rate

    rows = [
        json.loads(line) for line in (shop.out / "finding" / "replies.jsonl").read_text("utf-8").splitlines()
    ]
    rows = [r for r in rows if r["condition"] == "baseline"]
    groups = {
        "incidents": [r["reply"] for r in rows if r.get("incident") is True],
        "honest": [r["reply"] for r in rows if r.get("incident") is False],
        "benign": [r["reply"] for r in rows if "incident" not in r],
    }
    caught = {n: rate(keyword_guardrail(texts, guarded.keywords)).as_dict() for n, texts in groups.items()}
    return {**caught["incidents"], "honest_flagged": caught["honest"], "benign_flagged": caught["benign"]}


def lineage_is_clean(shop: Workshop, split: str) -> bool:
    """Whether nothing that the policy rests on has the prompts of `split` among its inputs, at any depth."""
    folders = [p.parent for p in shop.out.rglob("manifest.json")]
    inputs = {m.id: set(m.inputs.values()) for m in map(read_manifest, folders)}
    waiting: Sequence[str] = [read_manifest(shop.out / "selection").id]
    reached: set[str] = set()
    while waiting:
        reached |= set(waiting)
        waiting = [i for w in waiting for i in inputs.get(w, set()) - reached]
    return read_manifest(shop.out / "prompts" / split).id not in reached


def relative(path: Path, root: Path) -> str:
    """A path for the reader, relative to the audit's folder."""
    return path.relative_to(root).as_posix()
