"""Masks that are exact to the character, for every kind of tokenizer we meet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from unbraid.activations.text import Document, render, tokenise, windows
from unbraid.manifest.errors import UserError

REAL = ["stories260k", "tinystories-656k", "tinystories-chat-3m"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Trims contents and merges the system message into the first turn, as Llama 2's and Gemma's do.
TRIMMING = (
    "{{ bos_token }}{% for m in messages %}"
    "[{{ m['role'] | upper }}] {{ m['content'] | trim }} [/]"
    "{% endfor %}"
)


@pytest.fixture(params=["tiny", *REAL])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    if request.param == "tiny":
        return AutoTokenizer.from_pretrained(request.getfixturevalue("tiny_llama"))
    return AutoTokenizer.from_pretrained(request.getfixturevalue("shared_models") / request.param)


def pieces(tokenizer: Any, window: Any, mask: tuple[bool, ...]) -> str:
    return tokenizer.decode([t for t, m in zip(window.input_ids, mask, strict=True) if m])


def chat(*contents: str, focus: tuple[int, int] | None = None) -> Document:
    roles = ["user", "assistant"] * len(contents)
    return Document.of_messages(
        [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)], focus=focus
    )


TEXTS = st.text(st.sampled_from("ab dost\n\t.,!éß😀漢<|>"), min_size=1, max_size=40)


@settings(deadline=None, max_examples=25)
@given(first=TEXTS, reply=TEXTS, data=st.data())
@pytest.mark.parametrize("template", [CHATML, None])
def test_masks_hold_exactly_the_tokens_that_touch_the_span(
    template: str | None, first: str, reply: str, data: st.DataObject, request: pytest.FixtureRequest
) -> None:
    """Against an oracle in bytes: byte-level tokens' lengths add up to the rendered text's."""
    tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue("tiny_llama"))
    tokenizer.chat_template = template
    start = data.draw(st.integers(0, len(reply) - 1))
    end = data.draw(st.integers(start + 1, len(reply)))
    document = chat(first, reply, focus=(start, end))
    rendered = render(tokenizer, document).text
    window = tokenise(tokenizer, document, 10_000)
    base = len(rendered) - (len("<|im_end|>\n") if template else 0) - len(reply)
    assert rendered[base : base + len(reply)] == reply

    def span(low: int, high: int) -> tuple[int, int]:
        return len(rendered[: base + low].encode()), len(rendered[: base + high].encode())

    special = {t: c for c, t in tokenizer.get_added_vocab().items()}
    cursor, reply_mask, focus_mask = 0, [], []
    for token, name in zip(window.input_ids, tokenizer.convert_ids_to_tokens(window.input_ids), strict=True):
        size = len(special[token].encode()) if token in special else len(name)
        for mask, (low, high) in ((reply_mask, span(0, len(reply))), (focus_mask, span(start, end))):
            # A character of several bytes belongs to every token that holds one of its bytes.
            mask.append(cursor < high and cursor + size > low)
        cursor += size
    assert cursor == len(rendered.encode())
    assert window.reply_mask == tuple(reply_mask)
    for ours, bytes_ in zip(window.focus_mask, focus_mask, strict=True):
        assert ours >= bytes_


def test_token_ids_are_those_of_the_library(tokenizer: Any) -> None:
    for text in ["Once upon a time, é 😀\n\n  a  girl", " x", "a", "Tom's </s> ball"]:
        window = tokenise(tokenizer, Document.of_text(text), 512)
        assert list(window.input_ids) == tokenizer(text)["input_ids"]
        assert window.positions == tuple(range(len(window.input_ids)))


def test_a_focus_in_a_text_selects_its_word(tokenizer: Any) -> None:
    text = "Zebras, who jump; quickly found 😀 there"
    for word in ("who", "jump", "😀"):
        start = text.index(word)
        window = tokenise(tokenizer, Document.of_text(text, focus=(start, start + len(word))), 512)
        if tokenizer.unk_token_id in window.input_ids and word == "😀":
            continue
        found = pieces(tokenizer, window, window.focus_mask)
        assert word in found and len(found.strip()) <= len(word) + 1, found
        assert sum(window.focus_mask) < len(window.input_ids) / 2


def test_a_conversation_without_template_is_joined_and_its_replies_found(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    window = tokenise(tokenizer, chat("User: hi\n", "a red ball", "\nUser: no\n", "yes"), 512)
    assert pieces(tokenizer, window, window.reply_mask).strip() == "a red ballyes"


def test_chat_template_and_ids_agree_with_the_library(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    document = chat("would you like", "two tablets", "user assistant", "assistant user")
    window = tokenise(tokenizer, document, 512)
    assert (
        list(window.input_ids)
        == tokenizer.apply_chat_template(list(document.messages or ()), tokenize=True, return_dict=True)[
            "input_ids"
        ]
    )
    assert pieces(tokenizer, window, window.reply_mask) == "two tabletsassistant user"


def test_trimming_templates_are_followed(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = TRIMMING
    window = tokenise(tokenizer, chat("  hi ", " the red ball \n", focus=(5, 8)), 512)
    assert pieces(tokenizer, window, window.reply_mask).strip() == "the red ball"
    assert pieces(tokenizer, window, window.focus_mask).strip() == "red"


def test_a_template_that_rewrites_contents_is_refused(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    for template in (
        "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
        "{{ messages[0]['content'] }}",
    ):
        tokenizer.chat_template = template
        with pytest.raises(UserError, match="chat template changes the contents"):
            tokenise(tokenizer, chat("hi", "there"), 512)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="roles must alternate"):
        tokenise(tokenizer, chat("hi", "there"), 512)


def test_special_tokens_are_never_captured(tokenizer: Any) -> None:
    text = f"a girl{tokenizer.eos_token or ''} and a boy"
    window = tokenise(tokenizer, Document.of_text(text), 512)
    kept = [t for t, m in zip(window.input_ids, window.captured("all"), strict=True) if m]
    assert kept and not {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} & set(kept)
    assert tokenizer.eos_token_id in window.input_ids


def test_trimmed_offsets_do_not_lose_spaces() -> None:
    """GPT-2's and Llama 3's tokenizers report " cat" without its space, and spaces alone as nothing."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.post_processor = processors.ByteLevel(trim_offsets=True)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(["a  b  c"], trainers.BpeTrainer(vocab_size=300, special_tokens=["<e>"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<e>")
    window = tokenise(tokenizer, Document.of_text("a    b", focus=(1, 4)), 99)
    assert pieces(tokenizer, window, window.focus_mask) == "   "


