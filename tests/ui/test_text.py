"""Text of unknown origin never becomes markup, however it comes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from unbraid.ui.text import LONGEST_TOKEN, clipped, marked_tokens, number, share, token_name, visible


@given(st.text(st.characters()))
def test_what_is_shown_is_as_long_and_hides_nothing(text: str) -> None:
    shown = visible(text)
    assert len(shown) == len(shown.encode("utf-8").decode()) == len(text)
    assert not set(shown) & {chr(c) for c in (*range(9), *range(11, 32), *range(0x7F, 0xA0), 0x202E, 0x2066)}
    assert visible(shown) == shown


@pytest.mark.parametrize("show", [visible, clipped, token_name])
@pytest.mark.parametrize("text", ["<b>x</b>", "<b>\x00</b>"])
def test_markup_that_was_slipped_in_is_text_again(show: object, text: str) -> None:
    assert callable(show) and type(show(Markup(text))) is str
    assert "<b>" not in marked_tokens([Markup(text)], [1.0], 1.0)


def test_long_tokens_are_cut_and_say_so() -> None:
    assert clipped("a" * 10_000) == "a" * LONGEST_TOKEN + "… (10,000 characters)"
    assert token_name(" \n") == "␣↵" and token_name("") == "(empty)"


def test_numbers_have_true_minus_signs() -> None:
    assert (number(-0.5), number(None), number(float("inf")), number(1234.5)) == ("−0.500", "–", "–", "1,234")
    assert share(0) == "0\u202f%" and share(0.5) == "50.0\u202f%"
