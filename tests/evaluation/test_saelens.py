"""SAELens's own numbers, from the same autoencoder and the same tokens.

Where its definition is right, ours is the same number. Where it is not, both stand side by side, and the
difference is exactly the reason that docs/EVALUATION.md gives.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unbraid.activations.documents import Document
from unbraid.evaluation.evaluate import Evaluation, evaluate
from unbraid.model.load import LanguageModel, load_model
from unbraid.model.read import read_sites
from unbraid.model.sites import Site
from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.registry import build

ROWS, T, BATCH, LAYER, WIDTH, K = 8, 24, 3, 1, 64, 8


class _Given:
    """What `run_evals` asks of an ActivationsStore."""

    context_size, store_batch_size_prompts = T, BATCH

    def __init__(self, windows: torch.Tensor) -> None:
        self.windows, self.at = windows, 0

    def get_batch_tokens(self, batch_size: int) -> torch.Tensor:
        self.at += batch_size
        return self.windows[self.at - batch_size : self.at]

    def reset_input_dataset(self) -> None:
        self.at = 0


@pytest.fixture(scope="module")
def both(
    tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Evaluation, dict[str, Any], dict[str, Any], torch.Tensor, torch.Tensor]:
    """Ours, SAELens's metrics, its numbers of latents, and the activations and reconstructions (n, d)."""
    sae_lens = pytest.importorskip("sae_lens")
    from sae_lens.evals import get_eval_everything_config, run_evals
    from sae_lens.load_model import HookedProxyLM
    from sae_lens.training.activation_scaler import ActivationScaler

    lm = load_model(tiny_gpt2)
    sae, windows, documents = _subject(lm)
    found = evaluate(sae, lm, documents, context=T)
    assert found.tokens == windows.numel()
    folder = tmp_path_factory.mktemp("saelens")
    sae.save_pretrained(folder)
    theirs = sae_lens.SAE.load_from_disk(folder)
    name = f"transformer.h.{LAYER}"
    theirs.cfg.metadata.hook_name = name
    model = HookedProxyLM(load_model(tiny_gpt2).model, lm.tokenizer, hook_names=[name])
    n = len(windows) // BATCH
    store: Any = _Given(windows)
    metrics, latents = run_evals(
        theirs, store, model, ActivationScaler(), get_eval_everything_config(BATCH, n, n)
    )
    x = _activations(lm, windows)
    return found, metrics, latents, x, sae(x).x_hat


def _activations(lm: LanguageModel, windows: torch.Tensor) -> torch.Tensor:
    site = Site(LAYER, "resid_post")
    return read_sites(lm, windows, torch.ones_like(windows), [site])[site].flatten(0, 1)


def _subject(lm: LanguageModel) -> tuple[SAE, torch.Tensor, list[Document]]:
    """An autoencoder that reconstructs in part, windows without special tokens, documents that give them."""
    words = [
        "the",
        "delayed",
        "package",
        "was",
        "a",
        "red",
        "ball",
        "that",
        "wanted",
        "two",
        "tablets",
        "with",
    ]
    rng = np.random.default_rng(0)
    windows: list[list[int]] = []
    documents: list[Document] = []
    while len(windows) < ROWS // BATCH * BATCH:
        document = Document.of_text(" ".join(rng.choice(words, 60)))
        ids = lm.tokenizer(document.text)["input_ids"][:T]
        text = lm.tokenizer.decode(ids)
        if lm.tokenizer(text)["input_ids"] == ids:
            windows.append(ids)
            documents.append(Document.of_text(text))
    sae = build(
        SAEConfig(
            "topk", lm.d_in, WIDTH, K, site=f"layers.{LAYER}.resid_post", model_name="t", model_id=lm.id
        )
    )
    ids = torch.tensor(windows)
    x = _activations(lm, ids)
    sae.initialise(x, x, torch.Generator().manual_seed(0))
    return sae.requires_grad_(False), ids, documents


