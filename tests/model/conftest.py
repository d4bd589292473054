from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unbraid.model.edits import Edit
from unbraid.model.load import LanguageModel, load_model
from unbraid.model.sites import Site


@pytest.fixture(scope="session")
def llama(tiny_llama: Path) -> LanguageModel:
    return load_model(tiny_llama)


@pytest.fixture(scope="session")
def gpt2(tiny_gpt2: Path) -> LanguageModel:
    return load_model(tiny_gpt2)


@pytest.fixture(params=["llama", "gpt2"])
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def make_edit() -> Callable[..., Edit]:
    """Edits of two random latents; thresholds of 0 make them fire at about three tokens in four."""

    def make(lm: LanguageModel, site: str, operation: str = "clamp", **changes: Any) -> Edit:
        rng = np.random.default_rng(changes.pop("seed", 0))
        fields: dict[str, Any] = {
            "site": Site.parse(site),
            "operation": operation,
            "value": 1.5,
            "probe": rng.normal(size=(2, lm.d_in)),
            "bias": np.zeros(2),
            "threshold": np.zeros(2),
            "write": rng.normal(size=(2, lm.d_in)),
        }
        return Edit(**{**fields, **changes})

    return make
