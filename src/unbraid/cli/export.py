"""`unbraid export`: an index in the files of Neuronpedia, SAEDashboard or delphi."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from unbraid.cli.progress import shown
from unbraid.cli.saes import both_of, sae_of
from unbraid.features.exchange import delphi, neuronpedia, saedashboard
from unbraid.features.exchange.neuronpedia import CREATOR, SOURCE_SET, Names, layer_of
from unbraid.features.labels.store import Labels
from unbraid.features.page import Index
from unbraid.manifest.errors import UserError


@dataclass(frozen=True)
class Options:
    """Which index, to which tool, and where to put it."""

    index: Path
    """The index."""
    to: Literal["neuronpedia", "saedashboard", "delphi"]
    """Whose files to write."""
    out: Path
    """Folder to make; Neuronpedia's has {model}/{source} below it."""
    model_id: str = ""
    """What the model is called there, such as gemma-2-2b; the index's name of it when left out."""
    source_set: str = SOURCE_SET
    """Name of the set of sources there, such as res-16k."""
    layer: int | None = None
    """Number of the layer; the site's when left out."""
    creator: str = CREATOR
    """Id of your account there; the one that every Neuronpedia begins with when left out."""
    sae: Path | None = None
    """Folder of the SAE, where it is not where the index says."""
    model: str = ""
    """delphi: model folder or Hub name, where it is not the one that the index names."""
    tokens: int = 1_000_000
    """delphi: tokens of the index's corpus whose firings are written."""


def run(options: Options) -> None:
    """Write the files and say where they are."""
    index = Index(options.index)
    if options.to == "delphi":
        print(_to_delphi(options, index))
        return
    names = Names(
        options.model_id or _short(index), _layer(options, index), options.source_set, options.creator
    )
    sae, _ = sae_of(index, options.sae)
    with shown("export", "latents") as progress:
        if options.to == "saedashboard":
            print(saedashboard.export(index, options.out, names, sae=sae, progress=progress))
        else:
            labels = Labels.of_index(index)
            print(neuronpedia.export(index, options.out, names, sae=sae, labels=labels, progress=progress))


def _to_delphi(options: Options, index: Index) -> Path:
    lm, sae = both_of(index, options.model, options.sae)
    with shown("export", "passages") as progress:
        return delphi.export(index, options.out, sae, lm, tokens=options.tokens, progress=progress)


def _short(index: Index) -> str:
    return str(index.manifest.facts["model_name"]).rstrip("/").rpartition("/")[2]


def _layer(options: Options, index: Index) -> int:
    if options.layer is not None:
        return options.layer
    site = str(index.manifest.facts["site"])
    if (number := layer_of(site)) is None:
        raise UserError(f"the site {site} names no layer; say which with --layer")
    return number
