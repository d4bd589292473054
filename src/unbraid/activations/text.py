"""Tokens of a document, with masks that are exact to the character.

A conversation is rendered through the model's own chat template, every message's content is found in the
rendered string, and spans of characters become token masks by the tokenizer's offsets. Nothing is searched
by token ids, so byte-level and byte-fallback vocabularies behave alike.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from unbraid.activations.documents import Document, Message, parse_document, read_documents
from unbraid.manifest.errors import UserError
from unbraid.model.load import LanguageModel

__all__ = [
    "Document",
    "Message",
    "Positions",
    "TokenisedDocument",
    "parse_document",
    "read_documents",
    "render",
    "require_tokenizer",
    "tokenise",
    "windows",
]

Positions = Literal["all", "reply", "focus", "mask", "last"]
Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class TokenisedDocument:
    """One window of a document as the model reads it; all tuples have the window's length T."""

    id: str
    """The document's id; every window of a long document carries the same one."""
    input_ids: tuple[int, ...]
    """Token ids, the beginning-of-sequence token included where the tokenizer adds one."""
    reply_mask: tuple[bool, ...]
    """True on tokens that hold at least one character of an assistant message's content."""
    focus_mask: tuple[bool, ...]
    """True on tokens that hold at least one character of the document's focus span."""
    data_mask: tuple[bool, ...]
    """True on tokens that hold at least one character of the document's mask."""
    last_mask: tuple[bool, ...]
    """True on the document's last token that is not special, if that is in this window."""
    special_mask: tuple[bool, ...]
    """True on beginning-, end-of-sequence and padding ids, which are never captured."""
    positions: tuple[int, ...]
    """Index of each token in the whole document's tokens (a later window's repeated BOS has 0)."""
    concepts: tuple[frozenset[str], ...] = ()
    """The document's concepts of which each token holds at least one character; empty if it names none."""

    def captured(self, positions: Positions) -> NDArray[np.bool_]:
        """Mask (T,) of the tokens that a capture of these positions keeps."""
        keep = ~np.asarray(self.special_mask, dtype=np.bool_)
        masks = {
            "reply": self.reply_mask,
            "focus": self.focus_mask,
            "mask": self.data_mask,
            "last": self.last_mask,
        }
        if positions != "all":
            keep &= np.asarray(masks[positions], dtype=np.bool_)
        return keep

    def until(self, end: int) -> TokenisedDocument:
        """The window's first `end` tokens."""
        tuples = {f.name: getattr(self, f.name)[:end] for f in fields(self) if f.name != "id"}
        return replace(self, **tuples)


class Rendered(NamedTuple):
    """What the model reads, and where spans of the document's contents stand in it."""

    text: str
    """The string that is tokenised."""
    replies: Spans
    """Characters [start, end) of each assistant message's content."""
    focus: Spans
    """The document's focus; empty if it has none."""
    mask: Spans
    """The document's mask."""
    concepts: dict[str, Spans]
    """The document's concepts."""


def require_tokenizer(lm: LanguageModel, wanted: str, what: Path | str) -> None:
    """Raise UserError when `what` was made with another tokenizer, or chat template, than the model's, or
    does not say with which (`wanted` is empty).

    The same weights read other tokens then, and everything that was measured on them would be off unnoticed.
    """
    if not wanted:
        raise UserError(
            f"{what} does not say of which model and tokenizer it is; import it again with --model, which "
            "records them"
        )
    if wanted != lm.tokenizer_id:
        raise UserError(
            f"{what} was made with tokenizer {wanted[:12]}… but model {lm.name} has {lm.tokenizer_id[:12]}…"
            " (its chat template counts); load the model with the tokenizer of then"
        )


_encoders: weakref.WeakKeyDictionary[Any, Tokenizer] = weakref.WeakKeyDictionary()


def tokenise(source: Any, document: Document, context: int) -> TokenisedDocument:
    """The document's first window: its tokens, cut after `context` of them. Raises as `windows` does."""
    empty = TokenisedDocument(document.id, (), (), (), (), (), (), ())
    return (windows(source, document, context) or [empty])[0]


