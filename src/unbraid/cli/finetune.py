"""`unbraid finetune`: an autoencoder trained further towards what the model says with it in place."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from unbraid.activations.documents import read_documents
from unbraid.cli.models import open_model
from unbraid.cli.progress import shown
from unbraid.cli.saes import open_sae, this_command
from unbraid.manifest.record import MANIFEST, read_manifest
from unbraid.training.finetune import FinetuneOptions, finetune


@dataclass(frozen=True)
class Options:
    """What to fine-tune, in which model, on which text."""

    sae: Path
    """Folder of the autoencoder, which stays as it is."""
    model: str
    """Model folder or Hub name; "practice" is the practice assistant."""
    text: Path
    """Corpus: .jsonl or .parquet with text or messages, .txt with documents between blank lines, or a Hugging
    Face dataset as hf:owner/name[:split]; #field after it names another field of text or messages."""
    out: Path
    """Folder to make; a run that was killed goes on from its last checkpoint."""
    site: str | None = None
    """Site to splice into; the one that the autoencoder was trained on when left out."""
    config: Annotated[FinetuneOptions, tyro.conf.arg(name="")] = field(default_factory=FinetuneOptions)
    """How to fine-tune."""
    device: str = "cpu"
    """Where the model runs: cpu, cuda, …"""
    json: bool = False
    """Print the result as JSON."""


def run(options: Options) -> None:
    """Fine-tune, and print what changed on the way."""
    next(read_documents(options.text))  # a wrong file is told before a large model is loaded
    lm = open_model(options.model, device=options.device)
    sae, identity = open_sae(options.sae, lm)
    with shown("finetune", "steps") as progress:
        finetune(
            sae,
            lm,
            read_documents(options.text),
            options.config,
            options.out,
            parent=identity,
            parent_folder=options.sae if (options.sae / MANIFEST).is_file() else None,
            site=options.site,
            command=this_command(),
            progress=progress,
        )
    manifest = read_manifest(options.out)
    facts = manifest.facts
    if options.json:
        print(json.dumps({"out": str(options.out), "id": manifest.id, **facts}, indent=2, ensure_ascii=False))
        return
    kl = f"was {facts['kl_last']:.4f} nats (its log's one line)"
    if options.config.steps > options.config.log_every:
        kl = f"went from {facts['kl_first']:.4f} to {facts['kl_last']:.4f} nats (its log's ends)"
    print(
        f"{options.out}: {facts['architecture']} at {facts['site']} of {facts['model']}; "
        f"over this text KL {kl}, fvu {facts['fvu_last']:.4f}, l0 {facts['l0']:.1f}; "
        "measure it on other text with evaluate"
    )
