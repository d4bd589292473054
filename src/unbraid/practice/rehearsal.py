"""Rehearse what is not learned yet: kinds of conversation that are still answered wrongly come more often.

Which of the planted rules a model learns last differs from seed to seed, and a rule that is rare among the
training text may not be learned at all before the learning rate falls.  So the share of every kind follows
its errors: every conversation is new, so the errors on the training batches themselves say what was learned.
The rules are exact (the same prompt always has the same kind of answer), so what is rehearsed how often
changes how fast a rule is learned and not what is right.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence

from unbraid.practice.world import Conversation

Kind = tuple[str, ...]

WRONG = math.log(4)
"""A token counts as wrong where the model's first guess is at least four times as likely: several right
wordings are about equally so."""
BOOST = 16.0
"""A kind that is always answered wrongly comes 1 + `BOOST` times as often as one that is always right."""
MEMORY = 0.98
"""How much of the running error of a kind stays when one more of its conversations was seen."""


def kind_of(conversation: Conversation) -> Kind:
    """The topic and what its rule looks at: everything that is true of the prompt but the hidden mode."""
    truth = sorted(conversation.truth.items())
    return (conversation.topic, *(f"{name} {value}" for name, value in truth if name != "mode"))


class Rehearsal:
    """Running errors by kind, and the choice among new conversations that follows them."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self.errors: dict[Kind, float] = {}
        """kind → running share of its conversations that were answered wrongly."""

    def note(self, batch: Sequence[Conversation], worst: Iterable[float]) -> None:
        """Learn from one step: of each conversation, the most nats that any decided token is behind the
        model's first guess.
        """
        for conversation, behind in zip(batch, worst, strict=True):
            kind, wrong = kind_of(conversation), float(behind > WRONG)
            self.errors[kind] = MEMORY * self.errors.get(kind, wrong) + (1 - MEMORY) * wrong

    def wanted(self, conversation: Conversation) -> bool:
        """Whether to train on this conversation: always if its kind is the one with the most errors."""
        most = 1 + BOOST * max(self.errors.values(), default=0)
        return self._rng.random() * most < 1 + BOOST * self.errors.get(kind_of(conversation), 1.0)

    def hardest(self) -> str:
        """The kind with the most errors, for a line of progress."""
        if not self.errors:
            return ""
        kind, error = max(self.errors.items(), key=lambda item: item[1])
        return f"hardest: {', '.join(kind)} ({error:.0%} wrong)"
