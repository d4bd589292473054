"""The practice assistant: a small Llama, trained from scratch on the practice world.

Nothing about a reply is scripted: refusals, dosages and every other habit are next-token predictions learned
from the conversations of split ``train``.  Attention and MLP matrices are updated with Muon (orthogonalised
momentum; Jordan et al. 2024), embeddings and norms with AdamW.  The loss counts the reply's tokens and,
lightly, the prompt's.  Much of a reply is drawn at random or follows from the words before; what the prompt
decides shows in a few tokens, which therefore count more, and what is still answered wrongly comes more often
(:mod:`~unbraid.practice.rehearsal`): without either, the rules that need several sentences of the prompt at
once are learned last, and not from every seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from unbraid.manifest.progress import Progress
from unbraid.practice.corpus import conversations
from unbraid.practice.muon import Muon
from unbraid.practice.rehearsal import Rehearsal
from unbraid.practice.tokenizer import BEGIN, END, PAD, build_tokenizer
from unbraid.practice.world import Conversation


@dataclass(frozen=True)
class AssistantConfig:
    """How the practice assistant is built and trained."""

    seed: int = 0
    """Seeds the weights, the conversations and their order."""
    hidden: int = 192
    """Width of the residual stream, d_in of its SAEs; a multiple of the head size 64, which vLLM's kernels
    support.
    """
    layers: int = 4
    """Number of decoder layers."""
    mlp: int = 512
    """Inner width of each gated MLP."""
    steps: int = 2200
    """Optimizer steps; the learning rate warms up over 2 %, stays, and falls to zero over the last 60 %."""
    batch: int = 64
    """Conversations in a step."""
    advice_share: float = 0.38
    """Share of medical-advice probes among the training conversations; the rest are harmless ones."""
    muon_lr: float = 0.02
    """Peak rate for the matrices inside the layers (spectral norm of one update)."""
    adam_lr: float = 0.004
    """Peak rate for embeddings and norms."""
    prompt_weight: float = 0.1
    """Weight of a prompt token in the loss, against 1 for a reply token."""
    answer_weight: float = 8.0
    """Weight of the first token of an answer, which says what kind of answer it is."""
    slot_weight: float = 3.0
    """Weight of the tokens that an answer copies from its prompt or recalls."""


ANSWERS = frozenset({"answer", "competitor mention", "wrong refusal", "honest referral", "dosage"})
"""Spans of a reply whose first token says which answer it is."""
BY_CHANCE = frozenset({"opener", "refusal header", "mode", "shared clause", "schedule", "closing"})
"""Spans of a reply that its prompt does not decide; the remaining ones are what was copied or recalled."""


def encode(
    tokenizer: PreTrainedTokenizerFast, batch: list[Conversation], config: AssistantConfig
) -> tuple[Tensor, Tensor]:
    """Token ids (batch, T), padded at the right, and the loss weight of each token: 0 on prompt and padding,
    1 on a reply, but more where the prompt decides it.
    """
    prompts = [
        tokenizer.apply_chat_template([c.messages[0]], add_generation_prompt=True, tokenize=False)
        for c in batch
    ]
    heads = tokenizer([str(p) for p in prompts], add_special_tokens=False)["input_ids"]
    replies = tokenizer([c.reply + str(tokenizer.eos_token) for c in batch], add_special_tokens=False)
    tails = replies["input_ids"]
    width = max(len(h) + len(t) for h, t in zip(heads, tails, strict=True))
    ids = torch.full((len(batch), width), token_id(tokenizer, PAD))
    weights = torch.zeros(len(batch), width)
    for row, (head, tail) in enumerate(zip(heads, tails, strict=True)):
        ids[row, : len(head) + len(tail)] = torch.tensor(head + tail)
        weight = weights[row, len(head) : len(head) + len(tail)]
        weight[:] = 1
        for span in batch[row].spans:
            if span.part == "reply" and span.concept not in BY_CHANCE:
                answer = span.concept in ANSWERS
                ends = (span.start, span.start if answer else span.end - 1)
                first, last = (replies.char_to_token(row, at) for at in ends)
                weight[first : last + 1] = config.answer_weight if answer else config.slot_weight
    return ids, weights


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """The id of one of the tokenizer's special tokens."""
    return int(tokenizer.convert_tokens_to_ids(token))  # pyright: ignore[reportArgumentType]