def windows(source: Any, document: Document, context: int) -> list[TokenisedDocument]:
    """The document's windows of at most `context` tokens, in order (one unless it is longer; none if empty).

    `source` is a LanguageModel or its tokenizer. A document longer than the context is cut into windows
    without overlap that share its id; where the tokenizer begins with a BOS token every window does, so
    that no ordinary token stands at the model's first position. A token belongs to a span of characters
    when it holds at least one character of it. Conversations are rendered by the chat template; without
    one the messages' contents are joined as they are.

    Raises UserError for a tokenizer without character offsets, a chat template that rewrites message
    contents, a focus or mask outside the text, or a context too short for one token.
    """
    tokenizer = getattr(source, "tokenizer", source)
    rendered = render(tokenizer, document)
    # A chat template writes the special tokens itself.
    templated = document.messages is not None and _template(tokenizer)
    encoding = _encoder(tokenizer).encode(rendered.text, add_special_tokens=not templated)
    ids = np.asarray(encoding.ids, dtype=np.int64)
    offsets = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    special = np.isin(ids, [i for i in (bos, eos, pad) if i is not None])
    masks = {
        "reply_mask": _overlaps(offsets, rendered.replies),
        "focus_mask": _overlaps(offsets, rendered.focus),
        "data_mask": _overlaps(offsets, rendered.mask),
        "last_mask": np.arange(len(ids)) == np.flatnonzero(~special).max(initial=-1),
        "special_mask": special,
    }

    where = {name: _overlaps(offsets, spans) for name, spans in rendered.concepts.items()}

    prefix = 1 if len(ids) and ids[0] == bos else 0
    if context <= prefix:
        raise UserError(f"context {context} leaves no room for a token; choose a longer --context")
    found: list[TokenisedDocument] = []
    for start in range(prefix, max(len(ids), prefix + 1), context - prefix):
        rows = np.r_[0:prefix, start : min(start + context - prefix, len(ids))]
        if len(rows):
            found.append(
                TokenisedDocument(
                    id=document.id,
                    input_ids=tuple(ids[rows].tolist()),
                    positions=tuple(rows.tolist()),
                    concepts=tuple(frozenset(c for c in where if where[c][row]) for row in rows)
                    if where
                    else (),
                    **{name: tuple(mask[rows].tolist()) for name, mask in masks.items()},
                )
            )
    return found


def render(tokenizer: Any, document: Document) -> Rendered:
    """The string the model reads, and where the document's contents and spans stand in it."""
    if document.messages is None:
        text = document.text or ""
        return _located(document, text, [(0, text, text)])
    messages = document.messages
    contents = [m["content"] for m in messages]
    if not _template(tokenizer):
        rendered, placed = _splice([""] * (len(contents) + 1), contents), contents
        pieces = [""] * (len(contents) + 1)
    else:
        apply = cast(Callable[..., str], tokenizer.apply_chat_template)
        rendered = _render(apply, messages, document.id)
        # Private-use characters stand in for the contents; what lies between them is the template's own.
        marks = [f"\ue000{i}\ue001" for i in range(len(messages))]
        skeleton = _render(
            apply, [{**m, "content": k} for m, k in zip(messages, marks, strict=True)], document.id
        )
        pieces = _between(skeleton, marks)
        placed = _placed(rendered, pieces, contents) if pieces else None
    if pieces is None or placed is None:
        raise UserError(
            f"the chat template changes the contents of document {document.id}, so its reply tokens cannot be"
            " located; use a template that keeps contents, or capture the rendered conversation as text"
        )
    places: list[tuple[int, str, str]] = []
    cursor = 0
    for piece, content, kept in zip(pieces, contents, placed, strict=False):
        cursor += len(piece)
        places.append((cursor, content, kept))
        cursor += len(kept)
    return _located(document, rendered, places)


def _located(document: Document, rendered: str, places: list[tuple[int, str, str]]) -> Rendered:
    """`places`: for each content, where it begins in the rendered string, itself, and what was kept of it."""
    roles = [m["role"] for m in document.messages or ()]
    replies = [
        (start, start + len(kept))
        for role, (start, _, kept) in zip(roles, places, strict=False)
        if role == "assistant"
    ]
    focus = [] if document.focus is None else [_shift(document, "focus", places[-1], document.focus)]
    mask: Spans = []
    concepts: dict[str, Spans] = {}
    named = [("mask", mask, *span) for span in document.mask]
    named += [(f"concept {c}", concepts.setdefault(c, []), m, *span) for m, c, *span in document.concepts]
    for name, spans, message, start, end in named:
        if not 0 <= message < len(places):
            raise UserError(
                f"the {name} of document {document.id} names message {message}, which it does not have"
            )
        spans.append(_shift(document, name, places[message], (start, end)))
    return Rendered(rendered, replies, focus, mask, concepts)


