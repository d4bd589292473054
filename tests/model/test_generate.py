from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from unbraid.manifest.errors import UserError
from unbraid.model.edits import Edit, Gate
from unbraid.model.generate import generate
from unbraid.model.load import LanguageModel, load_model
from unbraid.model.sites import Site

WORDS = [
    "hello",
    "the package was delayed",
    "what",
    "a dose of two tablets, please",
    "cook",
    "refund the order",
]


def asked(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": text}] for text in texts]


def test_greedy_is_what_the_library_generates(lm: LanguageModel) -> None:
    for prompt, reply in zip(
        asked(*WORDS), generate(lm, asked(*WORDS), max_new_tokens=12, temperature=0), strict=True
    ):
        ids = lm.encode_prompt(prompt)
        there = lm.model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=12, do_sample=False
        )[0, len(ids) :].tolist()
        ended = there[-1] in lm.eos_ids
        assert list(reply.token_ids) == (there[:-1] if ended else there)
        assert reply.finished == ended and reply.prompt_tokens == len(ids)
        assert reply.text == lm.decode(reply.token_ids)


def test_replies_do_not_depend_on_batches_or_order(lm: LanguageModel, make_edit: Callable[..., Edit]) -> None:
    prompts, seeds = asked(*WORDS * 2), list(range(100, 112))
    edits = [make_edit(lm, "layers.0.resid_mid", "scale", value=0.5, positions="reply")]

    def say(order: list[int], batch_size: int) -> list[object]:
        replies = generate(
            lm,
            [prompts[i] for i in order],
            max_new_tokens=10,
            seeds=[seeds[i] for i in order],
            edits=edits,
            batch_size=batch_size,
        )
        return [reply for _, reply in sorted(zip(order, replies, strict=True), key=lambda pair: pair[0])]

    order = list(range(12))
    whole = say(order, 12)
    shuffled = np.random.default_rng(0).permutation(12).tolist()
    # Matrix products of other sizes round differently in the last bits; no near-tie is decided by them here.
    assert whole == say(order, 1) == say(shuffled, 5)


def test_sampling_follows_the_softmax(lm: LanguageModel) -> None:
    temperature, draws = 0.7, 3000
    ids = lm.encode_prompt(asked("hello")[0])
    logits = lm.model(torch.tensor([ids])).logits[0, -1].double()
    p = torch.softmax(logits / temperature, dim=0).numpy()
    replies = generate(lm, asked("hello") * draws, max_new_tokens=1, temperature=temperature, batch_size=1000)
    eos = lm.eos_ids[0]
    counts = np.bincount([r.token_ids[0] if r.token_ids else eos for r in replies], minlength=len(p))
    common = p * draws >= 5
    observed = [*counts[common], counts[~common].sum()]
    expected = [*(p[common] * draws), p[~common].sum() * draws]
    assert common.sum() > 20
    assert stats.chisquare(observed, expected).pvalue > 1e-3
    wrong = np.array([*np.sort(p[common])[::-1] * draws, p[~common].sum() * draws])
    assert stats.chisquare(observed, wrong).pvalue < 1e-6, "the test would notice another distribution"


def test_the_same_seed_hears_the_same_noise_under_every_edit(
    llama: LanguageModel, make_edit: Callable[..., Edit]
) -> None:
    prompts = asked(*WORDS)
    bare = generate(llama, prompts, max_new_tokens=8)
    nothing = make_edit(llama, "layers.1.resid_post", "scale", value=1.0)
    again = generate(llama, prompts, max_new_tokens=8, edits=[nothing])
    assert [r.token_ids for r in again] == [r.token_ids for r in bare]
    others = generate(llama, prompts, max_new_tokens=8, seeds=range(50, 56))
    assert [r.token_ids for r in others] != [r.token_ids for r in bare]


