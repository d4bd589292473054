"""Who says whether a label fits a text: a deterministic judge of words, and the shape of every judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from unbraid.features.labels.contexts import Window
from unbraid.features.labels.matcher import HALF, read_label
from unbraid.features.labels.words import Words, content_stems

Answer = bool | None
"""What a judge says; None where its reply could not be read."""
Values = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Shown:
    """A window as a judge sees it."""

    pieces: tuple[str, ...]
    """Tokens as text (T,)."""
    marks: tuple[bool, ...] | None = None
    """Which of them are marked; none where nothing is asked about single tokens."""

    @classmethod
    def of(cls, window: Window, marks: tuple[bool, ...] | None = None) -> Shown:
        """A window, without what the latent does on it."""
        return cls(window.pieces, marks)


class Judge(Protocol):
    """Answers for many labels at once, so that slow judges can be asked side by side."""

    @property
    def name(self) -> str:
        """What it is called beside a score."""
        ...

    def holds(self, jobs: Sequence[tuple[str, Sequence[Shown]]]) -> list[list[Answer]]:
        """Whether each label fits each of its texts; where tokens are marked, whether it fits these."""
        ...

    def simulate(self, jobs: Sequence[tuple[str, Sequence[Shown]]]) -> list[list[Values | None]]:
        """How strongly each label expects the latent at each token of its texts (T,), 0 to 10."""
        ...

    def odd(self, jobs: Sequence[Sequence[Shown]]) -> list[int | None]:
        """Which one of each few texts does not belong to the others by its marked tokens."""
        ...


class LexicalJudge:
    """Looks for the words of a label; deterministic, and the same for whoever wrote the label."""

    name = "lexical"

    def holds(self, jobs: Sequence[tuple[str, Sequence[Shown]]]) -> list[list[Answer]]:
        """Yes where a word fits, or half of the marked tokens do; one that half fits does not."""
        return [[self._holds(label, shown) for shown in texts] for label, texts in jobs]

    def simulate(self, jobs: Sequence[tuple[str, Sequence[Shown]]]) -> list[list[Values | None]]:
        """10 at the words that fit, 5 at those that half fit."""
        return [[10 * self._values(label, shown) for shown in texts] for label, texts in jobs]

    def odd(self, jobs: Sequence[Sequence[Shown]]) -> list[int | None]:
        """The one whose marked words the others share least; the first of several."""
        return [self._odd(texts) for texts in jobs]

    def _holds(self, label: str, shown: Shown) -> bool:
        values = self._values(label, shown)
        if shown.marks is None:
            return bool(values.max(initial=0.0) > HALF)
        marked = values[np.array(shown.marks, dtype=bool)]
        # At least half of what is marked has to fit, punctuation and parts of words included.
        return bool(len(marked)) and float((marked > HALF).mean()) >= 0.5

    def _values(self, label: str, shown: Shown) -> Values:
        words = Words.of(shown.pieces)
        return words.spread(read_label(label).values(words.words))

    def _odd(self, texts: Sequence[Shown]) -> int:
        marked = [content_stems(self._marked(shown)) | {self._marked(shown).strip()} for shown in texts]
        shared = [
            sum(len(words & other) for j, other in enumerate(marked) if j != i) / max(len(words), 1)
            for i, words in enumerate(marked)
        ]
        return int(np.argmin(shared))

    def _marked(self, shown: Shown) -> str:
        marks = shown.marks or (True,) * len(shown.pieces)
        return "".join(p if m else " " for p, m in zip(shown.pieces, marks, strict=True))
