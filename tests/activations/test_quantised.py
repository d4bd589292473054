"""Models with quantised weights are read and captured like any other, under an id of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from unbraid.activations.capture import capture
from unbraid.activations.documents import Document
from unbraid.activations.reading import CaptureConfig
from unbraid.model.load import LanguageModel, load_model, wrap_model
from unbraid.model.read import read_sites
from unbraid.model.sites import Site

torchao = pytest.importorskip("torchao.quantization", reason="torchao, which quantises, is not installed")

SITE = Site(1, "resid_post")


@pytest.mark.parametrize("how", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_a_model_quantised_in_memory(
    lm: LanguageModel, texts: Callable[..., Iterator[Document]], tmp_path: Path, how: str
) -> None:
    model = deepcopy(lm.model)
    torchao.quantize_(model, getattr(torchao, how)())
    quantised = wrap_model(model, lm.tokenizer, name="quantised")
    assert quantised.layout.sites == lm.layout.sites
    assert quantised.id == wrap_model(deepcopy(model), lm.tokenizer, name="again").id != lm.id

    ids = torch.randint(3, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    exact, near = (read_sites(m, ids, torch.ones_like(ids), [SITE])[SITE] for m in (lm, quantised))
    assert 0 < (near - exact).norm() < 0.05 * exact.norm()

    config = CaptureConfig(sites=(SITE,), context=64, batch_tokens=256, dtype="float32")
    stores = [capture(m, texts(5), config, tmp_path / m.name) for m in (lm, quantised)]
    exact, near = (store.read(SITE, 0) for store in stores)
    assert 0 < (near - exact).norm() < 0.05 * exact.norm()
    assert stores[0].model_id != stores[1].model_id


def test_weights_only_and_inputs_as_well_are_two_models(lm: LanguageModel) -> None:
    ids: set[str] = set()
    for how in (torchao.Int8WeightOnlyConfig(), torchao.Int8DynamicActivationInt8WeightConfig()):
        model = deepcopy(lm.model)
        torchao.quantize_(model, how)
        ids.add(wrap_model(model, lm.tokenizer, name="quantised").id)
    assert len(ids) == 2


def test_a_quantised_folder(lm: LanguageModel, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, TorchAoConfig

    lm.model.save_pretrained(tmp_path / "plain")
    how = TorchAoConfig(quant_type=torchao.Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=how)
    model.save_pretrained(tmp_path / "int8")
    lm.tokenizer.save_pretrained(tmp_path / "int8")
    found = load_model(tmp_path / "int8")
    assert found.id != lm.id and type(found.model.model.layers[0].mlp.up_proj.weight) is torchao.Int8Tensor
    ids = torch.arange(3, 19)[None]
    exact, near = (read_sites(m, ids, torch.ones_like(ids), [SITE])[SITE] for m in (lm, found))
    assert 0 < (near - exact).norm() < 0.05 * exact.norm()
