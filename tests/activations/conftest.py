"""A corpus and a model that the room's tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from unbraid.activations.documents import Document
from unbraid.model.load import LanguageModel, load_model

WORDS = ["once", "upon", "a", "time", "the", "doctor", "had", "package", "red", "ball", "wait", "Zoë", "😀"]


def _texts(n: int, seed: int = 0) -> Iterator[Document]:
    rng = np.random.default_rng(seed)
    for _ in range(n):
        yield Document.of_text(" ".join(rng.choice(WORDS, size=int(rng.integers(1, 60)))))


def _chats(n: int, seed: int = 0) -> Iterator[Document]:
    rng = np.random.default_rng(seed)
    for _ in range(n):
        turns = [" ".join(rng.choice(WORDS, size=int(rng.integers(2, 9)))) for _ in range(4)]
        messages = [
            {"role": role, "content": turn}
            for role, turn in zip(("user", "assistant", "user", "assistant"), turns, strict=True)
        ]
        start = turns[-1].index(" ") + 1
        mask = [(0, 0, 2), (3, start, len(turns[-1]))]
        focus = (start, (turns[-1] + " ").index(" ", start))
        yield Document.of_messages(messages, focus=focus, mask=mask)


@pytest.fixture(scope="session")
def texts() -> Callable[..., Iterator[Document]]:
    """Makes n short and long texts, the same for the same seed."""
    return _texts


@pytest.fixture(scope="session")
def chats() -> Callable[..., Iterator[Document]]:
    """Makes n conversations of four turns whose focus is the second word of the last reply, and a mask."""
    return _chats


@pytest.fixture(scope="session")
def lm(tiny_llama: Path) -> LanguageModel:
    return load_model(tiny_llama)