def _template(tokenizer: Any) -> bool:
    return getattr(tokenizer, "chat_template", None) is not None


def _render(apply: Callable[..., str], messages: Any, id_: str) -> str:
    # Templates are foreign code: whatever they raise (an unknown role, say) is about this document.
    try:
        return apply([dict(m) for m in messages], tokenize=False)
    except Exception as error:
        raise UserError(f"the chat template refuses document {id_}: {error}") from error


def _splice(pieces: list[str], contents: list[str]) -> str:
    return "".join(p + c for p, c in zip(pieces, contents, strict=False)) + pieces[-1]


def _between(skeleton: str, marks: list[str]) -> list[str] | None:
    """The template's own text before, between and after the marks; None when it drops or repeats one."""
    pieces: list[str] = []
    rest = skeleton
    for mark in marks:
        before, found, rest = rest.partition(mark)
        if not found or mark in rest:
            return None
        pieces.append(before)
    return [*pieces, rest]


def _placed(rendered: str, pieces: list[str], contents: list[str]) -> list[str] | None:
    """The contents as the template placed them (as they are, or stripped); None when neither fits."""
    for choose in (str, str.strip, str.rstrip, str.lstrip):
        candidate = [choose(c) for c in contents]
        if _splice(pieces, candidate) == rendered:
            return candidate
    placed: list[str] = []
    cursor = 0
    for before, after, content in zip(pieces, pieces[1:], contents, strict=False):
        cursor += len(before)
        fits = (
            c
            for c in (content, content.rstrip(), content.lstrip(), content.strip())
            if rendered.startswith(c + after, cursor)
        )
        kept = next(fits, None)
        if kept is None:
            return None
        placed.append(kept)
        cursor += len(kept)
    return placed if _splice(pieces, placed) == rendered else None


def _shift(
    document: Document, name: str, place: tuple[int, str, str], span: tuple[int, int]
) -> tuple[int, int]:
    """A span moved from a content to the rendered string; `place` as in `_located`."""
    start, content, kept = place
    low, high = span
    if not 0 <= low < high <= len(content):
        raise UserError(f"the {name} [{low}, {high}] of document {document.id} lies outside its text")
    stripped = content.index(kept) if kept else 0
    low, high = (min(max(edge - stripped, 0), len(kept)) for edge in span)
    return start + low, start + high


def _overlaps(offsets: NDArray[np.int64], spans: Spans) -> NDArray[np.bool_]:
    """Mask (T,): tokens with offsets [a, b) that share a character with one of the spans."""
    mask = np.zeros(len(offsets), dtype=np.bool_)
    for start, end in spans:
        mask |= (np.maximum(offsets[:, 0], start)) < np.minimum(offsets[:, 1], end)
    return mask


def _encoder(tokenizer: Any) -> Tokenizer:
    """A private copy of the tokenizer that neither pads, truncates nor trims spaces off the offsets."""
    if (known := _encoders.get(tokenizer)) is not None:
        return known
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            "this tokenizer has no fast version, so its tokens' characters are unknown; convert it to a"
            " tokenizer.json"
        )
    state = json.loads(backend.to_str())
    _keep_spaces(state.get("post_processor"))
    encoder = Tokenizer.from_str(json.dumps(state))
    encoder.no_padding()
    encoder.no_truncation()
    _encoders[tokenizer] = encoder
    return encoder


def _keep_spaces(node: Any) -> None:
    # A trimmed " cat" would claim only "cat", and a token of spaces would claim nothing at all.
    if isinstance(node, dict):
        fields = cast(dict[str, Any], node)
        if "trim_offsets" in fields:
            fields["trim_offsets"] = False
        for value in fields.values():
            _keep_spaces(value)
    elif isinstance(node, list):
        for value in cast(list[Any], node):
            _keep_spaces(value)
