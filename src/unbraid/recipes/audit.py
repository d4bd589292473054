"""An audit from capture to guard, read top to bottom.

A model fails on some prompts.  Its replies to the `fit` prompts are sampled and its activations captured;
sparse autoencoders are trained on them; the latents that separate failing from honest replies *before the
text can tell them apart* are found; on the `select` prompts the layer, seed, latents and dose are chosen; a
policy is written; and only then are the `test` prompts asked for, on which the policy is measured beside its
controls. Every folder is an artifact; a second run reuses what is finished.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import unbraid
from unbraid.manifest.errors import IntegrityError
from unbraid.manifest.files import write_json, write_text
from unbraid.manifest.lineage import verify
from unbraid.manifest.record import MANIFEST, check_files, write_manifest
from unbraid.model.load import LanguageModel
from unbraid.recipes import results
from unbraid.recipes.discovery import activations_of, readers_of, replies_to
from unbraid.recipes.guarding import Guarded, guard_of
from unbraid.recipes.page import report_of
from unbraid.recipes.prompts import Source, write_prompts
from unbraid.recipes.report import render_report
from unbraid.recipes.workshop import AuditConfig, Stage, Workshop, default_sites, remember_settings


def run_audit(
    lm: LanguageModel,
    source: Source,
    out: Path,
    config: AuditConfig,
    *,
    origin: str,
    command: str,
    stage: Stage,
) -> dict[str, Any]:
    """Carry out the audit in `out`, or finish or re-check one that stands there; returns summary.json's
    content.

    `origin` names where the prompts come from, so that a folder begun with other prompts is refused.
    """
    if (out / MANIFEST).exists():
        with stage("check finished artifacts", "artifacts") as progress:
            problems = verify(out, progress=progress).problems
        if problems:
            raise IntegrityError(problems[0])
    settings = {"model": lm.id, "prompts": origin, "config": asdict(config), "version": unbraid.__version__}
    remember_settings(out, settings)
    if (out / MANIFEST).exists():
        return _summary(out)
    shop = Workshop(lm, out, config, command, stage)
    fit, chosen_on = (
        write_prompts(source, split, out / "prompts" / split, command=command, seed=config.seed)
        for split in ("fit", "select")
    )
    replies_to(shop, fit)
    sites = config.sites or default_sites(lm)
    readers = readers_of(shop, activations_of(shop, sites), sites)
    guarded = guard_of(shop, readers, fit, chosen_on)
    # Only now, with the policy written, do the test prompts come into being.
    test = write_prompts(source, "test", out / "prompts" / "test", command=command, seed=config.seed)
    finding = results.finding_of(shop, guarded, fit, chosen_on, test)
    told_apart = results.separation(shop, guarded, test)
    sae = results.quality(shop, guarded, test)
    index = results.index_of(shop, guarded)
    if not results.lineage_is_clean(shop, "test"):
        raise IntegrityError(
            f"{guarded.policy_file} rests on prompts of the test split; make the audit again in another --out"
        )
    summary = results.summary_of(shop, guarded, finding, told_apart, sae)
    write_json(out / "summary.json", summary)
    page = report_of(shop, guarded, finding, summary, sae, index, test)
    write_text(out / "report.html", render_report(page))
    _seal(shop, guarded)
    return _summary(out)


def _summary(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text("utf-8"))


def _seal(shop: Workshop, guarded: Guarded) -> None:
    """One manifest over the audit's own files, with every artifact below it as an input."""
    folders = {p.parent for p in shop.out.rglob(MANIFEST)}
    names = {results.relative(f, shop.out): f for f in sorted(folders)}
    inputs = {"model": shop.lm.id, **{name: check_files(folder).id for name, folder in names.items()}}
    write_manifest(
        shop.out,
        kind="audit",
        command=shop.command,
        seed=shop.config.seed,
        inputs=inputs,
        facts={"policy": guarded.policy.id, "sae": guarded.policy.sae.path},
        paths=names,
    )