def test_every_reply_carries_exact_counts(lm: LanguageModel, make_edit: Callable[..., Edit]) -> None:
    always = {"operation": "add", "value": 0.01, "threshold": np.full(2, -np.inf)}
    ask = Gate(Site(0, "resid_pre"), np.random.default_rng(0).normal(size=lm.d_in), 0.0, 0.0)
    edits = [
        make_edit(lm, "layers.0.resid_post", positions=p, name=p, **always)
        for p in ("all", "prompt", "reply")
    ]
    edits.append(replace(edits[0], gate=ask, name="gated"))
    prompts = asked(*WORDS * 8)
    replies = generate(lm, prompts, max_new_tokens=40, edits=edits, batch_size=48, temperature=2.0)
    assert len({len(r.token_ids) for r in replies}) > 3, (
        "replies of different length, so that rows are dropped"
    )
    for reply in replies:
        # The last token is never fed back; the one that ends a reply is not one of its tokens.
        fed = len(reply.token_ids) - (not reply.finished)
        every, prompt, later, gated = reply.edits
        assert (every.considered, prompt.considered, later.considered) == (
            reply.prompt_tokens + fed,
            reply.prompt_tokens,
            fed,
        )
        assert gated.considered == (0 if gated.gated else every.considered)
        assert all(c.fired == c.considered and c.sequences == 1 for c in reply.edits)
    assert [c.name for c in replies[0].edits] == ["all", "prompt", "reply", "gated"]


def test_replies_end_at_eos(llama: LanguageModel) -> None:
    replies = generate(llama, asked(*WORDS * 8), max_new_tokens=60, temperature=3.0)
    assert any(r.finished for r in replies) and not any(
        set(r.token_ids) & set(llama.eos_ids) for r in replies
    )
    assert all(len(r.token_ids) == 60 for r in replies if not r.finished)


def test_progress_and_no_prompts(llama: LanguageModel) -> None:
    seen: list[tuple[int, int]] = []

    def progress(done: int, total: int, note: str = "") -> None:
        seen.append((done, total))

    generate(llama, asked(*WORDS), max_new_tokens=1, batch_size=4, progress=progress)
    assert seen == [(4, 6), (6, 6)]
    assert generate(llama, [], max_new_tokens=1) == []


def test_mistakes_are_named(llama: LanguageModel) -> None:
    with pytest.raises(UserError, match="context of 512"):
        generate(llama, asked("hello"), max_new_tokens=512)
    with pytest.raises(UserError, match="1 seeds for 2 prompts"):
        generate(llama, asked("a", "b"), max_new_tokens=1, seeds=[1])
    with pytest.raises(UserError, match="temperature at least 0"):
        generate(llama, asked("a"), max_new_tokens=1, temperature=-1.0)


@pytest.mark.parametrize("name", ["stories260k", "tinystories-chat-3m"])
def test_a_trained_model_tells_the_story_the_library_does(shared_models: Path, name: str) -> None:
    lm = load_model(shared_models / name)
    prompts = asked("Once upon a time there was a dog", "Tom and Lily went to the park.", "One day")
    started = time.monotonic()
    replies = generate(lm, prompts, max_new_tokens=20, temperature=0)
    assert time.monotonic() - started < 60
    for prompt, reply in zip(prompts, replies, strict=True):
        ids = torch.tensor([lm.encode_prompt(prompt)])
        there = lm.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False
        )
        assert list(reply.token_ids) == [t for t in there[0, ids.shape[1] :].tolist() if t not in lm.eos_ids]


def test_each_token_is_told_as_it_is_drawn_and_may_end_it_all(llama: LanguageModel) -> None:
    prompts = [[{"role": "user", "content": text}] for text in ("one", "two two two two", "three")]
    told: dict[int, list[int]] = {}

    def on_token(prompt: int, token: int) -> None:
        told.setdefault(prompt, []).append(token)

    replies = generate(llama, prompts, max_new_tokens=5, batch_size=2, on_token=on_token)
    for number, reply in enumerate(replies):
        ended = told[number][len(reply.token_ids) :]
        assert told[number][: len(reply.token_ids)] == list(reply.token_ids)
        assert len(ended) == int(reply.finished)
    assert replies == generate(llama, prompts, max_new_tokens=5, batch_size=2)

    def stop(_: int, __: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(llama, prompts, max_new_tokens=5, on_token=stop)
