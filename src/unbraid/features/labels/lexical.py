"""A label from the words alone, without a language model: which words set a latent's contexts apart.

Words are compared between places where the latent fires and places where it does not, by smoothed log-odds
(Monroe, Colaresi and Quinn 2008, "Fightin' words"), firings weighed by their strength, so that many weak ones
do not outvote the strong.  A few words are then taken one after the other as long as they help to tell the
training windows apart.  Two kinds of label compete: the latent fires at these words, or in text that follows
them.  Words chosen on half of the training windows have to do well on the other half, or there is no label.
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
MOST = 8
"""Words that a label may name."""
GAIN = 0.02
"""What a further word has to add to the hit rate less the false alarm rate."""
LEAST = 0.25
"""Hit rate less false alarm rate, on windows without a part in the choice, below which there is no label."""
PRIOR = 0.5
"""Firings that every word is given to begin with, on both sides."""
EARLY = 3
"""Words at the beginning of a window that count as its beginning."""
_WHERE: tuple[Where, ...] = ("at", "after")
_QUOTES = frozenset('"“”')


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
    read = _Texts([_read(window, largest) for window in (*evidence.train, *evidence.train_negatives)])
    if not any(word.strength.max(initial=0) > 0 for word in read.windows):
        return Explanation("", None, "it fires on no word in its training windows")
    held_out = {where: _held_out(read, where) for where in _WHERE}
    # Of two that do as well, the one that names the place.
    where = "at" if held_out["at"] >= held_out["after"] - GAIN else "after"
    found = _chosen(read, where)
    if not found.phrases or held_out[where] < LEAST:
        better = held_out[where]
        return Explanation("", None, f"no few words set its contexts apart ({better:.2f} better than chance)")
    return Explanation(_described(found, read.windows, promoted), found)


class _Texts:
    """Training windows, also as one text, in which a matcher of single words is tried at once.

    n is the number of words in all m windows, V that of different ones.
    """

    def __init__(self, windows: Sequence[_Read]) -> None:
        self.windows = windows
        self.number: dict[str, int] = {"": 0}
        """Of each word; the empty one stands before a window's first."""
        words = [[self.number.setdefault(w, len(self.number)) for w in one.words] for one in windows]
        self.word = np.array([w for some in words for w in some], np.int64)
        """(n,)."""
        self.before = np.array([w for some in words for w in (0, *some)[: len(some)]], np.int64)
        """The word before each, (n,)."""
        self.strength = np.concatenate([np.zeros(0, np.float32), *(one.strength for one in windows)])
        """(n,)."""
        sizes = np.array([len(some) for some in words], np.int64)
        self.begin = np.cumsum(sizes) - sizes
        """(m,)."""
        self.window = np.repeat(np.arange(len(sizes)), sizes)
        """(n,)."""
        self.fires = np.array([one.fires for one in windows], bool)
        """(m,)."""

    def halves(self) -> tuple[_Texts, _Texts]:
        """Every other window, and the rest."""
        return _Texts(self.windows[::2]), _Texts(self.windows[1::2])

    def are(self, words: Iterable[str]) -> NDArray[np.bool_]:
        """Which of all different words are among these, (V,)."""
        out = np.zeros(len(self.number), bool)
        out[[self.number[word] for word in words if word in self.number]] = True
        return out

    def fits(self, matcher: Matcher) -> NDArray[np.bool_]:
        """Where `Matcher.values` is more than a half, (n,); for a matcher of single words."""
        there = self.are(word for (word,) in matcher.phrases)[self.word]
        if matcher.after:
            there &= self.are(matcher.after)[self.before]
        if matcher.where == "at":
            return there
        earlier = np.cumsum(there) - there  # in all windows before it, too
        return earlier > earlier[self.begin[self.window]]

    def strongest(self, values: NDArray[np.float32]) -> NDArray[np.float64]:
        """The largest of each window's values (n,), 0 for one without words: (m,)."""
        out = np.zeros(len(self.windows), np.float32)
        np.maximum.at(out, self.window, values)
        return out.astype(np.float64)


def _read(window: Window, largest: float) -> _Read:
    words = Words.of(window.pieces)
    return _Read(words.words, words.strongest(window.activations) / largest, bool(window.max > 0))


def _held_out(read: _Texts, where: Where) -> float:
    """How well words do on the half of the windows that they were not chosen on, mean of both halves."""
    halves = read.halves()
    return sum(_gain(_chosen(a, where), b) for a, b in (halves, halves[::-1])) / 2


def _chosen(read: _Texts, where: Where) -> Matcher:
    """Words taken one after the other, each the one that helps most; none where none does."""
    best, chosen = 0.0, Matcher((), where=where)
    left = _candidates(read.windows, where)
    while left and len(chosen.phrases) < MOST:
        tried = [_with(chosen, word, read) for word in left]
        gains = [_gain(matcher, read) for matcher in tried]
        at = int(np.argmax(gains))
        if gains[at] < best + GAIN:
            break
        best, chosen = gains[at], tried[at]
        left.pop(at)
    return chosen


def _with(matcher: Matcher, word: str, read: _Texts) -> Matcher:
    """The matcher with one more word, and with the words that these come after where that matters."""
    more = Matcher((*matcher.phrases, (word,)), where=matcher.where)
    return _conditioned(more, read) if more.where == "at" else more


def _candidates(read: Sequence[_Read], where: Where) -> list[str]:
    """Words by how far they belong to where the latent fires rather than to where it does not."""
    inside: dict[str, float] = {}
    outside: dict[str, float] = {}
    for one in read:
        reach = int(np.flatnonzero(one.strength > 0).max(initial=-1))
        for place, word in enumerate(one.words):
            if len(word) > LONGEST or not word.isprintable() or word in _QUOTES:
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


def _gain(matcher: Matcher, read: _Texts) -> float:
    """Hit rate less false alarm rate.  A window is hit by how strong the latent is at its strongest word that
    fits; so a window on which it fires elsewhere is no hit, and a weak one is a small one."""
    fits, fires = read.fits(matcher), read.fires
    hit = read.strongest(np.where(fits, read.strength, np.float32(0)))[fires].sum()
    there = read.strongest(read.strength)[fires].sum()
    alarms = read.strongest(fits.astype(np.float32))[~fires].sum()
    return float(hit / max(there, 1e-12) - alarms / max((~fires).sum(), 1))


def _conditioned(matcher: Matcher, read: _Texts) -> Matcher:
    """The matcher with "mostly after", where a few words before it tell its firings from its silences."""
    there, n = read.are(word for (word,) in matcher.phrases)[read.word], len(read.number)
    firing = np.bincount(read.before[there & (read.strength > 0)], minlength=n)
    quiet = np.bincount(read.before[there & ~(read.strength > 0)], minlength=n)
    total, errors = int(firing.sum()), int(quiet.sum())
    if errors < 0.1 * (total + errors):
        return matcher
    words = list(read.number)
    fires = {words[i]: int(firing[i]) for i in np.flatnonzero(firing).tolist()}
    silent = {words[i]: int(quiet[i]) for i in np.flatnonzero(quiet).tolist()}
    after: list[str] = []
    for word in sorted(fires, key=lambda word: (-fires[word], word)):
        usual = fires[word] >= 2 and fires[word] > 4 * silent.get(word, 0)
        if usual and word and len(word) <= LONGEST and word.isprintable() and word not in _QUOTES:
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
