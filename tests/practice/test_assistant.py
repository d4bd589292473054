from __future__ import annotations

from dataclasses import replace

import torch

from unbraid.practice.assistant import AssistantConfig, encode, rate_at, reply_loss, token_id, train
from unbraid.practice.corpus import benign
from unbraid.practice.tokenizer import PAD

SMALL = AssistantConfig(hidden=64, layers=1, mlp=64, steps=30, batch=8)


def test_training_is_repeatable_learns_and_counts_reply_tokens_only() -> None:
    torch.set_num_threads(1)
    notes: list[str] = []
    model, tokenizer = train(SMALL, progress=lambda done, total, note="": notes.append(note))
    again, _ = train(SMALL)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    ids, reply = encode(tokenizer, benign("train", 12, seed=9))
    pad = token_id(tokenizer, PAD)
    with torch.no_grad():
        total, nats = reply_loss(model, ids, reply, pad, 0.0)
        logits = model(input_ids=ids).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits[reply[:, 1:]], ids[:, 1:][reply[:, 1:]])
    assert torch.allclose(nats, expected, atol=1e-5) and torch.equal(total, nats)
    assert nats < 5.0  # log(vocabulary) is 7.4
    assert notes and "nats" in notes[-1]


def test_other_seed_other_weights() -> None:
    config = replace(SMALL, steps=1)
    a, _ = train(config)
    b, _ = train(replace(config, seed=1))
    assert not torch.equal(next(a.parameters()), next(b.parameters()))


def test_head_size_is_64_and_any_text_can_be_encoded() -> None:
    model, tokenizer = train(replace(SMALL, steps=1))
    assert model.config.hidden_size // model.config.num_attention_heads == 64
    text = "Ünïcode, 漢字 and 😀 \x00"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_learning_rate_warms_up_stays_and_falls_to_zero() -> None:
    rates = [rate_at(step, 1000) for step in range(1000)]
    assert rates[0] < 0.1 and max(rates) == 1.0 and rates[500] == 1.0 and rates[-1] < 0.01
