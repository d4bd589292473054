"""`unbraid evaluate`: how good an autoencoder is, every number with its interval."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from unbraid.activations.documents import read_documents
from unbraid.cli.models import open_model
from unbraid.cli.progress import shown
from unbraid.cli.saes import open_sae
from unbraid.evaluation.evaluate import Evaluation, evaluate
from unbraid.evaluation.report import MEANINGS


@dataclass(frozen=True)
class Options:
    """What to evaluate, and on which text."""

    sae: Path
    """Folder of the autoencoder."""
    model: str
    """Model folder or Hub name; "practice" is the practice assistant."""
    text: Path
    """Corpus: .jsonl or .parquet with text or messages, .txt with documents between blank lines, or a Hugging
    Face dataset as hf:owner/name[:split]; #field after it names another field of text or messages."""
    tokens: int | None = None
    """Tokens to reconstruct; the whole corpus when left out."""
    site: str | None = None
    """Site to splice into; the one that the autoencoder was trained on when left out."""
    context: int = 256
    """Tokens the model reads at once."""
    positions: Literal["all", "reply"] = "all"
    """Which tokens are reconstructed: all, or those of assistant replies."""
    seed: int = 0
    """Seed of the intervals."""
    device: str = "cpu"
    """Where the model runs: cpu, cuda, …"""
    json: bool = False
    """Print the result as JSON instead of a table."""


def run(options: Options) -> None:
    """Evaluate, and print what was measured."""
    next(read_documents(options.text))  # a wrong file is told before a large model is loaded
    lm = open_model(options.model, device=options.device)
    sae, identity = open_sae(options.sae, lm)
    with shown("evaluate", "batches") as progress:
        found = evaluate(
            sae.to(lm.device),
            lm,
            read_documents(options.text),
            site=options.site,
            tokens=options.tokens,
            context=options.context,
            positions=options.positions,
            seed=options.seed,
            progress=progress,
        )
    if options.json:
        record = {"sae": str(options.sae), "sae_id": identity, **found.as_dict()}
        print(json.dumps(record, indent=2, ensure_ascii=False))
    else:
        _show(found, options.sae)


def _show(found: Evaluation, folder: Path) -> None:
    title = (
        f"{folder} in {found.model} at {found.site}: {found.tokens:,} tokens of {found.documents:,} documents"
    )
    table = Table("metric", "value", "95 % interval", "what it is", title=title, title_justify="left")
    for name, measured in found.metrics.items():
        between = f"{measured.low:.4g} to {measured.high:.4g}"
        table.add_row(name, f"{measured.value:.4g}", between, MEANINGS[name])
    Console().print(table)
