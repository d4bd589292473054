"""`unbraid import`: activations that another tool wrote, as shards on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from unbraid.activations.foreign import import_activations
from unbraid.activations.matching import ImportOptions
from unbraid.activations.store import ActivationStore
from unbraid.cli.models import open_model
from unbraid.cli.progress import shown
from unbraid.cli.saes import this_command


@dataclass(frozen=True)
class Options:
    """What to read, what it is, and where to put it."""

    out: Path
    """Folder to make; an import that was killed goes on where it stopped."""
    sources: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Files (.npy, .safetensors), folders of their numbered parts, or the folder of an Arrow cache that
    SAELens wrote."""
    site: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Which array is which: layers.3.resid_post=NAME, =FILE or =FILE#NAME; the site alone where the array is
    named after it or is the only one. Left out, all arrays named after sites are taken."""
    config: Annotated[ImportOptions, tyro.conf.arg(name="")] = field(default_factory=ImportOptions)
    """What else there is, and how to store it."""
    model: str = ""
    """Model folder or Hub name that the activations are of, where you know: checked, and recorded with its
    tokenizer."""
    device: str = "cpu"
    """Where the model runs: cpu, cuda, …"""
    json: bool = False
    """Print the result as JSON."""


def run(options: Options) -> None:
    """Import, and print what was made and what is not known of it."""
    lm = open_model(options.model, device=options.device) if options.model else None
    with shown("import", "rows") as progress:
        store = import_activations(
            options.sources,
            options.out,
            options.config,
            sites=options.site,
            lm=lm,
            command=this_command(),
            progress=progress,
        )
    facts = store.manifest.facts
    if options.json:
        print(json.dumps({"out": str(store.folder), "id": store.id, **facts}, indent=2, ensure_ascii=False))
        return
    print(_sentence(store))


def _sentence(store: ActivationStore) -> str:
    origin = store.manifest.facts["origin"]
    sites = ", ".join(f"{site} from {array}" for site, array in origin["arrays"].items())
    more = ""
    if differs := origin.get("differs"):
        more += f"; a forward pass of {store.model_name} differs by {max(differs.values()):.2%}"
    elif store.model_id:
        more += f"; not compared with a forward pass of {store.model_name}, for want of tokens by document"
    if origin["unknown"]:
        more += f"; unknown: {', '.join(origin['unknown'])}"
    if origin["left_out"]:
        more += f"; left out: {', '.join(origin['left_out'][:20])}"
    return f"{store.folder}: {store.n_tokens:,} tokens of {store.n_documents:,} documents at {sites}{more}"
