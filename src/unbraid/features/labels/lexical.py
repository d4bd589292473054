"""A label from the words alone, without a language model: which words set a latent's contexts apart.

Words are compared between places where the latent fires and places where it does not, by smoothed log-odds
(Monroe, Colaresi and Quinn 2008, "Fightin' words"), firings weighed by their strength, so that many weak ones
do not outvote the strong.  A few words are then taken one after the other as long as they raise the F1 of
telling the training windows apart.  Two kinds of label compete: the latent fires at these words, or in text
that follows them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unbraid.features.geometry import TokenEffect
from unbraid.features.labels.contexts import Evidence, Window
from unbraid.features.labels.label import clean
from unbraid.features.labels.matcher import Matcher, Where, write_label
from unbraid.features.labels.words import LONGEST, Words
from unbraid.manifest.errors import UserError

CANDIDATES = 30
"""Words that are tried."""
MOST = 6
"""Words that a label may name."""
GAIN = 0.02
"""What a further word has to add to F1."""
LEAST = 0.3
"""F1 on the training windows below which no words are offered at all."""
PRIOR = 0.5
"""Firings that every word is given to begin with, on both sides."""
EARLY = 3
"""Words at the beginning of a window that count as its beginning."""


@dataclass(frozen=True)
class Explanation:
    """What an explainer says about a latent."""

    text: str
    """The label; empty where there is none."""
    matcher: Matcher | None
    """What of it the deterministic judge understands."""
    why_not: str = ""
    """Why there is no label."""


@dataclass(frozen=True, eq=False)
class _Read:
    """A training window as words, and how strongly the latent fires at each, as a share of its maximum."""

    words: tuple[str, ...]
    strength: NDArray[np.float32]
    fires: bool


def explain(evidence: Evidence, promoted: Sequence[TokenEffect] = ()) -> Explanation:
    """A label from the training windows of `evidence`; `promoted` output tokens are mentioned beside it."""
    if not evidence.train or not evidence.train_negatives:
        return Explanation(
            "", None, "there are no training windows of both kinds: " + "; ".join(evidence.notes)
        )
    largest = max(window.max for window in evidence.train)
    read = [_read(window, largest) for window in (*evidence.train, *evidence.train_negatives)]
    if not any(word.strength.max(initial=0) > 0 for word in read):
        return Explanation("", None, "it fires on no word in its training windows")
    best, found = 0.0, None
    for where in ("at", "after"):
        f1, matcher = _chosen(read, where)
        if f1 > best + (GAIN if found else 0):  # of two that do as well, the one that names the place
            best, found = f1, matcher
    if found is None or best < LEAST:
        return Explanation("", None, f"no few words set its contexts apart (F1 {best:.2f} in training)")
    if found.where == "at":
        found = _conditioned(found, read)
    return Explanation(_described(found, read, promoted), found)


def _read(window: Window, largest: float) -> _Read:
    words = Words.of(window.pieces)
    return _Read(words.words, words.strongest(window.activations) / largest, bool(window.max > 0))


def _chosen(read: Sequence[_Read], where: Where) -> tuple[float, Matcher | None]:
    """Words taken greedily by F1 on the windows, and that F1."""
    best, chosen = 0.0, Matcher((), where=where)
    left = _candidates(read, where)
    while left and len(chosen.phrases) < MOST:
        tried = [(_f1(Matcher((*chosen.phrases, (word,)), where=where), read), word) for word in left]
        f1, word = max(tried, key=lambda pair: pair[0])
        if f1 < best + GAIN:
            break
        best, chosen = f1, Matcher((*chosen.phrases, (word,)), where=where)
        left = [other for other in left if other != word]
    return best, chosen if chosen.phrases else None


def _candidates(read: Sequence[_Read], where: Where) -> list[str]:
    """Words by how far they belong to where the latent fires rather than to where it does not."""
    inside: dict[str, float] = {}
    outside: dict[str, float] = {}
    for one in read:
        reach = int(np.flatnonzero(one.strength > 0).max(initial=-1))
        for place, word in enumerate(one.words):
            if len(word) > LONGEST:
                continue
            if where == "at":
                # What a word adds is its strength where the latent fires, and 1 where it stays silent.
                weight = float(one.strength[place])
                inside[word] = inside.get(word, 0.0) + weight
                outside[word] = outside.get(word, 0.0) + float(weight == 0)
            elif place < reach:
                inside[word] = inside.get(word, 0.0) + float(one.strength.max())
            elif not one.fires:
                outside[word] = outside.get(word, 0.0) + 1
    z = _log_odds(inside, outside)
    return sorted((word for word in z if z[word] > 0), key=lambda word: (-z[word], word))[:CANDIDATES]


def _log_odds(inside: dict[str, float], outside: dict[str, float]) -> dict[str, float]:
    """Log-odds of each word inside against outside in its standard deviations."""
    words = sorted({word for word, n in inside.items() if n > 0})
    a = np.array([inside[word] for word in words]) + PRIOR
    b = np.array([outside.get(word, 0.0) for word in words]) + PRIOR
    total_a = sum(inside.values()) + PRIOR * (len(words) + 1)
    total_b = sum(outside.values()) + PRIOR * (len(words) + 1)
    difference = np.log(a / (total_a - a)) - np.log(b / (total_b - b))
    return dict(zip(words, (difference / np.sqrt(1 / a + 1 / b)).tolist(), strict=True))


def _f1(matcher: Matcher, read: Iterable[_Read]) -> float:
    """F1 of telling windows by the matcher; a window on which the latent fires elsewhere is no hit."""
    hit = said = there = 0.0
    for one in read:
        values = matcher.values(one.words)
        # A firing window counts by how much of its strongest word the matcher covers.
        covered = float((values * one.strength).max(initial=0.0))
        weight = float(one.strength.max(initial=0.0))
        hit += covered if one.fires else 0.0
        there += weight
        said += max(covered, 0.0) if one.fires and covered else float(values.max(initial=0.0))
    return 2 * hit / (said + there) if said + there else 0.0


def _conditioned(matcher: Matcher, read: Sequence[_Read]) -> Matcher:
    """The matcher with "mostly after", where a few words before it tell its firings from its silences."""
    fires: dict[str, float] = {}
    silent: dict[str, float] = {}
    for one in read:
        for place in np.flatnonzero(matcher.values(one.words) > 0).tolist():
            before = one.words[place - 1] if place else ""
            side = fires if one.strength[place] > 0 else silent
            side[before] = side.get(before, 0.0) + 1
    total, errors = sum(fires.values()), sum(silent.values())
    if errors < 0.1 * (total + errors):
        return matcher
    after: list[str] = []
    for word in sorted(fires, key=lambda word: (-fires[word], word)):
        if word and fires[word] >= 2 and fires[word] > 4 * silent.get(word, 0.0) and len(word) <= LONGEST:
            after.append(word)
    after = after[:4]
    if sum(fires[word] for word in after) < 0.6 * total:
        return matcher
    return Matcher(matcher.phrases, frozenset(after), "at")


def _described(matcher: Matcher, read: Sequence[_Read], promoted: Sequence[TokenEffect]) -> str:
    """The label: the words, where in a text they stand if that is special, what is promoted."""
    text = write_label(matcher)
    places = [int(np.argmax(one.strength)) for one in read if one.fires and one.strength.max(initial=0) > 0]
    if matcher.where == "at" and np.mean([place < EARLY for place in places]) > 0.9:
        text += ", at the beginning"
    tokens = list(dict.fromkeys(word for e in promoted[:3] if (word := _plain(e.token))))
    return text + (f"; promotes {', '.join(tokens)}" if tokens else "")


def _plain(token: str) -> str:
    """A token as it can stand in a label: in single quotes, which are no phrase to look for; or nothing."""
    try:
        word = clean(token, "a token", LONGEST)
    except UserError:
        return ""
    return f"'{word}'" if word.isprintable() and not set(word) & set("\"“”'") and "�" not in word else ""