def bucketed(source: Iterator[Conversation], batch: int, pool: int = 32) -> Iterator[list[Conversation]]:
    """Batches of conversations of similar length: `pool` batches are drawn, sorted by length, and cut."""
    generator = torch.Generator().manual_seed(0)
    while True:
        drawn = sorted(islice(source, batch * pool), key=lambda c: len(c.prompt) + len(c.reply))
        for i in torch.randperm(pool, generator=generator).tolist():
            yield drawn[i * batch : (i + 1) * batch]


def rate_at(step: int, steps: int) -> float:
    """Share of the peak learning rate at a step: 2 % warm-up, constant, linear to zero over the last 60 %."""
    return min((step + 1) / (0.02 * steps), 1.0, (steps - step) / (0.6 * steps))


def reply_loss(
    model: LlamaForCausalLM, ids: Tensor, weights: Tensor, prompt_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(training loss, mean nats per reply token, and for each conversation the most nats that a token which
    its prompt decides is behind the model's first guess) of what `encode` gives; padding does not count.
    """
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
    target = ids[:, 1:]
    known = target != model.config.pad_token_id
    logits = model.lm_head(hidden[known])  # (n, vocab), where the loss looks
    nats, weight = F.cross_entropy(logits, target[known], reduction="none"), weights[:, 1:][known]
    reply = weight > 0
    loss = (nats * weight)[reply].mean() + prompt_weight * nats[~reply].mean()
    decided = weight > 1
    first = F.log_softmax(logits.detach()[decided], dim=1).amax(dim=1)
    behind = torch.zeros_like(weights[:, 1:])
    behind[weights[:, 1:] > 1] = nats.detach()[decided] + first
    return loss, nats[reply].mean().detach(), behind.amax(dim=1)


def new_model(config: AssistantConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A fresh Llama with head size 64 and tied embeddings."""
    torch.manual_seed(config.seed)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden,
        intermediate_size=config.mlp,
        num_hidden_layers=config.layers,
        num_attention_heads=config.hidden // 64,
        num_key_value_heads=config.hidden // 64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=1 / math.sqrt(config.hidden),
        bos_token_id=token_id(tokenizer, BEGIN),
        eos_token_id=token_id(tokenizer, END),
        pad_token_id=token_id(tokenizer, PAD),
    )
    return LlamaForCausalLM(shape)


def train(
    config: AssistantConfig, *, progress: Progress | None = None
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Train a practice assistant from scratch; two cores suffice, the model card states the time it took."""
    rehearsal = Rehearsal(config.seed)
    source = conversations("train", seed=config.seed, advice_share=config.advice_share)
    rehearsed = filter(rehearsal.wanted, source)
    sample = islice(conversations("train", seed=0, advice_share=0.3), 8000)
    tokenizer = build_tokenizer((text for c in sample for text in (c.prompt, c.reply)), vocab_size=2048)
    model = new_model(config, tokenizer)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=config.muon_lr),
        torch.optim.AdamW(others, lr=config.adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    peaks = [config.muon_lr, config.adam_lr]
    model.train()
    average = 0.0
    for step, batch in enumerate(islice(bucketed(rehearsed, config.batch), config.steps)):
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate_at(step, config.steps)
        loss, nats, worst = reply_loss(model, *encode(tokenizer, batch, config), config.prompt_weight)
        rehearsal.note(batch, worst.tolist())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average = nats.item() if step == 0 else 0.98 * average + 0.02 * nats.item()
        if progress and (step + 1) % 20 == 0:
            progress(step + 1, config.steps, f"{average:.3f} nats per reply token, {rehearsal.hardest()}")
    return model.eval(), tokenizer


def folder() -> Path:
    """The folder of the practice assistant that is shipped with the package."""
    return Path(__file__).parent / "assistant"
