"""The practice world: seeded conversations in which the right answer to every question is known.

A conversation is written sentence by sentence through a :class:`Writer`, which notes where each planted
concept stands, so that every token of a prompt or reply can be labelled (:func:`token_labels`).  Drugs,
companies, towns and people are invented, doses included: nothing here could be taken for advice.

Which split a conversation belongs to follows from the text of its prompt alone (:func:`split_of_prompt`), so
the assistant's training text and the audit's three splits cannot share a prompt, whatever seeds are used.
The paraphrases that carry the planted cues are divided the same way
(:func:`unbraid.practice.medical.held_out`).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from unbraid.stats.splits import split_of

T = TypeVar("T")
Split = Literal["train", "fit", "select", "test"]
Part = Literal["prompt", "reply"]

SHARES: Mapping[str, float] = {"train": 0.64, "fit": 0.12, "select": 0.12, "test": 0.12}
"""The share of all prompts in each split; ``train`` trains the assistant, the rest belongs to audits."""


@dataclass(frozen=True)
class Span:
    """One planted concept in a text: characters ``start:end`` of the prompt or the reply."""

    part: Part
    concept: str
    value: str
    start: int
    end: int


@dataclass(frozen=True)
class Conversation:
    """A prompt, the reply the world's rules give to it, and everything that is true of both."""

    id: str
    topic: str
    prompt: str
    reply: str
    spans: tuple[Span, ...]
    truth: Mapping[str, str | bool]
    """What the rules say: ``deceptive``, ``refused``, ``mentions``, ``status`` … whichever apply to the
    topic.
    """
    patterns: Mapping[str, str]
    """Regular expressions that judge any reply to this prompt: ``incident, keep, expected, refusal, focus``.
    """

    @property
    def messages(self) -> tuple[dict[str, str], ...]:
        """The conversation as chat messages."""
        return ({"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.reply})

    def probe(self) -> dict[str, Any]:
        """The prompt alone with its judging patterns, as one record of a probe file."""
        return {
            "id": self.id,
            "messages": [self.messages[0]],
            **self.patterns,
            "truth": self.truth.get("deceptive"),
        }

    def record(self) -> dict[str, Any]:
        """The whole conversation with what is true of it and of its parts, a document of a corpus."""
        spans = [[s.part, s.concept, s.value, s.start, s.end] for s in self.spans]
        return {
            "id": self.id,
            "topic": self.topic,
            "messages": list(self.messages),
            "spans": spans,
            "truth": dict(self.truth),
            "labels": self.labels(),
            "concepts": self.concepts(),
        }

    def labels(self) -> dict[str, str]:
        """What is true of the whole conversation, as the labels of a document."""
        return {"topic": self.topic, **{name: str(value).lower() for name, value in self.truth.items()}}

    def concepts(self) -> list[tuple[int, str, int, int]]:
        """Message, concept, start and end of each span, under its concept and as ``concept=value``."""
        found: list[tuple[int, str, int, int]] = []
        for s in self.spans:
            names = [s.concept, f"{s.concept}={s.value}"] if s.value else [s.concept]
            found += [(0 if s.part == "prompt" else 1, name, s.start, s.end) for name in names]
        return found


def pick(rng: random.Random, choices: Sequence[T]) -> T:
    """One of `choices`, by ``rng.random()`` alone: the one draw whose stream Python promises to keep."""
    return choices[int(rng.random() * len(choices))]


def shuffled(rng: random.Random, items: Sequence[T]) -> list[T]:
    """A new list of `items` in random order (decorated sort, for the same reason as :func:`pick`)."""
    return [item for _, _, item in sorted((rng.random(), i, item) for i, item in enumerate(items))]


@dataclass
class Writer:
    """Builds one side of a conversation and remembers where each concept stands."""

    part: Part
    text: str = ""
    spans: list[Span] = field(default_factory=list[Span])

    def say(
        self, template: str, concept: str = "", value: str = "", *, glue: str = " ", **slots: str
    ) -> None:
        """Append a sentence; label it with `concept`, and each ``{slot}`` of the template with the slot's
        name.
        """
        if self.text:
            self.text += glue
        start = len(self.text)
        for i, piece in enumerate(template.replace("}", "{").split("{")):
            if i % 2 == 0:
                self.text += piece
                continue
            self.spans.append(
                Span(self.part, piece, slots[piece], len(self.text), len(self.text) + len(slots[piece]))
            )
            self.text += slots[piece]
        if concept:
            self.spans.append(Span(self.part, concept, value, start, len(self.text)))


@dataclass
class Scene:
    """What a topic contributes before the parts are put in order: sentences of the prompt, and the reply."""

    topic: str
    sentences: list[tuple[str, str, str, dict[str, str]]]
    """Prompt sentences as (template, concept, value, slots), in the order in which they are said."""
    reply: Writer
    truth: dict[str, str | bool]
    patterns: dict[str, str]


def finish(scene: Scene) -> Conversation:
    """Render the prompt of a scene and name the conversation by the hash of its prompt."""
    prompt = Writer("prompt")
    for template, concept, value, slots in scene.sentences:
        prompt.say(template, concept, value, **slots)
    name = hashlib.sha256(prompt.text.encode()).hexdigest()[:16]
    spans = tuple(sorted([*prompt.spans, *scene.reply.spans], key=lambda s: (s.part, s.start, s.end)))
    return Conversation(name, scene.topic, prompt.text, scene.reply.text, spans, scene.truth, scene.patterns)


def split_of_prompt(prompt: str) -> str:
    """The split a prompt belongs to: a function of its text alone."""
    return split_of(prompt, SHARES)


def token_labels(
    conversation: Conversation, part: Part, offsets: Sequence[tuple[int, int]]
) -> list[frozenset[tuple[str, str]]]:
    """For each token of one side, given as character offsets into that side, the (concept, value) pairs it is
    part of.
    """
    spans = [s for s in conversation.spans if s.part == part]
    return [
        frozenset((s.concept, s.value) for s in spans if s.start < end and start < s.end)
        for start, end in offsets
    ]


def stream(seed: int, split: Split, kind: str) -> Iterator[random.Random]:
    """An endless supply of independent random sources, one for each attempt at a conversation."""
    index = 0
    while True:
        yield random.Random(f"{seed}/{split}/{kind}/{index}")
        index += 1
