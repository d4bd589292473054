"""What a label says without a language model: the words that it quotes, or else the words that it is made of.

A label's text decides alone.  So the deterministic judge knows no more about a latent than a reader of its
label, and a score that it gives is one of the label.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from unbraid.features.labels.words import content_stems, split_words, stem

Where = Literal["at", "after"]

_QUOTED = re.compile(r'"([^"]{1,120})"|“([^”]{1,120})”')
_AFTER = re.compile(r"\((?:mostly|only) after ([^()]*)\)")
_FOLLOWS = re.compile(r"^(?:text|words) that follows? ")
HALF = 0.5
"""How well a quoted word fits that does not come after what the label names."""


@dataclass(frozen=True)
class Matcher:
    """Which words of a text a label means."""

    phrases: tuple[tuple[str, ...], ...]
    """Word sequences, in lower case; empty for a label that quotes nothing."""
    after: frozenset[str] = frozenset()
    """Words before them; without one a phrase counts half."""
    where: Where = "at"
    """Whether the phrases themselves are meant, or all that follows them."""
    stems: frozenset[str] = frozenset()
    """Stems of a label that quotes nothing."""

    def values(self, words: tuple[str, ...]) -> NDArray[np.float32]:
        """How well each word fits, from 0 to 1: (n,) -> (n,)."""
        out = np.zeros(len(words), dtype=np.float32)
        for phrase in self.phrases:
            first, length = phrase[0], len(phrase)
            for at, word in enumerate(words):
                if word == first and words[at : at + length] == phrase:
                    fits = 1.0 if not self.after or (at > 0 and words[at - 1] in self.after) else HALF
                    reach = slice(at, at + length) if self.where == "at" else slice(at + length, None)
                    out[reach] = np.maximum(out[reach], fits)
        if self.stems:
            found = np.array([stem(word) in self.stems for word in words], dtype=np.float32)
            out = np.maximum(out, found)
        return out


@lru_cache(maxsize=4096)
def read_label(text: str) -> Matcher:
    """The matcher of a label: of its quoted phrases, or where it quotes none, of its words' stems."""
    conditions = frozenset(word for group in _AFTER.findall(text) for word in _quoted_words(group))
    rest = _AFTER.sub("", text)
    phrases = tuple(dict.fromkeys(words for quote in quotes(rest) if (words := split_words(quote))))
    if not phrases:
        return Matcher((), stems=content_stems(rest))
    return Matcher(phrases, conditions, "after" if _FOLLOWS.match(text) else "at")


def write_label(matcher: Matcher) -> str:
    """The label that `read_label` turns into this matcher; for one that quotes single words."""
    words = ", ".join(f'"{" ".join(phrase)}"' for phrase in matcher.phrases)
    if matcher.where == "after":
        return f"text that follows {words}"
    after = ", ".join(f'"{word}"' for word in sorted(matcher.after))
    kind = "word" if len(matcher.phrases) == 1 else "words"
    return f"{kind} {words}" + (f" (mostly after {after})" if after else "")


def quotes(text: str) -> list[str]:
    """What a label quotes."""
    return [straight or curly for straight, curly in _QUOTED.findall(text)]


def _quoted_words(text: str) -> list[str]:
    return [word for quote in quotes(text) for word in split_words(quote)]
