"""Tokens as words: what a reader without a tokenizer would see, and which words a latent fires on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*|[^\w\s]|_+")
LONGEST = 40
"""Characters of a word that may stand in a label."""
_ENDINGS = ("ations", "ation", "ings", "ing", "edly", "ies", "ed", "es", "ly", "s")
_EMPTY = frozenset(
    """
a about all also an and any are as at be been but by can could do does for from had has have he her
his how i if in into is it its like may me more most my no not of on one or other our out she so
some such text texts than that the their them then there these they this to token tokens two up us
used uses was we were what when where which who will with word words would you your
""".split()  # noqa: SIM905
)


def split_words(text: str) -> tuple[str, ...]:
    """The words and punctuation marks of a text, in lower case."""
    return tuple(match.group().lower() for match in WORD.finditer(text))


def stem(word: str) -> str:
    """A word without a common English ending: enough for "refunds" and "refunded" to be one."""
    for ending in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word


def is_content(word: str) -> bool:
    """Whether a word says something."""
    return word[0].isalnum() and word not in _EMPTY


def content_stems(text: str) -> frozenset[str]:
    """Stems of the words of a description that say something."""
    return frozenset(stem(word) for word in split_words(text) if is_content(word))


@dataclass(frozen=True, eq=False)
class Words:
    """The words of a window of tokens; n is their number, T that of the tokens."""

    words: tuple[str, ...]
    """In lower case (n,)."""
    tokens: tuple[NDArray[np.int64], ...]
    """The tokens that each word shares a character with (n,)."""
    length: int
    """T."""

    @classmethod
    def of(cls, pieces: Sequence[str]) -> Words:
        """Words of tokens as text, which are read one after the other (T,)."""
        ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
        starts = ends - np.array([len(piece) for piece in pieces], dtype=np.int64)
        found = list(WORD.finditer("".join(pieces)))
        tokens = tuple(np.flatnonzero((starts < m.end()) & (ends > m.start())) for m in found)
        return cls(tuple(m.group().lower() for m in found), tokens, len(pieces))

    def strongest(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """For each word the largest of its tokens' values (T,) -> (n,)."""
        return np.array([values[rows].max() for rows in self.tokens], dtype=np.float32)

    def spread(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """The words' values (n,) at their tokens (T,); 0 at tokens of no word."""
        out = np.zeros(self.length, dtype=np.float32)
        for value, rows in zip(values, self.tokens, strict=True):
            out[rows] = np.maximum(out[rows], value)
        return out
