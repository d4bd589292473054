"""A fused kernel says what the family's own steps say."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
import transformers as hf

from unbraid.model.load import wrap_model

IDS = torch.tensor([[5, 9, 30, 41, 17, 60, 2, 11], [8, 20, 50, 6, 19, 33, 12, 3]])
LEFT = torch.tensor([[1] * 8, [0, 0, 0, 1, 1, 1, 1, 1]])


def models(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A GPT-Neo with global and local layers as transformers has it, and the same one wrapped."""
    torch.manual_seed(0)
    config = hf.GPTNeoConfig(
        vocab_size=64, hidden_size=32, num_layers=4, num_heads=4, window_size=3, intermediate_size=48,
        max_position_embeddings=32, attention_types=[[["global", "local"], 2]], pad_token_id=0,
        bos_token_id=1, eos_token_id=2, attention_dropout=0.5,
    )  # fmt: skip
    theirs = hf.GPTNeoForCausalLM(config).to(dtype).eval()
    with torch.no_grad():  # the family does not divide by √d, so weights as they start attend evenly
        for parameter in theirs.parameters():
            parameter.mul_(4)
    return theirs, wrap_model(deepcopy(theirs), None, name="neo", id="x").model


@pytest.mark.parametrize("mask", [torch.ones_like(IDS), LEFT, LEFT.flip(1)])
def test_padded_and_whole_rows_are_what_the_family_says(mask: torch.Tensor) -> None:
    theirs, ours = models()
    expected = theirs(IDS, attention_mask=mask).logits[mask.bool()]
    given = ours(IDS, attention_mask=mask).logits
    assert bool(given.isfinite().all())  # at padding too, where a token may see nothing
    torch.testing.assert_close(given[mask.bool()], expected, rtol=1e-5, atol=1e-5)
    assert not theirs(IDS[:1, :3]).logits.allclose(theirs(IDS[:1, :3].flip(1)).logits.flip(1), atol=1e-2)


def test_the_window_of_local_layers_is_kept() -> None:
    _, ours = models()
    layer = ours.transformer.h[1].attn.attention
    x = torch.randn(1, 8, 32)
    changed = x.clone()
    changed[:, 0] += 1
    moved = (layer(x)[0] - layer(changed)[0]).abs().amax(dim=(0, 2)) > 1e-6
    assert moved.tolist() == [True] * 3 + [False] * 5


def test_replies_by_a_cache_are_the_same() -> None:
    theirs, ours = models()
    said = [
        model.generate(IDS, attention_mask=LEFT, max_new_tokens=12, do_sample=False, eos_token_id=None)
        for model in (theirs, ours)
    ]
    assert said[0].equal(said[1])


def test_lower_precision_is_as_near_to_float32() -> None:
    exact = models()[0](IDS).logits
    theirs, ours = (model(IDS).logits.float() for model in models(torch.bfloat16))
    assert ours.dtype == torch.float32 and (ours - exact).norm() <= 1.2 * (theirs - exact).norm()


def test_a_copy_attends_with_its_own_buffers() -> None:
    _, ours = models()
    copy = deepcopy(ours)
    before = copy(IDS).logits
    for block in ours.transformer.h:
        block.attn.attention.bias.zero_()
    assert copy(IDS).logits.equal(before) and not ours(IDS).logits.equal(before)


def test_gelu_is_the_same_one() -> None:
    torch.manual_seed(0)
    config = hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    theirs = hf.GPT2LMHeadModel(config).eval()
    ours = wrap_model(deepcopy(theirs), None, name="gpt2", id="x").model
    kinds = {type(m).__name__ for m in ours.modules()} - {type(m).__name__ for m in theirs.modules()}
    assert kinds == {"GELU"}
    x = torch.linspace(-8, 8, 400)
    torch.testing.assert_close(ours.transformer.h[0].mlp.act(x), theirs.transformer.h[0].mlp.act(x))
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=1e-5)
