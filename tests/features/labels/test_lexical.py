"""The explainer without a language model: it names what sets contexts apart, or says that nothing does."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unbraid.features.geometry import TokenEffect
from unbraid.features.labels.lexical import (
    _gain,  # pyright: ignore[reportPrivateUsage]
    _Read,  # pyright: ignore[reportPrivateUsage]
    _Texts,  # pyright: ignore[reportPrivateUsage]
    explain,
)
from unbraid.features.labels.matcher import HALF, Matcher, Where, read_label

from .made import evidence, window

FILLERS = "the a storm came over red hills while we sat near old water and ate warm bread".split()  # noqa: SIM905


def _text(rng: np.random.Generator, *words: str) -> str:
    parts = rng.permutation(FILLERS)[:6].tolist()
    place = int(rng.integers(len(parts) - 1)) + 1
    return " ".join([*parts[:place], *words, *parts[place:]])


def test_it_names_the_words_that_the_latent_fires_at() -> None:
    rng = np.random.default_rng(0)
    words = ["refund", "return", "refund"]
    yes = [window(_text(rng, words[i % 3]), {"refund": 3.0, "return": 2.0}, i) for i in range(12)]
    no = [window(_text(rng), {}, 100 + i) for i in range(12)]
    found = explain(evidence(yes, no), [TokenEffect(" money", 1.0), TokenEffect('"', 1.0)])
    assert found.text == 'words "refund", "return"; promotes \'money\''
    assert found.matcher == read_label(found.text)


def test_it_says_after_which_words() -> None:
    rng = np.random.default_rng(1)
    yes = [window(_text(rng, "my", "order"), {"order": 2.0}, i) for i in range(12)]
    no = [window(_text(rng, "their", "order"), {}, 100 + i) for i in range(12)]
    assert explain(evidence(yes, no)).text == 'word "order" (mostly after "my")'


def test_it_names_what_comes_before_where_no_word_is_special() -> None:
    rng = np.random.default_rng(2)
    yes = []
    for i in range(16):
        before, after = _text(rng), rng.permutation(FILLERS)[:5].tolist()
        text = f"{before} sorry {' '.join(after)}"
        made = window(text, {}, i)
        made.activations[7 + int(rng.integers(5))] = 1.0
        yes.append(made)
    no = [window(_text(rng) + " " + _text(rng), {}, 100 + i) for i in range(16)]
    assert explain(evidence(yes, no)).text == 'text that follows "sorry"'


def test_many_weak_firings_do_not_outvote_the_strong() -> None:
    # Statistics over single tokens that count firings alone name the word on which it fires most weakly.
    rng = np.random.default_rng(3)
    fires = {"verdict": 9.0, **dict.fromkeys(FILLERS[:6], 0.05)}
    yes = [window(_text(rng, "verdict"), fires, i) for i in range(12)]
    no = [window(_text(rng), {}, 100 + i) for i in range(12)]
    assert explain(evidence(yes, no)).text == 'word "verdict"'


def test_no_label_is_better_than_a_guess() -> None:
    # Where nothing sets the contexts apart, the top token must not be passed off as an explanation.
    rng = np.random.default_rng(4)
    yes = [window(_text(rng), {}, i) for i in range(20)]
    for one in yes:
        one.activations[int(rng.integers(6))] = 1.0
    no = [window(_text(rng), {}, 100 + i) for i in range(20)]
    found = explain(evidence(yes, no))
    assert found.text == "" and found.matcher is None and "set its contexts apart" in found.why_not
    nothing = explain(evidence([], []))
    assert nothing.text == "" and "no training windows" in nothing.why_not


def test_it_looks_at_training_windows_alone() -> None:
    rng = np.random.default_rng(5)
    yes = [window(_text(rng, "refund"), {"refund": 1.0}, i) for i in range(12)]
    no = [window(_text(rng), {}, 100 + i) for i in range(12)]
    other = [window(_text(rng, "secret"), {"secret": 9.0}, 200 + i) for i in range(12)]
    assert explain(evidence(yes + other, no + no, train=12)).text == 'word "refund"'


def test_text_of_the_corpus_cannot_break_a_label() -> None:
    rng = np.random.default_rng(6)
    odd = "<script>alert(1)</script>"
    yes = [window(_text(rng, odd, "שלום"), {odd: 1.0, "שלום": 1.0}, i) for i in range(8)]
    no = [window(_text(rng), {}, 100 + i) for i in range(8)]
    found = explain(evidence(yes, no), [TokenEffect("\u202e\x07", 1.0), TokenEffect("�", 1.0)])
    assert "<s" not in found.text and "\u202e" not in found.text and found.matcher == read_label(found.text)
    long = "x" * 10_000
    yes = [window(_text(rng, long), {long: 1.0}, i) for i in range(8)]
    assert "xx" not in explain(evidence(yes, no)).text


WINDOWS = st.lists(
    st.tuples(st.lists(st.sampled_from("abcde"), max_size=6), st.booleans(), st.integers(0, 99)), max_size=6
)


@given(
    WINDOWS,
    st.lists(st.sampled_from("abcxy"), unique=True, max_size=3),
    st.frozensets(st.sampled_from("adx"), max_size=2),
    st.sampled_from(["at", "after"]),
)
def test_all_windows_at_once_give_what_each_gives(
    windows: list[tuple[list[str], bool, int]], phrases: list[str], after: frozenset[str], where: Where
) -> None:
    read: list[_Read] = []
    for words, fires, seed in windows:
        strength = np.random.default_rng(seed).random(len(words)).astype(np.float32)
        read.append(_Read(tuple(words), np.where(strength > 0.4, strength, 0).astype(np.float32), fires))
    matcher = Matcher(tuple((word,) for word in phrases), after if where == "at" else frozenset(), where)
    texts = _Texts(read)
    each = [matcher.values(one.words) > HALF for one in read]
    assert texts.fits(matcher).tolist() == [bool(yes) for one in each for yes in one]

    hits = [float(r.strength[m].max(initial=0)) for r, m in zip(read, each, strict=True) if r.fires]
    there = [float(r.strength.max(initial=0)) for r in read if r.fires]
    alarms = [bool(m.any()) for r, m in zip(read, each, strict=True) if not r.fires]
    wanted = sum(hits) / max(sum(there), 1e-12) - sum(alarms) / max(len(alarms), 1)
    assert _gain(matcher, texts) == pytest.approx(wanted)
