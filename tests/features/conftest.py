"""A tiny model and an autoencoder with random weights that fits it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from unbraid.activations.documents import Document
from unbraid.model.load import LanguageModel, load_model
from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.registry import build

SITE = "layers.1.resid_post"
WORDS = "the delayed package was a red ball that wanted two tablets with water and a pan".split()  # noqa: SIM905


@pytest.fixture(scope="session")
def lm(tiny_llama: Path) -> LanguageModel:
    return load_model(tiny_llama)


@pytest.fixture(scope="session")
def sae(lm: LanguageModel) -> SAE:
    generator = torch.Generator().manual_seed(0)
    sae = build(SAEConfig(architecture="topk", d_in=lm.d_in, d_sae=96, k=6, site=SITE, model_id=lm.id))
    with torch.no_grad():
        directions = torch.randn(96, lm.d_in, generator=generator)
        sae.W_dec.copy_(directions / directions.norm(dim=1, keepdim=True))
        sae.W_enc.copy_(sae.W_dec.T)
    return sae


@pytest.fixture(scope="session")
def documents() -> list[Document]:
    """Texts of different lengths, two of them the same, and conversations with a focus."""
    texts = [" ".join(WORDS[i:] + WORDS[: i % 5] * 3) for i in range(len(WORDS))]
    found = [Document.of_text(text, id=f"text {i}") for i, text in enumerate([*texts, texts[0]])]
    for i in range(6):
        messages = ({"role": "user", "content": texts[i]}, {"role": "assistant", "content": texts[-i - 1]})
        found.append(Document.of_messages(messages, id=f"chat {i}"))
    return found
