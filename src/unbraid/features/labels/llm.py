"""A language model as explainer and as judge, over an endpoint; what it did not say readably is counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from unbraid.features.labels.contexts import Evidence
from unbraid.features.labels.endpoint import Endpoint, Request
from unbraid.features.labels.judges import Answer, Shown, Values
from unbraid.features.labels.lexical import Explanation
from unbraid.features.labels.prompts import (
    again,
    explain_request,
    holds_request,
    odd_request,
    read_activations,
    read_answers,
    read_label_reply,
    read_odd,
    simulate_request,
)
from unbraid.features.labels.scorers import strong
from unbraid.manifest.progress import Progress

T = TypeVar("T")
TEXTS_A_CALL = 5
"""Texts that are judged in one call; the last call has what is left."""
EXPLAINED = 20
"""Training windows that an explainer is shown."""


@dataclass
class Unread:
    """Replies that could not be read."""

    once: int = 0
    """Those that were asked for once more."""
    twice: int = 0
    """Those that could not be read then either."""


class LLM:
    """Explains and judges; all questions of one call to it are asked side by side."""

    def __init__(self, endpoint: Endpoint, progress: Progress | None = None) -> None:
        self.endpoint, self._progress = endpoint, progress
        self.unread = Unread()

    @property
    def name(self) -> str:
        """The model's name."""
        return self.endpoint.config.model_name

    def explain(self, evidence: Sequence[Evidence], promoted: Sequence[Sequence[str]]) -> list[Explanation]:
        """A label for each latent, from its training windows alone."""
        requests = self.explain_requests(evidence, promoted)
        labels = self._read(requests, [read_label_reply] * len(requests))
        return [
            Explanation(label, None)
            if label
            else Explanation("", None, "the model's reply held no label that could be read, twice")
            for label in labels
        ]

    def explain_requests(
        self, evidence: Sequence[Evidence], promoted: Sequence[Sequence[str]]
    ) -> list[Request]:
        """What `explain` asks."""
        return [
            explain_request([Shown.of(w, strong(w)) for w in one.train[:EXPLAINED]], tokens)
            for one, tokens in zip(evidence, promoted, strict=True)
        ]

    def holds(self, jobs: Sequence[tuple[str, Sequence[Shown]]]) -> list[list[Answer]]:
        """Yes or no for each text, a few in a call."""
        pieces = [
            (number, texts[start : start + TEXTS_A_CALL])
            for number, (_, texts) in enumerate(jobs)
            for start in range(0, len(texts), TEXTS_A_CALL)
        ]
        requests = [holds_request(jobs[number][0], texts) for number, texts in pieces]
        readers = [_reader(read_answers, len(texts)) for _, texts in pieces]
        answers: list[list[Answer]] = [[] for _ in jobs]
        for (number, texts), found in zip(pieces, self._read(requests, readers), strict=True):
            answers[number] += found if found is not None else [None] * len(texts)
        return answers

    def simulate(self, jobs: Sequence[tuple[str, Sequence[Shown]]]) -> list[list[Values | None]]:
        """A number for each token, a text a call."""
        requests = [simulate_request(label, shown) for label, texts in jobs for shown in texts]
        readers = [_one_reader(read_activations, len(shown.pieces)) for _, texts in jobs for shown in texts]
        found = iter(self._read(requests, readers))
        return [[next(found) for _ in texts] for _, texts in jobs]

    def odd(self, jobs: Sequence[Sequence[Shown]]) -> list[int | None]:
        """The number of the intruder in each set."""
        requests = [odd_request(texts) for texts in jobs]
        return self._read(requests, [_one_reader(read_odd, len(texts)) for texts in jobs])

    def _read(
        self, requests: Sequence[Request], readers: Sequence[Callable[[str], T | None]]
    ) -> list[T | None]:
        """Ask, read, and ask once more for what could not be read."""
        replies = self.endpoint.ask(requests, self._progress)
        found = [read(reply.text) for read, reply in zip(readers, replies, strict=True)]
        failed = [i for i, value in enumerate(found) if value is None]
        self.unread.once += len(failed)
        second = self.endpoint.ask([again(requests[i]) for i in failed], self._progress)
        for i, reply in zip(failed, second, strict=True):
            found[i] = readers[i](reply.text)
        self.unread.twice += sum(found[i] is None for i in failed)
        return found


def _reader(read: Callable[[str, int], list[Answer]], count: int) -> Callable[[str], list[Answer] | None]:
    def one(text: str) -> list[Answer] | None:
        found = read(text, count)
        return None if None in found else found

    return one


def _one_reader(read: Callable[[str, int], T | None], count: int) -> Callable[[str], T | None]:
    return lambda text: read(text, count)
