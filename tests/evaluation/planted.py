"""Documents whose labels and concepts the tests know, and autoencoders whose latents are those concepts."""

from __future__ import annotations

import numpy as np
import torch

from unbraid.activations.documents import Document
from unbraid.evaluation.labelled import Pooled
from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.registry import build

COLOURS = ("red", "green", "blue")


def labelled(count: int, values: tuple[str, ...] = COLOURS) -> list[Document]:
    """`count` texts, each with a label `colour`, in turn."""
    return [
        Document.of_text(f"text number {i}", labels={"colour": values[i % len(values)]}) for i in range(count)
    ]


def one_latent_a_colour(
    documents: list[Document], d_in: int = 8, noise: float = 0.3, seed: int = 0
) -> tuple[Pooled, SAE]:
    """Means of documents whose colour is a direction, and an autoencoder with that direction as a latent."""
    rng = np.random.default_rng(seed)
    place = {colour: i for i, colour in enumerate(COLOURS)}
    codes = np.zeros((len(documents), 2 * d_in))
    raw = rng.normal(size=(len(documents), d_in)) * noise
    for row, document in enumerate(documents):
        codes[row, place[document.labels["colour"]]] = 2.0
        raw[row, place[document.labels["colour"]]] += 2.0
    sae = build(SAEConfig("relu", d_in, 2 * d_in, site="layers.0.resid_post"))
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([torch.eye(d_in), -torch.eye(d_in)]))
        sae.W_enc.copy_(sae.W_dec.T)
    from scipy.sparse import csr_array

    fired = (codes > 0).sum(axis=0).astype(np.float64)
    pooled = Pooled(raw, {"sae": csr_array(codes)}, {"sae": fired}, np.ones(len(documents), dtype=np.int64))
    return pooled, sae.requires_grad_(False)
