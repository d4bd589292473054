from __future__ import annotations

from dataclasses import replace

import torch

from unbraid.practice.assistant import (
    ANSWERS,
    BY_CHANCE,
    AssistantConfig,
    encode,
    rate_at,
    reply_loss,
    token_id,
    train,
)
from unbraid.practice.corpus import benign, red_team
from unbraid.practice.tokenizer import PAD

SMALL = AssistantConfig(hidden=64, layers=1, mlp=64, steps=30, batch=8)


def test_training_is_repeatable_learns_and_counts_reply_tokens_only() -> None:
    torch.set_num_threads(1)
    notes: list[str] = []
    model, tokenizer = train(SMALL, progress=lambda done, total, note="": notes.append(note))
    again, _ = train(SMALL)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    ids, weights = encode(tokenizer, benign("train", 12, seed=9), SMALL)
    with torch.no_grad():
        loss, nats, worst = reply_loss(model, ids, weights, 0.1)
        logits = model(input_ids=ids).logits[:, :-1]
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    weight, known = weights[:, 1:], ids[:, 1:] != token_id(tokenizer, PAD)
    assert torch.allclose(nats, each[weight > 0].mean(), atol=1e-5)
    expected = (each * weight)[weight > 0].mean() + 0.1 * each[known & (weight == 0)].mean()
    assert torch.allclose(loss, expected, atol=1e-5)
    behind = each + logits.log_softmax(dim=2).amax(dim=2)  # 0 where the right token is the first guess
    most = [nats[told > 1].max() for nats, told in zip(behind, weight, strict=True)]
    assert torch.allclose(worst, torch.stack(most), atol=1e-5)
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
    assert (
        rates[0] < 0.1 and max(rates) == 1.0 and rates[390] == 1.0 and rates[700] < 0.51 and rates[-1] < 0.01
    )


def test_what_the_prompt_decides_weighs_more() -> None:
    _, tokenizer = train(replace(SMALL, steps=1))
    asked = [*benign("train", 30, seed=3), *red_team("train", 10, seed=3)]
    ids, weights = encode(tokenizer, asked, SMALL)
    for row, conversation in enumerate(asked):
        weight = weights[row]
        told = tokenizer.decode(ids[row, weight > 0], skip_special_tokens=True)
        assert told == conversation.reply and set(weight.tolist()) <= {0, 1, 3, 8}
        spans = [s for s in conversation.spans if s.part == "reply" and s.concept not in BY_CHANCE]
        (answer,) = [s for s in spans if s.concept in ANSWERS]
        slots = [conversation.reply[s.start : s.end] for s in spans if s != answer]
        (first,) = ids[row, weight == SMALL.answer_weight]
        assert conversation.reply[answer.start :].startswith(tokenizer.decode(first).strip())
        copied = tokenizer.decode(ids[row, weight == SMALL.slot_weight]).split()
        assert sorted(copied) == sorted(" ".join(slots).split())
