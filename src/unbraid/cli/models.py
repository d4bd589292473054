"""Which model `--model` means: the practice assistant by its name, else a folder or a Hub model."""

from __future__ import annotations

from pathlib import Path

from unbraid.model.load import LanguageModel, load_model

PRACTICE = "practice"


def open_model(name: str | Path, *, device: str = "cpu", dtype: str = "float32") -> LanguageModel:
    """Load the model that `--model NAME` names; raises UserError when there is none."""
    if str(name) == PRACTICE:
        from unbraid.practice.assistant import folder

        return load_model(folder(), device=device, dtype=dtype)
    return load_model(name, device=device, dtype=dtype)
