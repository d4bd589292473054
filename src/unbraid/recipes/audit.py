"""An audit from capture to guard, read top to bottom.

A model fails on some prompts.  Its replies to the `fit` prompts are sampled and its activations captured;
sparse autoencoders are trained on them; the latents that separate failing from honest replies *before the
text can tell them apart* are found; on the `select` prompts the layer, seed, latents and dose are chosen; a
policy is written; and only then are the `test` prompts asked for, on which the policy is measured beside its
controls. Every folder is an artifact; a second run reuses what is finished.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from unbraid.activations.capture import CaptureConfig, capture
from unbraid.activations.documents import Document, read_documents
from unbraid.activations.store import ActivationStore
from unbraid.causal.controls import Contrast, clipped, difference_of_means, learn_keywords, subtracted
from unbraid.causal.measure import Measurement, Sampling, measure
from unbraid.causal.probes import focus_span, labelled_documents
from unbraid.causal.validate import dose_edit
from unbraid.control.gate import load_gate, save_gate, train_gate
from unbraid.control.policy import Policy, PolicyEdit, PolicyGate, PolicyModel, PolicySAE, Title
from unbraid.features.find import FindConfig, FindResult, find
from unbraid.features.scores import document_scores
from unbraid.manifest.errors import UserError
from unbraid.manifest.files import building, write_json, write_text
from unbraid.manifest.progress import Progress
from unbraid.manifest.record import Manifest, check_files, write_manifest
from unbraid.model.edits import Gate
from unbraid.model.load import LanguageModel
from unbraid.model.sites import Site
from unbraid.recipes.prompts import PromptSet
from unbraid.recipes.selection import Limits, Option, Selection, select
from unbraid.sae.base import SAE
from unbraid.training.config import TrainConfig
from unbraid.training.trainer import train

Stage = Callable[[str, str], AbstractContextManager[Progress]]
"""Opens the progress display of one stage: title and unit."""


@dataclass(frozen=True)
class AuditConfig:
    """How an audit is carried out."""

    seed: int = 0
    """Seed of sampling, training and search."""
    sites: tuple[str, ...] = ()
    """Sites to look at; without any, resid_post at a quarter and at half of the model's depth."""
    width: int = 1024
    """Latents of each autoencoder, d_sae."""
    k: int = 16
    """Latents that fire at a token."""
    sae_steps: int = 400
    """Training steps of each autoencoder."""
    sae_batch: int = 2048
    """Tokens in a training step."""
    sae_seeds: int = 2
    """Autoencoders trained at each site, each from its own seed."""
    most_latents: int = 3
    """A policy edits at most this many latents."""
    doses: tuple[float, ...] = (2.0, 4.0, 6.0)
    """Doses tried: how many times a latent's own contribution is removed."""
    alphas: tuple[float, ...] = (1.0, 2.0, 4.0, 6.0)
    """Multiples of the contrastive vector tried for subtraction."""
    clip_fractions: tuple[float, ...] = (-1.0, -0.5, 0.0, 0.5)
    """Bars tried for clipping along it: 0 is the honest mean, below it is beyond."""
    max_new_tokens: int = 48
    """Longest reply in tokens."""
    batch_size: int = 250
    """Replies sampled together; no influence on them."""
    limits: Limits = field(default_factory=Limits)
    """What the chosen edit may cost on the selection split."""

    @property
    def sampling(self) -> Sampling:
        """How replies are drawn: at temperature 1, one to each prompt."""
        return Sampling(max_new_tokens=self.max_new_tokens, batch_size=self.batch_size, seed=self.seed)


@dataclass(frozen=True, eq=False)
class Reader:
    """An autoencoder with what the search found in it."""

    folder: Path
    """Its artifact."""
    id: str
    """Its manifest id."""
    sae: SAE
    """The autoencoder."""
    seed: int
    """Its training seed."""
    found: FindResult
    """Latents that separate failing from honest replies of the fit split."""


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


@dataclass(frozen=True, eq=False)
class Workshop:
    """What every step of an audit needs."""

    lm: LanguageModel
    """The model under audit."""
    out: Path
    """Folder of the audit."""
    config: AuditConfig
    """Its settings."""
    command: str
    """The command that reproduces it."""
    stage: Stage
    """Opens progress displays."""

    def artifact(
        self, name: str, kind: str, inputs: dict[str, str], build: Callable[[Path], dict[str, Any]]
    ) -> Manifest:
        """The finished artifact `name`, every byte checked; built first where it does not exist."""
        folder = self.out / name
        if not folder.exists():
            with building(folder) as partial:
                facts = build(partial)
                write_manifest(
                    partial,
                    kind=kind,
                    command=self.command,
                    seed=self.config.seed,
                    inputs=inputs,
                    facts=facts,
                )
        return check_files(folder)


def remember_settings(out: Path, settings: dict[str, Any]) -> None:
    """Write the audit's settings, or refuse to go on in a folder that was begun with others."""
    path = out / "settings.json"
    if path.exists():
        if json.loads(path.read_text()) != json.loads(json.dumps(settings)):
            raise UserError(
                f"{out} was begun with other settings (see {path}); choose another --out or delete it"
            )
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)


