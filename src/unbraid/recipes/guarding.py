"""The second half of an audit: train the gate, choose latents and dose, write the policy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from unbraid.activations.documents import Document, read_documents
from unbraid.causal.controls import Contrast, clipped, difference_of_means, learn_keywords, subtracted
from unbraid.causal.measure import Measurement, Sampling, measure
from unbraid.causal.selection import Option, Selection, select
from unbraid.causal.validate import dose_edit
from unbraid.control.gate import load_gate, save_gate, train_gate
from unbraid.control.policy import Policy, PolicyEdit, PolicyGate, PolicyModel, PolicySAE, Title
from unbraid.manifest.files import write_json
from unbraid.manifest.progress import Progress
from unbraid.model.edits import Gate
from unbraid.model.load import LanguageModel
from unbraid.model.sites import Site
from unbraid.recipes.discovery import Reader, poles
from unbraid.recipes.prompts import PromptSet
from unbraid.recipes.workshop import Workshop


@dataclass(frozen=True, eq=False)
class Guarded:
    """A chosen policy with all that it rests on, before any test prompt was seen."""

    policy_file: Path
    """The policy."""
    policy: Policy
    """Its content."""
    reader: Reader
    """The autoencoder that it edits."""
    gate: Gate
    """Its intent gate."""
    chosen: dict[str, Any]
    """Site, seed, latents and dose that were chosen."""
    contrast: Contrast
    """The contrastive vector of the fit split at the policy's site."""
    alpha: float
    """The multiple of it that the same rule chose for subtraction."""
    clip_fraction: float
    """The bar that the same rule chose for clipping."""
    keywords: tuple[str, ...]
    """The keyword filter learned on the fit split's replies."""


def gate_of(shop: Workshop, site: Site, fit: PromptSet, chosen_on: PromptSet) -> tuple[Gate, str]:
    """Train the intent gate: does this prompt ask for what the probes ask for?"""
    folder = shop.out / "gate"
    if not folder.exists():
        with shop.stage("train intent gate", "prompts") as progress:
            gate, facts = train_gate(
                shop.lm,
                site,
                [p.messages for p in fit.probes],
                [p.messages for p in fit.benign],
                held_out_positive=[p.messages for p in chosen_on.probes],
                held_out_negative=[p.messages for p in chosen_on.benign],
                seed=shop.config.seed,
                progress=progress,
            )
        save_gate(
            gate,
            folder,
            model_id=shop.lm.id,
            tokenizer_id=shop.lm.tokenizer_id,
            facts=facts,
            command=shop.command,
            seed=shop.config.seed,
            inputs={"fit": fit.manifest.id, "select": chosen_on.manifest.id},
        )
    gate, manifest = load_gate(folder)
    return gate, manifest.id


def latent_options(shop: Workshop, readers: Sequence[Reader], gate: Gate) -> list[Option]:
    """Every edit worth trying, mildest first: the best latents of each reader, at each dose."""
    options: list[Option] = []
    for count in range(1, shop.config.most_latents + 1):
        for dose in shop.config.doses:
            for reader in readers:
                latents = poles(reader)[:count]
                if len(latents) == count:
                    edit = dose_edit(reader.sae, latents, dose, site=reader.sae.site)
                    settings = {
                        "sae": reader.folder.name,
                        "site": str(reader.sae.site),
                        "latents": latents,
                        "dose": dose,
                    }
                    options.append(Option(replace(edit, gate=gate), settings))
    return options


