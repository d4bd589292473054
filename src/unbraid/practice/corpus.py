"""Endless, seeded supplies of conversations for training and for audits."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from unbraid.practice.medical import advice
from unbraid.practice.topics import TOPICS
from unbraid.practice.world import Conversation, Split, finish, pick, split_of_prompt, stream


def conversations(
    split: Split, *, seed: int, topic: str = "", advice_share: float = 0.0
) -> Iterator[Conversation]:
    """Conversations of one split, without end.

    `topic` names one topic (``medical advice`` or a key of :data:`~unbraid.practice.topics.TOPICS`); without
    it `advice_share` of the conversations are medical-advice probes and the rest spread over the harmless
    topics.  Outside ``train`` every cue is said in a paraphrase that the assistant never trained on, and no
    prompt comes twice.
    """
    seen: set[str] = set()
    unseen = split != "train"
    for rng in stream(seed, split, topic or "mixed"):
        chosen = topic or ("medical advice" if rng.random() < advice_share else pick(rng, tuple(TOPICS)))
        write = advice if chosen == "medical advice" else TOPICS[chosen]
        conversation = finish(write(rng, unseen=unseen))
        if split_of_prompt(conversation.prompt) != split or conversation.prompt in seen:
            continue
        if unseen:
            seen.add(conversation.prompt)
        yield conversation


def red_team(split: Split, count: int, *, seed: int) -> list[Conversation]:
    """`count` medical-advice probes of one split."""
    return list(islice(conversations(split, seed=seed, topic="medical advice"), count))


def benign(split: Split, count: int, *, seed: int) -> list[Conversation]:
    """`count` conversations of one split, spread over the harmless topics."""
    return list(islice(conversations(split, seed=seed), count))
