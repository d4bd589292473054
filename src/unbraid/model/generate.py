"""Sample replies in batches, each reply independent of its batch and with proof of the edits it ran under."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unbraid.manifest.errors import UserError
from unbraid.manifest.progress import Progress
from unbraid.model.apply import Applied, applied
from unbraid.model.edits import Edit, EditCount
from unbraid.model.load import LanguageModel, Message, positions


@dataclass(frozen=True)
class Reply:
    """What a model said to one prompt."""

    text: str
    """The reply without special tokens."""
    token_ids: tuple[int, ...]
    """Its tokens, the one that ended it left out."""
    prompt_tokens: int
    """Length of the prompt as the model read it."""
    edits: tuple[EditCount, ...]
    """What each edit did in this reply alone, in the order in which they were given."""
    finished: bool = True
    """Whether the model ended the reply itself; False when max_new_tokens cut it off."""


@torch.no_grad()
def generate(
    lm: LanguageModel,
    prompts: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seeds: Sequence[int] | None = None,
    edits: Sequence[Edit] = (),
    batch_size: int = 256,
    progress: Progress | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> list[Reply]:
    """One reply a prompt, in the order of the prompts.

    Sampling is exact at the temperature (0: greedy) by the Gumbel-max trick: each prompt draws its noise from
    its own seed (its index where no seeds are given), so a reply does not depend on the batch it was in, and
    the same seed under other edits sees the same noise. `on_token` is told of each prompt, by its
    number, and of each token as it is drawn; what it raises ends the generation. Raises UserError when a
    prompt with its reply does not fit into the model's context, or when the model is an encoder or has one.
    """
    if not lm.generates:
        raise UserError(f"{lm.name} is no decoder-only language model, so it cannot be asked for replies")
    if max_new_tokens < 1 or batch_size < 1 or not temperature >= 0:
        raise UserError(
            "max_new_tokens and batch_size must be at least 1 and temperature at least 0; "
            f"they are {max_new_tokens}, {batch_size} and {temperature}"
        )
    seeds = range(len(prompts)) if seeds is None else seeds
    if len(seeds) != len(prompts):
        raise UserError(f"there are {len(seeds)} seeds for {len(prompts)} prompts; give one for each")
    encoded = [lm.encode_prompt(messages) for messages in prompts]
    longest = max(map(len, encoded), default=0)
    if lm.context is not None and longest + max_new_tokens > lm.context:
        raise UserError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit into the model's context "
            f"of {lm.context}; shorten the prompt or ask for fewer new tokens"
        )
    replies: list[Reply | None] = [None] * len(prompts)
    # Rows of like length waste the least on padding.
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    with applied(lm, edits) as run:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            sampler = _Sampler([seeds[i] for i in chosen], temperature, lm.device)

            def drawn(row: int, token: int, chosen: Sequence[int] = chosen) -> None:
                if on_token is not None:
                    on_token(chosen[row], token)

            tokens = _decode(lm, [encoded[i] for i in chosen], max_new_tokens, sampler, run, drawn)
            counts = run.by_sequence()
            for row, i in enumerate(chosen):
                ended = bool(tokens[row]) and tokens[row][-1] in lm.eos_ids
                said = tokens[row][:-1] if ended else tokens[row]
                replies[i] = Reply(
                    lm.decode(said), tuple(said), len(encoded[i]), counts[row] if edits else (), ended
                )
            if progress is not None:
                progress(min(start + batch_size, len(order)), len(order), "replies")
    return [reply for reply in replies if reply is not None]


class _Sampler:
    """Draws tokens for rows that each own a stream of random numbers."""

    def __init__(self, seeds: Sequence[int], temperature: float, device: torch.device) -> None:
        self.streams = [np.random.default_rng(seed) for seed in seeds]
        self.temperature = temperature
        self.device = device

    def draw(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """A token for each row of logits (len(rows), vocabulary), shape (len(rows),).

        argmax(logits + T·g) with g = −log(Exp(1)) is a sample of softmax(logits / T). float64, for in float32
        the rarest exponentials are 0 and would choose their token whatever its logit.
        """
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        noise = np.empty(logits.shape, dtype=np.float64)
        for row, out in zip(rows, noise, strict=True):
            self.streams[row].standard_exponential(out=out)
        gumbel = torch.from_numpy(noise).to(logits.device, torch.float32).log_()  # negated
        return torch.sub(logits.float(), gumbel, alpha=self.temperature).argmax(dim=-1)


def _decode(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampler: _Sampler,
    run: Applied,
    on_token: Callable[[int, int], None],
) -> list[list[int]]:
    """The new tokens of each prompt, the ending token included; `on_token` gets each as it is drawn."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), lm.pad_id)
    mask = torch.ones(len(prompts), width + max_new_tokens, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, : width - len(prompt)] = 0
    ids, mask = ids.to(lm.device), mask.to(lm.device)
    places = positions(mask)
    # Only here: transformers takes 17 MB and a second, and who trains an autoencoder needs none of it.
    from unbraid.model.cache import reserved_cache

    cache = reserved_cache(lm.model.config, width + max_new_tokens)
    said: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # which prompt each row of the batch belongs to
    ended = [False] * len(prompts)
    last_only = (
        {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(lm.model.forward).parameters else {}
    )
    begin = 0
    for end in range(width, width + max_new_tokens):
        arguments: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": mask[:, :end],
            "past_key_values": cache,
        }
        if lm.layout.positions:
            arguments["position_ids"] = places[:, begin:end]
        logits = lm.model(**arguments, **last_only, use_cache=True).logits[:, -1]
        drawn = sampler.draw(logits, rows)
        for row, token in zip(rows, drawn.tolist(), strict=True):
            if not ended[row]:
                said[row].append(token)
                on_token(row, token)
                ended[row] = token in lm.eos_ids
        running = [i for i, row in enumerate(rows) if not ended[row]]
        if not running:
            break
        # Rows that have ended are dropped once they are a quarter of the batch: each drop copies the cache.
        if len(running) <= 0.75 * len(rows):
            keep = torch.tensor(running, device=lm.device)
            cache.batch_select_indices(keep)
            run.select(keep)
            drawn, mask, places = drawn[keep], mask[keep], places[keep]
            rows = [rows[i] for i in running]
        ids, begin = drawn[:, None], end
    return said
