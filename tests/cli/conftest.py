"""A text and an autoencoder that fits a model, as the command line takes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from unbraid.model.load import load_model
from unbraid.sae.base import SAEConfig
from unbraid.sae.registry import build


def index_words(folder: Path, model: Path, texts: Sequence[str], *, d_sae: int, k: int) -> list[str]:
    """Write `folder`/sae, with random directions, and `folder`/text.txt; returns the command line of their
    index without --out."""
    lm = load_model(model)
    sae = build(SAEConfig("topk", lm.d_in, d_sae, k=k, site="layers.1.resid_post", model_id=lm.id))
    with torch.no_grad():
        directions = torch.randn(d_sae, lm.d_in, generator=torch.Generator().manual_seed(0))
        sae.W_dec.copy_(directions / directions.norm(dim=1, keepdim=True))
        sae.W_enc.copy_(sae.W_dec.T)
    sae.save_pretrained(folder / "sae")
    text = folder / "text.txt"
    text.write_text("\n\n".join(texts))
    return ["index", "--sae", str(folder / "sae"), "--model", str(model), "--text", str(text)]