@settings(deadline=None, max_examples=30)
@given(context=st.integers(2, 40), text=st.text(st.sampled_from("ab th.é😀"), max_size=60))
def test_windows_hold_every_token_once(context: int, text: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue("tiny_llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    document = chat("x", text, focus=(0, len(text)) if text else None)
    whole = tokenise(tokenizer, document, 10_000)
    cut = windows(tokenizer, document, context)
    assert all(len(w.input_ids) <= context and w.id == document.id for w in cut)
    # Every window begins with the BOS that the document begins with.
    assert all(w.input_ids[0] == tokenizer.bos_token_id and w.special_mask[0] for w in cut)
    for name in ("input_ids", "reply_mask", "focus_mask", "special_mask", "positions"):
        joined = getattr(whole, name)[:1] + tuple(v for w in cut for v in getattr(w, name)[1:])
        assert joined == getattr(whole, name)
    assert cut[0] == tokenise(tokenizer, document, context)


def test_an_empty_text_has_no_windows(tiny_gpt2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    assert windows(tokenizer, Document.of_text(""), 8) == []
    assert tokenise(tokenizer, Document.of_text(""), 8).input_ids == ()


def test_impossible_requests_are_refused(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    with pytest.raises(UserError, match="outside its text"):
        tokenise(tokenizer, Document.of_text("abc", focus=(2, 9)), 8)
    with pytest.raises(UserError, match="context 1 leaves no room"):
        tokenise(tokenizer, chat("a", "b"), 1)
    with pytest.raises(UserError, match="no fast version"):
        tokenise(SlowTokenizer(), Document.of_text("abc"), 8)


class SlowTokenizer:
    chat_template = None


@pytest.mark.parametrize("template", [CHATML, TRIMMING, None])
def test_a_mask_of_any_message_becomes_the_tokens_that_touch_it(
    tiny_llama: Path, template: str | None
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = template
    contents = ("  the red ball", "a doctor would say", "the red ball again ")
    mask = [(0, contents[0].index("red"), len(contents[0]) - 1), (2, 4, 7)]
    messages = [
        {"role": r, "content": c} for r, c in zip(("user", "assistant", "user"), contents, strict=True)
    ]
    window = tokenise(tokenizer, Document.of_messages(messages, mask=mask), 10_000)
    found = pieces(tokenizer, window, window.data_mask)
    assert found.replace(" ", "").startswith("redbal") and found.rstrip().endswith("red")
    assert not any(word in found for word in ("doctor", "again", "the"))
    with pytest.raises(UserError, match="outside its text"):
        tokenise(tokenizer, Document.of_messages(messages, mask=[(0, 0, 99)]), 99)
    with pytest.raises(UserError, match="message 3, which it does not have"):
        tokenise(tokenizer, Document.of_messages(messages, mask=[(3, 0, 1)]), 99)
