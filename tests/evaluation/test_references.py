"""References against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from unbraid.activations.documents import Document
from unbraid.evaluation.evaluate import evaluate
from unbraid.evaluation.references import REFERENCES, coordinates, projection, random_basis
from unbraid.model.load import LanguageModel
from unbraid.model.read import read_sites
from unbraid.sae.base import SAE


def test_principal_components_leave_the_smallest_eigenvalues(
    sae: SAE, lm: LanguageModel, documents: list[Document]
) -> None:
    found = evaluate(sae, lm, documents, references=REFERENCES, context=16)
    assert tuple(found.references) == REFERENCES
    rows = []
    from unbraid.activations.corpus import read_corpus

    corpus = read_corpus(lm, documents, tokens=None, context=16, positions="all", batch_tokens=300)
    for batch in corpus.batches:
        rows.append(read_sites(lm, batch.input_ids, batch.attention_mask, [sae.site])[sae.site][batch.chosen])
    x = torch.cat(rows).double()
    k = round(found.metrics["l0"].value)
    eigenvalues = torch.linalg.eigvalsh(torch.cov(x.T, correction=0))
    expected = eigenvalues[: len(eigenvalues) - k].sum() / eigenvalues.sum()
    assert found.references["pca"]["fvu"].value == pytest.approx(float(expected), rel=1e-3)
    d = x.shape[1]
    far = (x - x.mean(dim=0)).abs().sort(dim=1).values[:, : d - k]
    error = far.square().sum(dim=1).mean() / (x - x.mean(dim=0)).square().sum(dim=1).mean()
    assert found.references["neurons"]["fvu"].value == pytest.approx(float(error), rel=1e-3)
    for name in ("pca", "neurons", "directions"):
        assert found.references[name]["l0"].value == pytest.approx(k, abs=0.01)
    assert found.references["directions"]["fvu"].value > found.references["pca"]["fvu"].value
    assert found.references["untrained"].keys() >= {"fvu", "delta_ce", "dead", "max_decoder_cosine"}
    assert found.references["pca"].keys() >= {"fvu", "delta_ce"} and "dead" not in found.references["pca"]
    nothing, own = found.references["mean"], found.metrics
    assert nothing["fvu"].value == pytest.approx(1, abs=1e-6) and nothing["l0"].value == 0
    assert nothing["delta_ce"].value == pytest.approx(own["ce_mean"].value - own["ce_clean"].value, rel=1e-9)
    assert nothing["kl_sae"] == own["kl_mean"] and nothing["recovered_mean"].value == 0
    for metrics in found.references.values():  # the bare model is the same beside each
        assert metrics["ce_clean"] == found.metrics["ce_clean"]


def test_a_projection_on_everything_is_the_activation() -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    mean, basis = torch.ones(6), random_basis(6, 6, 0)
    torch.testing.assert_close(projection(mean, basis)(x).x_hat, x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(coordinates(mean, 6)(x).x_hat, x)
    nothing = projection(mean, basis[:0])(x)
    torch.testing.assert_close(nothing.x_hat, mean.expand(50, 6))
    half = random_basis(6, 3, 1)
    np.testing.assert_allclose(half @ half.T, np.eye(3), atol=1e-6)
