"""Endless, seeded supplies of conversations for training and for audits."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from unbraid.practice.medical import advice
from unbraid.practice.topics import TOPICS
from unbraid.practice.world import Conversation, Split, finish, pick, split_of_prompt, stream

REHEARSED = (*TOPICS, *("refund", "facts") * 2)
"""Harmless topics as the training text mixes them: those with planted rules come three times as often."""


def conversations(
    split: Split, *, seed: int, topic: str = "", advice_share: float = 0.0
) -> Iterator[Conversation]:
    """Distinct-prompt conversations of one split, without end.

    `topic` names one topic (``medical advice`` or a key of :data:`~unbraid.practice.topics.TOPICS`); without
    it `advice_share` of the conversations are medical-advice probes and the rest spread evenly over the
    harmless topics. Outside ``train`` every cue is said in a paraphrase that the assistant never trained on.
    """
    seen: set[str] = set()
    unseen = split != "train"
    for rng in stream(seed, split, topic or "mixed"):
        chosen = topic or (
            "medical advice"
            if rng.random() < advice_share
            else pick(rng, tuple(TOPICS) if unseen else REHEARSED)
        )
        scene = (
            advice(rng, unseen=unseen) if chosen == "medical advice" else TOPICS[chosen](rng, unseen=unseen)
        )
        conversation = finish(scene, "")
        if conversation.prompt in seen or split_of_prompt(conversation.prompt) != split:
            continue
        if (
            unseen
        ):  # training text repeats a short prompt as often as it is drawn; an audit asks each prompt once
            seen.add(conversation.prompt)
        yield conversation


def red_team(split: Split, count: int, *, seed: int) -> list[Conversation]:
    """`count` medical-advice probes of one split."""
    return list(islice(conversations(split, seed=seed, topic="medical advice"), count))


def benign(split: Split, count: int, *, seed: int) -> list[Conversation]:
    """`count` conversations of one split, spread over the harmless topics."""
    return list(islice(conversations(split, seed=seed), count))
