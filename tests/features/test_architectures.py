"""Autoencoders of every architecture that reads a site are indexed, looked at and searched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from unbraid.activations.documents import Document
from unbraid.evaluation.evaluate import evaluate
from unbraid.features.index import IndexConfig, build_index
from unbraid.features.labels.contexts import ContextConfig, Contexts
from unbraid.features.scores import document_scores
from unbraid.features.search import Search
from unbraid.model.load import LanguageModel
from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.registry import ARCHITECTURES, build

READY = [name for name, kind in ARCHITECTURES.items() if kind.reads == "site" and not kind.training_only]


@pytest.mark.parametrize("name", READY)
def test_what_an_autoencoder_is_used_for(
    name: str, sae: SAE, lm: LanguageModel, documents: list[Document], tmp_path: Path
) -> None:
    k = 6 if ARCHITECTURES[name].uses_k else 0
    one = build(SAEConfig(name, lm.d_in, 48, k, site=str(sae.site), model_id=lm.id))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in one.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) / 2)
        one.constrain()
        if one.threshold is not None:
            one.threshold.fill_(0.2)
    own_encoder = one.encoder_rows() is not None
    config = IndexConfig(context=24, batch_tokens=100)
    index = build_index(one, lm, documents, config, tmp_path / "index", sae_id="one", beside=[(sae, "two")])
    alive = int((index.densities > 0).argmax())
    near = {(n.kind, n.sae) for n in index.latent(alive).neighbours if n.kind != "coactive"}
    kinds = ("decoder", "encoder") if own_encoder else ("decoder",)
    assert near == {(kind, other) for kind in kinds for other in (None, "two")}
    # The other way round, what has no encoder beside it has no cosine with one.
    there = build_index(sae, lm, documents, config, tmp_path / "other", sae_id="two", beside=[(one, "one")])
    assert {n.kind for n in there.latent(0).neighbours if n.sae == "one"} == set(kinds)

    hits = Search(index).activation(one, lm, "the red ball was delayed")
    assert hits and all(0 <= hit.latent < 48 for hit in hits)
    assert Search(index).direction(one.W_dec[alive].detach().numpy(), one, 1)[0].latent == alive
    if not any(hit.latent == alive for hit in hits):
        alive = hits[0].latent
    (evidence,) = Contexts(index, one, lm, ContextConfig(seed=0)).evidence([alive])
    assert evidence.latent == alive
    chats = [document for document in documents if document.messages]
    assert document_scores(one, lm, chats, one.site).latents.shape == (len(chats), 48)

    found = evaluate(one, lm, documents, tokens=60).as_dict()["metrics"]
    assert found["decoder_norm"]["value"] == pytest.approx(
        float(one.W_dec.detach().norm(dim=1).mean()), rel=1e-5
    )
    assert ("encoder_norm" in found) == own_encoder
