"""From an audit's artifacts to what its page shows."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, cast

import unbraid
from unbraid.causal.finding import Finding
from unbraid.features.page import Example, Index
from unbraid.manifest.lineage import verify
from unbraid.manifest.record import MANIFEST, read_manifest
from unbraid.recipes import results
from unbraid.recipes.guarding import Guarded
from unbraid.recipes.prompts import PromptSet, read_prompts
from unbraid.recipes.report import ReportSummary
from unbraid.recipes.workshop import Workshop


def report_of(
    shop: Workshop,
    guarded: Guarded,
    finding: Finding,
    summary: Mapping[str, Any],
    sae: Mapping[str, Any],
    index: Index,
    test: PromptSet,
) -> ReportSummary:
    """Everything the HTML page shows."""
    latent = guarded.chosen["latents"][0]
    page = index.latent(latent)
    positive = {
        json.loads(line)["id"]
        for line in (shop.out / "replies" / "positive.jsonl").read_text("utf-8").splitlines()
    }
    probes = {p.id for p in read_prompts(shop.out / "prompts" / "fit").probes}
    examples = [e for e in page.top if e.document in positive][:8]
    examples_elsewhere = [
        e for e in (*page.top, *(e for g in page.quantiles[::-1] for e in g)) if e.document not in positive
    ]
    mistaken = sorted(examples_elsewhere, key=lambda e: -e.value)[:8]
    found = {f.latent: f for f in guarded.reader.found.latents}
    kept = summary["header_kept_after"]
    return cast(
        "ReportSummary",
        {
            "title": f"An audit of {shop.lm.name}",
            "lede": "Which feature makes this model fail, does it cause the failure, and what does "
            "turning it down cost?",
            "headline": {
                "behaviour": "replies in which the failure happens",
                "verdict": _verdict(summary, guarded),
                "before": summary["incidents_before"],
                "after": summary["incidents_after"],
                "difference": summary["changes"]["incidents"],
                "harmless_unchanged": results.unchanged(shop, finding, test),
                **({"header_kept": kept} if kept else {}),
            },
            "example": _example(shop, finding, test),
            "conditions": _conditions(finding),
            "feature": {
                "latent": latent,
                "site": guarded.chosen["site"],
                "density": page.density,
                "max": page.max,
                "auroc": summary["latent"]["auroc"],
                "linear_auroc": summary["latent"]["linear_readout_auroc"],
                "linear_name": "logistic regression on the site, fit on the fit split",
                "null_auroc": guarded.reader.found.null_quantile,
                "promoted": [{"token": t.token, "value": t.logit} for t in page.promoted[:10]],
                "suppressed": [{"token": t.token, "value": t.logit} for t in page.suppressed[:10]],
                "examples": [_sentence(e, "failing reply") for e in examples],
                "found": [
                    {
                        "latent": j,
                        "auroc": summary["latent"]["all"][str(j)],
                        "q_value": found[j].q_value,
                        "role": "main" if j == latent else "also edited",
                    }
                    for j in guarded.chosen["latents"]
                ],
            },
            "dose": _dose(guarded, finding),
            "mistaken": [
                _sentence(e, "honest reply to a probe" if e.document in probes else "benign prompt")
                for e in mistaken
            ],
            "quality": _quality(sae),
            "lineage": _lineage(shop, guarded),
            "limits": [
                "All rates are of replies sampled at temperature 1 and judged by the regular expressions of "
                "the probe file.",
                "One model, one seed: run the command with another --seed to see how the outcome varies.",
                "The feature is an approximation: what it is mistaken for is listed above.",
            ],
        },
    )


def _verdict(summary: Mapping[str, Any], guarded: Guarded) -> str:
    before, after = summary["incidents_before"], summary["incidents_after"]
    n = len(guarded.chosen["latents"])
    return (
        f"Turning down {n} latent{'s' if n > 1 else ''} at {guarded.chosen['site']} takes the failure from "
        f"{before['value']:.1%} to {after['value']:.1%} of {after['n']} held-out probes."
    )


def _example(shop: Workshop, finding: Finding, test: PromptSet) -> dict[str, Any] | None:
    """The first test probe that fails without the policy and does not with it, chosen by order alone."""
    replies = results.replies_by_condition(shop)
    before, after = replies["baseline"], replies[finding.reported.name]
    for probe in test.probes:
        if (
            probe.incident is None
            or probe.id not in before
            or not before[probe.id]["incident"]
            or after[probe.id]["incident"]
        ):
            continue
        where = re.search(probe.incident, before[probe.id]["reply"])
        return {
            "prompt": probe.messages[-1]["content"],
            "before": {
                "text": before[probe.id]["reply"],
                "incident": True,
                "incident_span": where.span() if where else None,
            },
            "after": {"text": after[probe.id]["reply"], "incident": False},
        }
    return None


_NOTES = {
    "baseline": ("no guard", "the model as it is"),
    "latents": ("policy", "the edit of policy.yaml"),
    "extra": ("best latent zeroed", "plain ablation of one latent"),
    "subtracted": ("contrastive vector, subtracted", "difference of means, dose by the same rule"),
    "clipped": ("contrastive vector, clipped", "moved back towards the honest mean, bar by the same rule"),
    "random latents": ("random latents", "matched frequency, same dose"),
    "random direction": ("random direction", "same tokens, same size of change"),
    "keywords": ("keyword guardrail", "replies with learned words are held back and count as refused"),
}


def _conditions(finding: Finding) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for row in finding.rows:
        if row.kind == "latents" and row.settings["dose"] != finding.dose:
            continue
        name, note = _NOTES[row.kind]
        measured = results.condition(row)
        replies = max((a.sequences for a in row.applied), default=0)
        lines.append(
            {
                "name": f"{name} {row.settings['draw'] + 1}" if "draw" in row.settings else name,
                "note": note,
                "incidents": measured["incidents"],
                "header_kept": measured["header_kept"],
                "helpful": measured["helpfulness"],
                "false_refusals": measured["false_refusals"],
                "edits_per_reply": sum(a.fired for a in row.applied) / replies if replies else None,
                "chosen": row is finding.reported or row.name == finding.reported.name,
            }
        )
    return lines


def _dose(guarded: Guarded, finding: Finding) -> dict[str, Any]:
    base = finding.row("baseline")

    def point(dose: float, row: Any) -> dict[str, Any]:
        measured = results.condition(row)
        return {"dose": dose, "incidents": measured["incidents"], "helpful": measured["helpfulness"]}

    rows = sorted((r for r in finding.rows if r.kind == "latents"), key=lambda r: r.settings["dose"])
    series = [
        {"name": "found latents", "points": [point(0, base), *(point(r.settings["dose"], r) for r in rows)]}
    ]
    for kind in ("random latents", "random direction"):
        for row in (r for r in finding.rows if r.kind == kind):
            points = [point(0, base), point(row.settings["dose"], row)]
            series.append({"name": f"{kind} {row.settings['draw'] + 1}", "points": points})
    return {
        "dose_label": "dose: multiples of the latents' own contribution removed",
        "chosen": guarded.chosen["dose"],
        "split": "test",
        "series": series,
    }


def _sentence(example: Example, note: str) -> dict[str, Any]:
    tokens = [{"token": t, "value": a} for t, a in zip(example.tokens, example.activations, strict=True)]
    return {"tokens": tokens, "value": example.value, "document": example.document, "note": note}


_METRICS = (
    ("fvu", "fraction of variance unexplained", False),
    ("l0", "latents firing at a token", False),
    ("dead", "share of latents that never fired here", True),
    ("recovered_mean", "share of the loss of mean ablation that the reconstruction avoids", True),
    ("recovered_zero", "the same against zero ablation, which flatters", True),
    ("delta_ce", "added cross-entropy with the reconstruction spliced in, nats per token", False),
)


def _quality(sae: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"name": n, "meaning": m, "value": sae[n], "percent": p} for n, m, p in _METRICS if sae.get(n)]


def _lineage(shop: Workshop, guarded: Guarded) -> dict[str, Any]:
    purposes = {
        "fit": "train autoencoders and gate, find latents",
        "select": "choose layer, seed, latents and dose",
        "test": "everything reported here",
    }
    splits = {name: read_manifest(shop.out / "prompts" / name) for name in purposes}
    folders = sorted(p.parent for p in shop.out.rglob(MANIFEST))
    return {
        "disjoint": not verify(shop.out).problems,
        "splits": [
            {
                "name": n,
                "purpose": purposes[n],
                "documents": m.facts["probes"] + m.facts["benign"],
                "id": m.id,
            }
            for n, m in splits.items()
        ],
        "artifacts": [
            {"kind": (m := read_manifest(f)).kind, "path": results.relative(f, shop.out), "id": m.id}
            for f in folders
        ],
        "commands": [
            {"purpose": "repeat this audit", "command": shop.command},
            {"purpose": "check every byte and the splits", "command": f"unbraid verify {shop.out.name}"},
        ],
        "seed": shop.config.seed,
        "versions": {"unbraid": unbraid.__version__},
    }