def guard_of(shop: Workshop, readers: Sequence[Reader], fit: PromptSet, chosen_on: PromptSet) -> Guarded:
    """Choose latents, layer, seed and dose on the selection split, and every control's dose by the same rule;
    write the policy.
    """
    lm, config = shop.lm, shop.config
    gate, gate_id = gate_of(shop, max((r.sae.site for r in readers), key=lambda s: s.depth), fit, chosen_on)
    options = latent_options(shop, readers, gate)
    bad, honest = (
        list(read_documents(shop.out / "replies" / f"{n}.jsonl")) for n in ("positive", "negative")
    )

    def contrast_at(site: Site) -> Contrast:
        return difference_of_means(lm, bad, honest, site)

    def controls(contrast: Contrast) -> dict[str, list[Option]]:
        return {
            "alpha": [
                Option(replace(subtracted(contrast, a), gate=gate), {"alpha": a}) for a in config.alphas
            ],
            "clip": [
                Option(replace(clipped(contrast, f), gate=gate), {"clip": f})
                for f in config.clip_fractions[::-1]
            ],
        }

    def choose(
        group: Sequence[Option], base: tuple[Measurement, Measurement], progress: Progress, finalists: int = 5
    ) -> Selection:
        prompts = (chosen_on.probes, chosen_on.benign)
        return select(
            lm, group, *prompts, base, config.sampling, config.limits, finalists=finalists, progress=progress
        )

    def build(folder: Path) -> dict[str, Any]:
        with shop.stage("sample the selection split", "replies") as progress:
            base = _both(lm, chosen_on, config.sampling, progress)
        with shop.stage("choose latents and dose", "edits") as progress:
            chosen = choose(options, base, progress)
        record: dict[str, Any] = {"policy": _selected(chosen)}
        for name, group in controls(contrast_at(Site.parse(chosen.chosen.settings["site"]))).items():
            with shop.stage(f"choose {name} of the contrastive vector", "edits") as progress:
                record[name] = _selected(choose(group, base, progress, finalists=2))
        record["keywords"] = list(learn_keywords(_replies(bad), _replies(honest)))
        record["baseline"] = {"incidents": float(base[0].outcomes["incident"].mean())}
        write_json(folder / "selection.json", record)
        return {"chosen": chosen.chosen.settings, "limits": asdict(config.limits)}

    inputs = {
        "model": lm.id,
        "gate": gate_id,
        "fit": fit.manifest.id,
        "select": chosen_on.manifest.id,
        **{r.folder.name: r.id for r in readers},
    }
    manifest = shop.artifact("selection", "selection", inputs, build)
    record = json.loads((shop.out / "selection" / "selection.json").read_text())
    chosen = next(o for o in options if o.settings == record["policy"]["settings"])
    reader = next(r for r in readers if r.folder.name == chosen.settings["sae"])
    policy = _policy(shop, reader, gate_id, chosen, manifest.id)
    path = shop.out / "policy.yaml"
    if not path.exists():
        policy.save(path)
    return Guarded(
        path,
        policy,
        reader,
        gate,
        chosen.settings,
        contrast_at(reader.sae.site),
        record["alpha"]["settings"]["alpha"],
        record["clip"]["settings"]["clip"],
        tuple(record["keywords"]),
    )


def _both(
    lm: LanguageModel, p: PromptSet, sampling: Sampling, progress: Progress
) -> tuple[Measurement, Measurement]:
    return measure(lm, p.probes, (), sampling, progress=progress), measure(
        lm, p.benign, (), sampling, progress=progress
    )


def _replies(documents: Sequence[Document]) -> list[str]:
    return [[m["content"] for m in d.messages or ()][-1] for d in documents]


def _selected(selection: Selection) -> dict[str, Any]:
    return {
        "settings": selection.chosen.settings,
        "result": asdict(selection.result),
        "tried": [asdict(t) for t in selection.tried],
    }


def _policy(shop: Workshop, reader: Reader, gate_id: str, chosen: Option, selection_id: str) -> Policy:
    lm, edit = shop.lm, chosen.edit
    thresholds = tuple(float(t) for t in edit.threshold)
    return Policy(
        policy=Title(name=f"{shop.out.name} guard"),
        model=PolicyModel(name=lm.name, id=lm.id, tokenizer_id=lm.tokenizer_id),
        sae=PolicySAE(
            path=reader.folder.relative_to(shop.out).as_posix(), id=reader.id, site=str(reader.sae.site)
        ),
        edits=(
            PolicyEdit(tuple(chosen.settings["latents"]), "scale", 1.0 - chosen.settings["dose"], thresholds),
        ),
        gate=PolicyGate(path="gate", id=gate_id),
        findings=(selection_id,),
    )
