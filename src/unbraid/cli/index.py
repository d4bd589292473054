"""`unbraid index`: what every latent of an SAE does over a corpus."""

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
from unbraid.features.index import IndexConfig, build_index
from unbraid.features.page import Index
from unbraid.model.sites import Site


@dataclass(frozen=True)
class Options:
    """What to index, over which text, and where to put it."""

    sae: Path
    """Folder of the SAE."""
    model: str
    """Model folder or Hub name; "practice" is the practice assistant."""
    text: Path
    """Corpus: .jsonl or .parquet with text or messages, .txt with documents between blank lines, or a Hugging
    Face dataset as hf:owner/name[:split]; #field after it names another field of text or messages."""
    out: Path
    """Folder to make."""
    site: str = ""
    """Site to read; the one that the SAE was trained on when left out."""
    config: Annotated[IndexConfig, tyro.conf.arg(name="")] = field(default_factory=IndexConfig)
    """What to keep."""
    device: str = "cpu"
    """Where the model runs: cpu, cuda, …"""
    json: bool = False
    """Print the result as JSON."""


def run(options: Options) -> None:
    """Build the index and print what is in it."""
    next(read_documents(options.text))  # a wrong file is told before a large model is loaded
    lm = open_model(options.model, device=options.device)
    sae, identity = open_sae(options.sae, lm)
    paths = {"sae": options.sae, "documents": options.text}
    if Path(options.model).is_dir():
        paths["model"] = Path(options.model)
    with shown("index", "tokens") as progress:
        index = build_index(
            sae.to(lm.device),
            lm,
            read_documents(options.text),
            options.config,
            options.out,
            sae_id=identity,
            site=Site.parse(options.site) if options.site else None,
            paths=paths,
            command=this_command(),
            progress=progress,
        )
    record = _record(index)
    if options.json:
        print(json.dumps(record, indent=2))
    else:
        print(
            f"{index.folder}: {record['latents']:,} latents at {record['site']} over {record['tokens']:,} "
            f"tokens; {record['dead']:,} never fire"
        )


def _record(index: Index) -> dict[str, str | int]:
    return {
        "out": str(index.folder),
        "id": index.manifest.id,
        "site": str(index.manifest.facts["site"]),
        "latents": index.d_sae,
        "tokens": index.n_tokens,
        "documents": int(index.manifest.facts["documents"]),
        "dead": int((index.densities == 0).sum()),
    }
