"""Scores are means over the right tokens of the right document, however long it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from unbraid.activations.documents import Document
from unbraid.activations.text import windows
from unbraid.features.scores import document_scores, site_means
from unbraid.manifest.errors import UserError
from unbraid.model.load import LanguageModel
from unbraid.model.read import read_sites
from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.registry import build

USER = {"role": "user", "content": "Was the package delayed?"}


def _chat(reply: str, focus: tuple[int, int] | None, name: str) -> Document:
    return Document.of_messages(({**USER}, {"role": "assistant", "content": reply}), id=name, focus=focus)


def _by_hand(sae: SAE, lm: LanguageModel, document: Document, context: int, positions: str) -> tuple:
    latents, raw = [], []
    for window in windows(lm, document, context):
        ids = torch.tensor([window.input_ids])
        x = read_sites(lm, ids, torch.ones_like(ids), [sae.site])[sae.site][0][window.captured(positions)]
        with torch.no_grad():
            latents.append(sae.encode_dense(x).numpy())
        raw.append(x.numpy())
    return np.concatenate(latents).mean(axis=0), np.concatenate(raw).mean(axis=0)


@pytest.mark.parametrize("positions", ["all", "reply"])
@pytest.mark.parametrize("context", [16, 256])
def test_means_are_over_all_windows_of_a_document(
    sae: SAE, lm: LanguageModel, documents: list[Document], positions: str, context: int
) -> None:
    chosen = [d for d in documents if d.messages] if positions == "reply" else documents
    scores = document_scores(sae, lm, chosen, positions=positions, context=context, batch_tokens=64)
    assert scores.ids == tuple(document.id for document in chosen)
    assert scores.latents.shape == (len(chosen), 96) and scores.latents.dtype == np.float32
    dense = scores.latents.toarray()
    for row in (0, len(chosen) // 2, -1):
        latents, raw = _by_hand(sae, lm, chosen[row], context, positions)
        np.testing.assert_allclose(dense[row], latents, atol=1e-4)
        np.testing.assert_allclose(scores.raw[row], raw, atol=1e-4)


@pytest.mark.parametrize("architecture", ["topk", "relu"])
def test_what_is_encoded_in_parts_is_the_same(
    lm: LanguageModel, sae: SAE, documents: list[Document], monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    chosen = build(
        SAEConfig(architecture, sae.config.d_in, 64, 5 if architecture == "topk" else 0, site=sae.config.site)
    )
    with torch.no_grad():
        for weights in (chosen.W_enc, chosen.b_enc):
            weights.copy_(torch.randn(weights.shape, generator=torch.Generator().manual_seed(0)))
    whole = document_scores(chosen, lm, documents, positions="all").latents
    monkeypatch.setattr("unbraid.features.scores.ROWS", 7)
    parts = document_scores(chosen, lm, documents, positions="all", batch_tokens=64).latents
    np.testing.assert_allclose(parts.toarray(), whole.toarray(), rtol=1e-4, atol=1e-4)
    assert whole.nnz == np.count_nonzero(whole.toarray())


def test_the_focus_alone_is_read(sae: SAE, lm: LanguageModel) -> None:
    document = _chat("It was. The storm did it.", (8, 17), "a")
    scores = document_scores(sae, lm, [document])
    latents, _ = _by_hand(sae, lm, document, 256, "focus")
    np.testing.assert_allclose(scores.latents.toarray()[0], latents, atol=1e-4)
    whole = document_scores(sae, lm, [document], positions="reply")
    assert scores.tokens[0] < whole.tokens[0]
    assert not np.allclose(scores.latents.toarray(), whole.latents.toarray())


def test_without_any_focus_replies_are_read(sae: SAE, lm: LanguageModel) -> None:
    document = _chat("It was. The storm did it.", None, "a")
    np.testing.assert_array_equal(
        document_scores(sae, lm, [document]).latents.toarray(),
        document_scores(sae, lm, [document], positions="reply").latents.toarray(),
    )


def test_site_means_agree_with_the_scores(sae: SAE, lm: LanguageModel, documents: list[Document]) -> None:
    expected = document_scores(sae, lm, documents, positions="all").raw
    np.testing.assert_array_equal(site_means(lm, documents, sae.site, positions="all"), expected)


def test_mistakes_are_named(sae: SAE, lm: LanguageModel, documents: list[Document]) -> None:
    mixed = [_chat("It was.", (0, 3), "a"), _chat("No.", None, "b")]
    with pytest.raises(UserError, match="document b names no focus but others do"):
        document_scores(sae, lm, mixed)
    with pytest.raises(UserError, match="document text 0 has no token at its reply positions"):
        document_scores(sae, lm, documents, positions="reply")
    with pytest.raises(UserError, match="no document to score"):
        document_scores(sae, lm, [])
