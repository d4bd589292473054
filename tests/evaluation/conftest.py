"""A tiny model, an autoencoder that reconstructs it well, and documents."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from unbraid.activations.documents import Document
from unbraid.model.load import LanguageModel, load_model
from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.registry import build

TEXT = "the delayed package was a red ball that wanted two tablets with water and a pan"


@pytest.fixture(scope="session")
def lm(tiny_llama: Path) -> LanguageModel:
    return load_model(tiny_llama)


@pytest.fixture(scope="session")
def documents() -> list[Document]:
    """Texts of different lengths, and two conversations."""
    words = TEXT.split()
    texts = [" ".join(words[i:] + words[: 2 * i]) for i in range(1, 9)]
    found = [Document.of_text(text) for text in texts]
    for i in range(2):
        messages = [{"role": "user", "content": texts[i]}, {"role": "assistant", "content": texts[-i - 1]}]
        found.append(Document.of_messages(messages))
    return found


@pytest.fixture(scope="session")
def sae(lm: LanguageModel) -> SAE:
    """Tied latents in antipodal pairs along an orthonormal basis; half of them may fire at a token."""
    d = lm.d_in
    site = "layers.1.resid_post"
    sae = build(SAEConfig("topk", d, 2 * d, d // 2, site=site, model_name="tiny", model_id=lm.id))
    basis, _ = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([basis, -basis]))
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_dec.fill_(0.1)
    return sae.requires_grad_(False)
