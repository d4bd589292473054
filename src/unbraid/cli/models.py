"""Which model `--model` means: the practice assistant by its name, else a folder or a Hub model."""

from __future__ import annotations

from pathlib import Path

from unbraid.features.page import Index
from unbraid.model.load import LanguageModel, load_model

PRACTICE = "practice"


def open_model(name: str | Path, *, device: str = "cpu", dtype: str = "float32") -> LanguageModel:
    """Load the model that `--model NAME` names; raises UserError when there is none."""
    if str(name) == PRACTICE:
        from unbraid.practice.assistant import folder

        return load_model(folder(), device=device, dtype=dtype)
    return load_model(name, device=device, dtype=dtype)


def name_of(index: Index, given: str = "") -> str:
    """What to call the model of an index: as given, else the folder where it was, else its name on the Hub or
    the practice assistant's."""
    if given:
        return given
    place = (index.manifest.paths or {}).get("model")
    if place is not None and (index.folder / place).is_dir():
        return str(index.folder / place)
    from unbraid.practice.assistant import folder

    name = str(index.manifest.facts["model_name"])
    return PRACTICE if name == folder().name else name
