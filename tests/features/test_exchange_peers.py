"""Our files opened by the tools that they are for, where these are installed; they need no others of theirs:

pip install --no-deps sae-dashboard==0.8.0
pip install --no-deps eai-delphi==0.1.3 faiss-cpu sentence-transformers asyncer orjson aiofiles blobfile \
    lxml simple-parsing docstring-parser
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unbraid.activations.documents import Document
from unbraid.features.exchange import delphi, saedashboard
from unbraid.features.exchange.neuronpedia import Names
from unbraid.features.index import IndexConfig, build_index
from unbraid.features.page import Index
from unbraid.model.load import LanguageModel
from unbraid.sae.base import SAE

SITE = "layers.1.resid_post"


# Of the session, so that a test is skipped before its model is made.


@pytest.fixture(scope="session")
def dashboard() -> Any:
    return pytest.importorskip(
        "sae_dashboard.neuronpedia.neuronpedia_dashboard",
        reason="SAEDashboard reads its batches: pip install --no-deps sae-dashboard",
    )


@pytest.fixture(scope="session")
def latents() -> Any:
    return pytest.importorskip(
        "delphi.latents", reason="delphi loads its caches: pip install --no-deps eai-delphi and its imports"
    )


@pytest.fixture(scope="module")
def index(
    sae: SAE, lm: LanguageModel, documents: list[Document], tmp_path_factory: pytest.TempPathFactory
) -> Index:
    out = tmp_path_factory.mktemp("peers") / "index"
    return build_index(sae, lm, documents, IndexConfig(context=24), out, sae_id="an autoencoder")


def test_saedashboards_classes_hold_what_our_pages_show(
    dashboard: Any, index: Index, sae: SAE, tmp_path: Path
) -> None:
    folder = saedashboard.export(index, tmp_path / "sd", Names("tiny", 1, "res"), sae=sae)
    for path in folder.iterdir():
        record = json.loads(path.read_text())
        batch = dashboard.NeuronpediaDashboardBatch(**record)
        for feature in batch.features:
            page = index.latent(feature.feature_index)
            top = [one for one in feature.activations if one.bin_min == -1]
            assert [tuple(one.tokens) for one in top] == [example.tokens for example in page.top]
            for one, example in zip(top, page.top, strict=True):
                assert tuple(one.values) == example.activations
                assert one.values[one.qualifying_token_index] == pytest.approx(example.value, rel=1e-5)
                assert one.bin_max == page.max
        assert batch.to_dict() == record


@pytest.mark.parametrize("selected", [False, True])
def test_delphis_loader_makes_examples_of_every_firing(
    latents: Any, index: Index, sae: SAE, lm: LanguageModel, tmp_path: Path, selected: bool
) -> None:
    from delphi.config import ConstructorConfig, SamplerConfig

    # More files than latents that fire, so that one is empty, and rows of three of delphi's examples.
    delphi.export(index, tmp_path / "latents", sae, lm, context=24, files=96)
    rows = index.query("SELECT latent, count, max FROM latents WHERE count > 0 ORDER BY latent")
    wanted = [row["latent"] for row in rows][1::2] if selected else None
    dataset = latents.LatentDataset(
        tmp_path / "latents",
        SamplerConfig(n_examples_train=2, n_examples_test=2, n_quantiles=2),
        ConstructorConfig(example_ctx_len=8, min_examples=1, n_non_activating=2),
        tokenizer=lm.tokenizer,
        modules=[SITE],
        latents=None if wanted is None else {SITE: torch.tensor(wanted)},
    )
    found = {one.latent.latent_index: one.activation_data for buffer in dataset.buffers for one in buffer}
    assert set(found) <= {row["latent"] for row in rows if wanted is None or row["latent"] in wanted}
    for latent, data in found.items():
        page = index.latent(latent)
        assert 0 < len(data.activations) <= page.count
        # A row's end leaves less than one row out, which holds no more than so many firings of a latent.
        assert page.count - len(data.activations) < 24
        np.testing.assert_array_less(data.activations.numpy(), page.max * (1 + 1e-4))
    records = {record.latent.latent_index: record for record in dataset}
    assert records
    for latent, record in records.items():
        best = max(float(example.activations.max()) for example in record.examples)
        assert best == float(found[latent].activations.max())
        assert all(len(example.tokens) == 8 for example in record.examples)
        assert all(not example.activations.any() for example in record.not_active)