def default_sites(lm: LanguageModel) -> tuple[str, ...]:
    """resid_post at a quarter and at half of the depth: late enough to have read the prompt, early enough to
    act.
    """
    return tuple(f"layers.{layer}.resid_post" for layer in sorted({lm.n_layers // 4, lm.n_layers // 2}))


def replies_to(shop: Workshop, prompts: PromptSet) -> Manifest:
    """Sample a reply to every fit prompt; keep whole conversations, and the probes' apart by outcome with
    their focus.
    """

    def build(folder: Path) -> dict[str, Any]:
        everyone = (*prompts.probes, *prompts.benign)
        with shop.stage("sample replies", "replies") as progress:
            measured = measure(shop.lm, everyone, (), shop.config.sampling, progress=progress)
        documents = [
            Document.of_messages(
                (*p.messages, {"role": "assistant", "content": t}), id=p.id, focus=focus_span(p, t)
            )
            for p, t in zip(everyone, measured.texts, strict=True)
            if t
        ]
        bad, honest = labelled_documents(prompts.probes, measured.texts[: len(prompts.probes)])
        for name, group in (("conversations", documents), ("positive", bad), ("negative", honest)):
            lines = [json.dumps(_record(d), ensure_ascii=False) + "\n" for d in group]
            write_text(folder / f"{name}.jsonl", "".join(lines))
        return {"conversations": len(documents), "positive": len(bad), "negative": len(honest)}

    return shop.artifact("replies", "replies", {"model": shop.lm.id, "prompts": prompts.manifest.id}, build)


def _record(document: Document) -> dict[str, Any]:
    record: dict[str, Any] = {"id": document.id, "messages": list(document.messages or ())}
    return record if document.focus is None else {**record, "focus": list(document.focus)}


def activations_of(shop: Workshop, sites: Sequence[str]) -> ActivationStore:
    """Capture the reply tokens of all sampled conversations at `sites`."""
    folder = shop.out / "activations"
    if not folder.exists():
        config = CaptureConfig(sites=tuple(Site.parse(s) for s in sites), positions="reply", dtype="float32")
        documents = read_documents(shop.out / "replies" / "conversations.jsonl")
        with shop.stage("capture activations", "tokens") as progress:
            capture(
                shop.lm,
                documents,
                config,
                folder,
                seed=shop.config.seed,
                command=shop.command,
                progress=progress,
            )
    return ActivationStore(folder)


def readers_of(shop: Workshop, store: ActivationStore, sites: Sequence[str]) -> list[Reader]:
    """Train autoencoders at every site from every seed, and search each for latents that separate the
    replies.
    """
    config = shop.config
    bad, honest = (
        list(read_documents(shop.out / "replies" / f"{n}.jsonl")) for n in ("positive", "negative")
    )
    readers: list[Reader] = []
    for site in sites:
        for seed in range(config.seed * 100, config.seed * 100 + config.sae_seeds):
            folder = shop.out / "saes" / f"{site}-seed{seed}"
            if not folder.exists():
                settings = TrainConfig(
                    d_sae=config.width,
                    k=config.k,
                    steps=config.sae_steps,
                    batch_size=config.sae_batch,
                    seed=seed,
                    lr=2e-3,
                    dead_after=40_000,
                    threads=2,
                )
                with shop.stage(f"train SAE {site} seed {seed}", "steps") as progress:
                    train(store, site, settings, folder, command=shop.command, progress=progress)
            sae, identity = SAE.from_pretrained(folder), check_files(folder).id
            with shop.stage(f"search {site} seed {seed}", "documents") as progress:
                p, n = (document_scores(sae, shop.lm, d, progress=progress) for d in (bad, honest))
            found = find(
                p.latents, n.latents, (*p.ids, *n.ids), FindConfig(seed=config.seed), raw=(p.raw, n.raw)
            )
            readers.append(Reader(folder, identity, sae, seed, found))
    if not any(_poles(r) for r in readers):
        raise UserError(
            "no latent separates failing from honest replies beyond chance at any site; give more probes, "
            "other --sites or a larger --width"
        )

    def build(folder: Path) -> dict[str, Any]:
        for r in readers:
            write_json(folder / f"{r.folder.name}.json", r.found.as_dict())
        return {"documents": {"positive": len(bad), "negative": len(honest)}}

    replies = check_files(shop.out / "replies").id
    shop.artifact("search", "search", {"replies": replies, **{r.folder.name: r.id for r in readers}}, build)
    return readers


def _poles(reader: Reader) -> list[int]:
    """Latents that are more active in failing replies, and hold on held-out documents, best first."""
    return [f.latent for f in reader.found.latents if f.pole > 0 and f.holds]


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
                latents = _poles(reader)[:count]
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
    gate, gate_id = gate_of(shop, max(r.sae.site for r in readers), fit, chosen_on)
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

    def build(folder: Path) -> dict[str, Any]:
        with shop.stage("sample the selection split", "replies") as progress:
            base = _both(lm, chosen_on, config.sampling, progress)
        with shop.stage("choose latents and dose", "edits") as progress:
            chosen = select(lm, options, chosen_on, base, config.sampling, config.limits, progress=progress)
        record: dict[str, Any] = {"policy": _selected(chosen)}
        for name, group in controls(contrast_at(Site.parse(chosen.chosen.settings["site"]))).items():
            with shop.stage(f"choose {name} of the contrastive vector", "edits") as progress:
                record[name] = _selected(
                    select(
                        lm,
                        group,
                        chosen_on,
                        base,
                        config.sampling,
                        config.limits,
                        finalists=2,
                        progress=progress,
                    )
                )
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
