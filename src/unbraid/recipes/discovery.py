"""The first half of an audit: sample replies, capture, train autoencoders, search them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unbraid.activations.capture import capture
from unbraid.activations.documents import Document, read_documents
from unbraid.activations.reading import CaptureConfig
from unbraid.activations.store import ActivationStore
from unbraid.causal.measure import measure
from unbraid.causal.probes import focus_span, labelled_documents
from unbraid.features.find import FindConfig, FindResult, find
from unbraid.features.scores import document_scores
from unbraid.manifest.errors import UserError
from unbraid.manifest.files import write_json, write_text
from unbraid.manifest.record import Manifest, check_files
from unbraid.model.sites import Site
from unbraid.recipes.prompts import PromptSet
from unbraid.recipes.workshop import Workshop
from unbraid.sae.base import SAE
from unbraid.training.config import TrainConfig
from unbraid.training.trainer import train


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
                    auxk_alpha=1 / 8,
                    dead_after=20_000,
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
    if not any(poles(r) for r in readers):
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


def poles(reader: Reader) -> list[int]:
    """Latents that are more active in failing replies, and hold on held-out documents, best first."""
    return [f.latent for f in reader.found.latents if f.pole > 0 and f.holds]
