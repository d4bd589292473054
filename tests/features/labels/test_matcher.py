"""Labels as matchers: what is written is read back, and only a label's own words decide."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from unbraid.features.labels.matcher import Matcher, read_label, write_label
from unbraid.features.labels.words import Words, content_stems, split_words

WORDS = st.from_regex(r"[a-z]{1,12}", fullmatch=True)


@given(
    phrases=st.lists(WORDS, min_size=1, max_size=5, unique=True),
    after=st.frozensets(WORDS, max_size=3),
    where=st.sampled_from(["at", "after"]),
)
def test_what_is_written_is_read_back(phrases: list[str], after: frozenset[str], where: str) -> None:
    matcher = Matcher(
        tuple((word,) for word in phrases),
        after if where == "at" else frozenset(),
        where,  # type: ignore[arg-type]
    )
    assert read_label(write_label(matcher)) == matcher


def test_a_label_that_a_person_could_have_written() -> None:
    label = 'words "refund", "return" (mostly after "my")'
    values = read_label(label).values(split_words("I want my refund, no return."))
    assert values.tolist() == [0, 0, 0, 1, 0, 0, 0.5, 0]
    follows = read_label('text that follows "my"').values(split_words("all my red shoes"))
    assert follows.tolist() == [0, 0, 1, 1]
    phrase = read_label('a complaint: "had enough"').values(split_words("enough, I had enough"))
    assert phrase.tolist() == [0, 0, 0, 1, 1]
    plain = read_label("Customers who want refunds").values(split_words("The customer was refunded."))
    assert plain.tolist() == [0, 1, 0, 1, 0]
    nothing = read_label("of the")
    assert nothing.values(("of", "the")).tolist() == [0, 0]


def test_remarks_beside_the_words_are_not_looked_for() -> None:
    assert read_label("word \"dose\"; promotes 'mg', 'take'") == read_label('word "dose"')


@given(st.lists(st.text(max_size=8), max_size=12))
def test_words_cover_their_tokens(pieces: list[str]) -> None:
    words = Words.of(pieces)
    assert words.words == tuple(split_words("".join(pieces))) and len(words.tokens) == len(words.words)
    values = np.arange(1, len(pieces) + 1, dtype=np.float32)
    for word, rows in zip(words.words, words.tokens, strict=True):
        assert word in "".join(pieces[i] for i in rows).lower()
    spread = words.spread(words.strongest(values))
    assert spread.shape == (len(pieces),) and (spread <= len(pieces)).all()


def test_a_word_of_several_tokens_is_as_strong_as_its_strongest() -> None:
    words = Words.of([" Zol", "vane", " helps"])
    assert words.words == ("zolvane", "helps")
    assert words.strongest(np.array([1, 3, 0], dtype=np.float32)).tolist() == [3, 0]
    assert words.spread(np.array([3, 0], dtype=np.float32)).tolist() == [3, 3, 0]


def test_stems_join_forms_and_drop_empty_words() -> None:
    assert content_stems("the refunds, refunding") == content_stems("Refunded") == {"refund"}
    assert content_stems("of the text") == frozenset()
