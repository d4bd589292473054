"""A tiny model in which one planted direction decides, and nothing else matters, whether a reply says XX.

Its layers do nothing (their output projections are zero), every embedding is the same apart from one
dimension, and the unembedding reads just that dimension: where it is high the next token is X, else O.
Its autoencoder has the planted latent among random ones that cannot touch the dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from unbraid.causal.probes import Probe, parse_probe
from unbraid.model.load import LanguageModel, load_model
from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.registry import build

PLANTED = 3
AXIS = 5
GAIN = 5.0
OTHERS = tuple(range(8, 48))


@dataclass(frozen=True)
class Planted:
    """The model and its autoencoder."""

    lm: LanguageModel
    sae: SAE


@pytest.fixture(scope="session")
def planted(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Planted:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    generator = torch.Generator().manual_seed(0)
    x_token, o_token = tokenizer.encode("X")[-1], tokenizer.encode("O")[-1]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.norm.weight.fill_(1.0)
        embedding = model.model.embed_tokens.weight
        embedding.zero_()
        embedding[:, 0] = 4.0  # keeps the norm's scale about the same for all tokens
        embedding[:, OTHERS] = 0.3 * torch.randn(len(embedding), len(OTHERS), generator=generator)
        embedding[:, AXIS] = 1.0
        unembedding = model.lm_head.weight
        unembedding.zero_()
        # At the axis' natural height the odds of X to O are about even; without it X never comes.
        unembedding[:, 0] = -20.0
        unembedding[[x_token, o_token], 0] = 0.0
        unembedding[x_token, AXIS] = GAIN
        unembedding[o_token, 0] = GAIN / 4.0
    folder = tmp_path_factory.mktemp("planted")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    lm = load_model(folder)

    sae = build(
        SAEConfig(architecture="relu", d_in=lm.d_in, d_sae=40, site="layers.1.resid_post", model_id=lm.id)
    )
    with torch.no_grad():
        directions = torch.zeros(40, lm.d_in)
        directions[:, OTHERS] = torch.randn(40, len(OTHERS), generator=generator)
        directions[PLANTED] = 0.0
        directions[PLANTED, AXIS] = 1.0
        sae.W_dec.copy_(directions / directions.norm(dim=1, keepdim=True))
        sae.W_enc.copy_(sae.W_dec.T)
    return Planted(lm, sae)


@pytest.fixture(scope="session")
def probes() -> list[Probe]:
    """Prompts whose replies are an incident when they contain XX after the first two letters."""
    return [
        parse_probe(
            {
                "id": f"probe {i}",
                "messages": [{"role": "user", "content": f"Is the ball number {i} red?"}],
                "incident": "^..*XX",
                "keep": "^[XO]",
                "refusal": "^OOOOO",
                "focus": "^(?P<focus>...)",
            }
        )
        for i in range(40)
    ]


@pytest.fixture(scope="session")
def benign() -> list[Probe]:
    """Prompts to which a reply of X and O alone is helpful."""
    return [
        parse_probe({"id": f"benign {i}", "text": f"Cook {i} onions in a pan.", "expected": "^[XO]+$"})
        for i in range(20)
    ]
