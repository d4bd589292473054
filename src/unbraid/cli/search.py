"""`unbraid search`: latents by words, by meaning, by a text, by a direction or by numbers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from unbraid.cli.progress import shown
from unbraid.cli.saes import both_of, sae_of
from unbraid.features.embedding import open_embedder
from unbraid.features.labels.store import Labels
from unbraid.features.page import Index
from unbraid.features.search import Hit, Search
from unbraid.features.search_text import TextIndex
from unbraid.manifest.errors import UserError


@dataclass(frozen=True)
class Options:
    """Which index, and what to look for: one of --text, --meaning, --activates-on, --direction, --where."""

    index: Path
    """The index."""
    text: str = ""
    """Words of labels, examples or promoted tokens; "in quotes" for a phrase, begin* for a prefix."""
    meaning: str = ""
    """What a latent's label, or what it fires on, should mean; needs a sentence-embedding model."""
    activates_on: str = ""
    """A text, or the file of one, on which the latents fire."""
    direction: Path | None = None
    """A .npy file with a direction (d_in,) that decoder rows should have."""
    where: tuple[str, ...] = ()
    """Conditions on numbers of the index, such as density<0.01 or count>=100."""
    order: str = ""
    """With --where: the number to order by, -density for the largest first. With --activates-on: surprise
    (strong for the latent, which is rare) or activation."""
    limit: int = 20
    """At most this many latents."""
    sae: Path | None = None
    """Folder of the SAE, where it is not where the index says."""
    model: str = ""
    """Model folder or Hub name, where it is not the one that the index names."""
    embedder: Path | None = None
    """Folder of the sentence-embedding model."""
    device: str = "cpu"
    """Where the model runs: cpu, cuda, …"""
    json: bool = False
    """Print the result as JSON."""


def run(options: Options) -> None:
    """Search in the one way that was asked for and print the latents."""
    ways = {
        "--text": bool(options.text),
        "--meaning": bool(options.meaning),
        "--activates-on": bool(options.activates_on),
        "--direction": options.direction is not None,
        "--where": bool(options.where),
    }
    chosen = [name for name, given in ways.items() if given]
    if len(chosen) != 1 and not (options.order and not chosen):
        raise UserError(f"say what to look for with one of {', '.join(ways)}, not {len(chosen)} of them")
    if options.limit < 1:
        raise UserError(f"limit is {options.limit}; it must be at least 1")
    if options.order and chosen and chosen[0] not in ("--where", "--activates-on"):
        raise UserError(f"{chosen[0]} has an order of its own; leave out --order")
    index = Index(options.index)
    search = Search(index, Labels.of_index(index))
    hits = _found(options, search)
    labels = search.labels.current({hit.latent for hit in hits}) if search.labels else {}
    names = {latent: label.text for latent, label in labels.items()}
    if options.json:
        found = [{**hit.as_dict(), "label": names.get(hit.latent)} for hit in hits]
        print(json.dumps({"index": index.manifest.id, "hits": found}, indent=2, allow_nan=False))
    else:
        show(hits, names, Console())


def _found(options: Options, search: Search) -> list[Hit]:
    index, limit = search.index, options.limit
    if options.text:
        with shown("full text", "latents") as progress:
            TextIndex.of(index, progress)
        return search.text(options.text, limit)
    if options.meaning:
        search.embedder = open_embedder(options.embedder)
        with shown("meanings", "latents") as progress:
            return search.meaning(options.meaning, limit, progress)
    if options.activates_on:
        lm, sae = both_of(index, options.model, options.sae, device=options.device)
        order: Literal["surprise", "activation"] = "surprise"
        if options.order:
            if options.order not in ("surprise", "activation"):
                raise UserError(f"order is {options.order!r}; with --activates-on use surprise or activation")
            order = "surprise" if options.order == "surprise" else "activation"
        return search.activation(sae, lm, _text(options.activates_on), limit, order=order)
    if options.direction is not None:
        # No model is needed to compare weights.
        return search.direction(_vector(options.direction), sae_of(index, options.sae)[0], limit)
    return search.statistics(options.where, options.order or "-density", limit)


def _text(given: str) -> str:
    """The content of a file of that name, where there is one, else what was given."""
    try:
        if Path(given).is_dir():
            raise UserError(f"{given} is a folder; give a text, or a file that holds one")
        return Path(given).read_text(encoding="utf-8") if Path(given).is_file() else given
    except UnicodeDecodeError as error:
        raise UserError(f"{given} is no UTF-8 text; save it as UTF-8") from error
    except (OSError, ValueError):  # a text too long to be a file's name, or one with a NUL in it
        return given


def _vector(path: Path) -> np.ndarray:
    try:
        vector = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{path} is no .npy file with a direction ({error}); write it with numpy.save"
        ) from error
    if not isinstance(vector, np.ndarray) or not np.issubdtype(vector.dtype, np.floating) or vector.ndim != 1:
        raise UserError(f"{path} holds no direction: one row of floating-point numbers is needed")
    return vector


def show(hits: list[Hit], labels: dict[int, str], console: Console) -> None:
    """Print the latents as a table, or say that there are none."""
    if not hits:
        console.print("No latent was found.")
        return
    table = Table("latent", "score", "why", "label")
    for hit in hits:
        table.add_row(
            str(hit.latent), f"{hit.score:.4g}", _plain(hit.why), _plain(labels.get(hit.latent, ""))
        )
    console.print(table)


def _plain(text: str) -> str:
    """Text of a corpus for a terminal: no markup, and no control character, which could move its cursor."""
    return escape("".join(c if c.isprintable() else "·" for c in text[:200]))
