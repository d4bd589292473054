"""Open an autoencoder by its folder, know its identity, and make sure that it belongs to the model."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from unbraid.activations.text import require_tokenizer
from unbraid.cli.models import name_of, open_model
from unbraid.features.page import Index
from unbraid.manifest.errors import IntegrityError, UserError
from unbraid.manifest.identity import sha256_file
from unbraid.manifest.record import MANIFEST, check_files
from unbraid.model.load import LanguageModel
from unbraid.sae.base import SAE
from unbraid.sae.formats.detect import detect


def open_sae(folder: Path, lm: LanguageModel | None) -> tuple[SAE, str]:
    """The autoencoder and its content id: its manifest's, or its weights' hash where it comes without
    one.  Without a model nobody asks whether it fits.

    Raises IntegrityError when its files do not match its manifest and UserError when it was trained on
    another model or with another tokenizer.
    """
    source = detect(folder)
    sae = source.load()
    place = source.weights.parent
    manifest = check_files(place) if (place / MANIFEST).is_file() else None
    identity = manifest.id if manifest else sha256_file(source.weights)
    if lm is not None and sae.config.model_id and sae.config.model_id != lm.id:
        raise UserError(
            f"the SAE in {folder} was trained on weights {sae.config.model_id[:12]}… but model {lm.name} has "
            f"{lm.id[:12]}…; name the model that it was trained on"
        )
    if lm is not None and manifest and (tokenizer := manifest.facts.get("tokenizer_id")):
        require_tokenizer(lm, tokenizer, place)
    return sae, identity


def folder_of(index: Index, given: Path | None) -> Path:
    """Where the autoencoder of an index is: as given, else where it was; UserError if it is not there."""
    if given is not None:
        return given  # what is not there is told by who opens it
    paths = index.manifest.paths or {}
    folder = index.folder / paths["sae"] if "sae" in paths else None
    if folder is None or not folder.exists():
        raise UserError(f"the SAE of {index.folder} is not where it was; say where with --sae DIR")
    return folder


def sae_of(index: Index, given: Path | None) -> tuple[SAE, Path]:
    """The autoencoder that an index was made from, and its folder; needs no model.

    Raises UserError where it is not to be found, and IntegrityError where it is another one.
    """
    folder = folder_of(index, given)
    source = detect(folder)
    place = source.weights.parent
    identity = check_files(place).id if (place / MANIFEST).is_file() else sha256_file(source.weights)
    require_same(index, identity, folder)
    return source.load(), folder


def both_of(index: Index, model: str, sae: Path | None, *, device: str = "cpu") -> tuple[LanguageModel, SAE]:
    """The model and the autoencoder of an index, as given or else where they were, on a device.

    Raises UserError where one is not to be found or has another tokenizer, and IntegrityError where the
    autoencoder is another one.
    """
    lm = open_model(name_of(index, model), device=device)
    require_tokenizer(lm, index.manifest.inputs["tokenizer"], index.folder)
    folder = folder_of(index, sae)
    opened, identity = open_sae(folder, lm)
    require_same(index, identity, folder)
    return lm, opened.to(lm.device)


def require_same(index: Index, identity: str, folder: Path) -> None:
    """Raise IntegrityError unless an index was made from the autoencoder with this content id."""
    if index.manifest.inputs["sae"] != identity:
        raise IntegrityError(
            f"{folder} is not the SAE that {index.folder} was made from; name that with --sae"
        )


def this_command() -> str:
    """The command line that is running, as one can paste it."""
    return shlex.join(["unbraid", *sys.argv[1:]])