SAME = {
    "l0": ("sparsity", "l0"),
    "l1": ("sparsity", "l1"),
    "mse": ("reconstruction_quality", "mse"),
    "cosine": ("reconstruction_quality", "cossim"),
    "norm_in": ("shrinkage", "l2_norm_in"),
    "norm_out": ("shrinkage", "l2_norm_out"),
    "l2_ratio": ("shrinkage", "l2_ratio"),
    "ce_clean": ("model_performance_preservation", "ce_loss_without_sae"),
    "ce_sae": ("model_performance_preservation", "ce_loss_with_sae"),
    "ce_zero": ("model_performance_preservation", "ce_loss_with_ablation"),
    "recovered_zero": ("model_performance_preservation", "ce_loss_score"),
}
Both = tuple[Evaluation, dict[str, Any], dict[str, Any], torch.Tensor, torch.Tensor]


@pytest.mark.parametrize("name", SAME)
def test_where_its_definition_is_right_the_number_is_the_same(both: Both, name: str) -> None:
    ours, theirs, *_ = both
    group, key = SAME[name]
    assert ours.metrics[name].value == pytest.approx(theirs[group][key], rel=2e-5, abs=1e-6)


def test_explained_variance_is_the_same(both: Both) -> None:
    ours, theirs, *_ = both
    expected = theirs["reconstruction_quality"]["explained_variance"]
    assert 1 - ours.metrics["fvu"].value == pytest.approx(expected, rel=1e-5)


def test_latents_are_the_same_one_by_one(both: Both) -> None:
    ours, _, theirs, *_ = both
    counts, geometry = ours.details.latents, ours.details.geometry
    np.testing.assert_allclose(counts.density, theirs["feature_density"], rtol=1e-5)
    alive = counts.windows.numpy() > 0
    heuristic = counts.fired.numpy()[alive] / counts.windows.numpy()[alive]
    np.testing.assert_allclose(
        heuristic, np.array(theirs["consistent_activation_heuristic"])[alive], rtol=1e-5
    )
    for name, key in (("encoder_norm",) * 2, ("encoder_decoder_cosine", "encoder_decoder_cosine_sim")):
        np.testing.assert_allclose(geometry[name].numpy(), theirs[key], rtol=1e-4, atol=1e-6)


def test_its_legacy_variance_depends_on_its_batch(both: Both) -> None:
    ours, theirs, _, x, x_hat = both
    error = (x - x_hat).double().square().sum(dim=1)

    def legacy(size: int) -> float:
        parts = zip(x.double().split(size), error.split(size), strict=True)
        return float(torch.cat([1 - e / (p - p.mean(dim=0)).square().sum(dim=1) for p, e in parts]).mean())

    value = theirs["reconstruction_quality"]["explained_variance_legacy"]
    assert value == pytest.approx(legacy(BATCH * T), rel=1e-4)
    assert ours.metrics["ev_legacy"].value == pytest.approx(legacy(len(x)), rel=1e-4)  # one run of 2,048
    assert abs(legacy(BATCH * T) - legacy(len(x))) > 1e-4


def test_its_bias_is_a_mean_of_ratios_of_batches(both: Both) -> None:
    ours, theirs, _, x, x_hat = both
    parts = list(zip(x.split(BATCH * T), x_hat.split(BATCH * T), strict=True))
    ratios = [float(h.square().sum(dim=1).mean() / (a * h).sum(dim=1).mean()) for a, h in parts]
    assert theirs["shrinkage"]["relative_reconstruction_bias"] == pytest.approx(np.mean(ratios), rel=1e-5)
    whole = float(x_hat.square().sum() / (x * x_hat).sum())
    assert ours.metrics["bias"].value == pytest.approx(whole, rel=1e-5)
    assert np.mean(ratios) != pytest.approx(whole, rel=1e-6)


def test_its_divergence_takes_in_the_last_token_of_a_window(both: Both) -> None:
    ours, theirs, *_ = both
    group = theirs["model_behavior_preservation"]
    for name, key in (("kl_sae", "kl_div_with_sae"), ("kl_zero", "kl_div_with_ablation")):
        # The same but for 1 token in T, whose next one is not known.
        assert ours.metrics[name].value == pytest.approx(group[key], rel=0.1)
        assert ours.metrics[name].value != pytest.approx(group[key], rel=1e-6)


def test_it_gives_no_number_for_what_never_fired(both: Both) -> None:
    ours, _, theirs, *_ = both
    dead = ours.details.latents.fired.numpy() == 0
    assert np.isnan(np.array(theirs["consistent_activation_heuristic"])[dead]).all()
    assert ours.metrics["dead"].value == pytest.approx(dead.mean())
