"""Open an autoencoder by its folder, know its identity, and make sure that it belongs to the model."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from unbraid.activations.text import require_tokenizer
from unbraid.manifest.errors import UserError
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


def this_command() -> str:
    """The command line that is running, as one can paste it."""
    return shlex.join(["unbraid", *sys.argv[1:]])
