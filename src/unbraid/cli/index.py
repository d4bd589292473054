"""`unbraid index`: what every latent of an SAE does over a corpus."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from unbraid.activations.documents import read_documents
from unbraid.cli.models import open_model
from unbraid.cli.progress import stages
from unbraid.cli.saes import open_sae, this_command
from unbraid.features.index import IndexConfig, Share, build_index
from unbraid.features.merging import merge_indexes
from unbraid.features.page import Index
from unbraid.manifest.errors import UserError
from unbraid.model.sites import Site


@dataclass(frozen=True)
class Options:
    """What to index, over which text, and where to put it; or which shares of an index to merge."""

    out: Path
    """Folder to make."""
    sae: Path | None = None
    """Folder of the SAE."""
    model: str = ""
    """Model folder or Hub name; "practice" is the practice assistant."""
    text: Path | None = None
    """Corpus: .jsonl or .parquet with text or messages, .txt with documents between blank lines, or a Hugging
    Face dataset as hf:owner/name[:split]; #field after it names another field of text or messages."""
    site: str = ""
    """Site to read; the one that the SAE was trained on when left out."""
    beside: tuple[Path, ...] = ()
    """Folders of other SAEs, of any site with as many dimensions, in which neighbours are found, too."""
    append: Path | None = None
    """A finished index with the same settings: the new one holds what it holds, and the documents of the text
    that it has not read. It stays as it is."""
    share: str = "1/1"
    """Which worker's share of the corpus to index, as 2/4, for --merge."""
    merge: tuple[Path, ...] = ()
    """Folders of all shares of an index, to make one of; only --out is needed besides."""
    config: Annotated[IndexConfig, tyro.conf.arg(name="")] = field(default_factory=IndexConfig)
    """What to keep."""
    device: str = "cpu"
    """Where the model runs: cpu, cuda, …"""
    json: bool = False
    """Print the result as JSON."""


def run(options: Options) -> None:
    """Build the index and print what is in it."""
    index = _merged(options) if options.merge else _built(options)
    record = _record(index)
    if options.json:
        print(json.dumps(record, indent=2))
        return
    print(
        f"{index.folder}: {record['latents']:,} latents at {record['site']} over {record['tokens']:,} "
        f"tokens; {record['dead']:,} never fire"
    )
    together = index.manifest.facts["coactive"]
    if not together["exact"]:
        print(f"co-activation was counted on a uniform sample of {together['tokens']:,} tokens")
    number, of = index.manifest.facts["share"]
    if of > 1:
        print(f"this is share {number} of {of}; make one index of all with: unbraid index --merge … --out …")


def _merged(options: Options) -> Index:
    if options.sae or options.model or options.text or options.append:
        raise UserError(
            "--merge takes everything from the shares; leave out --sae, --model, --text and --append"
        )
    with stages("merge") as progress:
        return merge_indexes(
            [Index(folder) for folder in options.merge],
            options.out,
            command=this_command(),
            progress=progress,
        )


def _built(options: Options) -> Index:
    if options.sae is None or options.text is None or not options.model:
        raise UserError("say what to index: --sae DIR --model M --text FILE, or --merge DIR DIR …")
    share = Share.parse(options.share)
    append = None if options.append is None else Index(options.append)
    next(read_documents(options.text))  # a wrong file is told before a large model is loaded
    lm = open_model(options.model, device=options.device)
    sae, identity = open_sae(options.sae, lm)
    beside = [open_sae(folder, lm) for folder in options.beside]
    paths = {"sae": options.sae, "documents": options.text}
    if Path(options.model).is_dir():
        paths["model"] = Path(options.model)
    with stages("index") as progress:
        return build_index(
            sae.to(lm.device),
            lm,
            read_documents(options.text),
            options.config,
            options.out,
            sae_id=identity,
            site=Site.parse(options.site) if options.site else None,
            beside=[(other.to(lm.device), its) for other, its in beside],
            share=share,
            append=append,
            paths=paths,
            command=this_command(),
            progress=progress,
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
