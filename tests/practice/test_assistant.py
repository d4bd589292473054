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
    ids, reply, decides = encode(tokenizer, benign("train", 12, seed=9))
    with torch.no_grad():
        loss, nats = reply_loss(model, ids, reply, decides, SMALL)
        logits = model(input_ids=ids).logits[:, :-1]
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    after, first, known = reply[:, 1:], decides[:, 1:], ids[:, 1:] != token_id(tokenizer, PAD)
    assert torch.allclose(nats, each[after].mean(), atol=1e-5)
    weighted = (each + (SMALL.decision_weight - 1) * each * first)[after].mean()
    assert torch.allclose(loss, weighted + SMALL.prompt_weight * each[known & ~after].mean(), atol=1e-5)
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


def test_what_the_prompt_decides_is_marked_token_by_token() -> None:
    _, tokenizer = train(replace(SMALL, steps=1))
    asked = [*benign("train", 30, seed=3), *red_team("train", 10, seed=3)]
    ids, reply, decides = encode(tokenizer, asked)
    assert not (decides & ~reply).any()
    for row, conversation in enumerate(asked):
        spans = [s for s in conversation.spans if s.part == "reply" and s.concept not in BY_CHANCE]
        (answer,) = [s for s in spans if s.concept in ANSWERS]
        told = [tokenizer.decode(token).strip() for token in ids[row, decides[row]]]
        assert conversation.reply[answer.start :].startswith(told[0]) or spans[0] != answer
        slots = [conversation.reply[s.start : s.end] for s in spans if s != answer]
        for slot in slots:  # every word of what was copied or recalled, and little else
            assert slot.replace(" ", "") in "".join(told)
        assert sum(map(len, told)) <= sum(map(len, slots)) + len(
            conversation.reply[answer.start :].split()[0]
        )
