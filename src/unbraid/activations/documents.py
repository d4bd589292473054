"""Documents, and reading them from a corpus file one at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from unbraid.manifest.errors import UserError
from unbraid.manifest.identity import canonical_json

Message = Mapping[str, str]

SEPARATOR = "<|endoftext|>"


@dataclass(frozen=True)
class Document:
    """One text or one conversation; exactly one of `text` and `messages` is given."""

    id: str
    """The file's own id, or the first 16 hex digits of the content's SHA-256."""
    text: str | None = None
    """Running text."""
    messages: tuple[Message, ...] | None = None
    """A conversation: mappings with the keys `role` and `content`."""
    focus: tuple[int, int] | None = None
    """Character span [start, end) of interest in the last message's content, or in the text."""

    @staticmethod
    def of_text(text: str, *, id: str | None = None, focus: tuple[int, int] | None = None) -> Document:
        """A text document; its id is the text's hash unless one is given."""
        return Document(id or _content_hash(text.encode()), text, None, focus)

    @staticmethod
    def of_messages(
        messages: Sequence[Message],
        *,
        id: str | None = None,
        focus: tuple[int, int] | None = None,
    ) -> Document:
        """A conversation; its id is the hash of its canonical JSON unless one is given."""
        plain = [{"role": m["role"], "content": m["content"]} for m in messages]
        return Document(id or _content_hash(canonical_json(plain)), None, tuple(plain), focus)


def _content_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def read_documents(path: Path | str) -> Iterator[Document]:
    """Documents of a `.jsonl` or text file, one at a time, in the file's order.

    JSON Lines: each line an object with `text` or `messages` (and optionally `id` and `focus`; other
    fields are ignored). Text: documents are separated by lines `<|endoftext|>` where the file has such a
    line, else by blank lines. The file is read as a stream, so its size does not matter.

    Raises UserError, naming the line, for a file that is missing, empty, not UTF-8 or malformed.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is not a file; give --text a .jsonl or .txt file")
    documents = _read_json_lines(path) if path.suffix == ".jsonl" else _read_text(path)
    found = False
    for document in documents:
        found = True
        yield document
    if not found:
        raise UserError(f"{path} holds no documents; give a file with at least one")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines without their line ends (only \\n and \\r\\n end a line)."""
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{path} line {number} is not UTF-8 (byte 0x{raw[error.start]:02x} at column"
                        f" {error.start + 1}); convert the file to UTF-8"
                    ) from error
                yield number, line.removesuffix("\n").removesuffix("\r")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the file") from error


def _read_text(path: Path) -> Iterator[Document]:
    separated = any(line == SEPARATOR for _, line in _lines(path))

    def ends(line: str) -> bool:
        return line == SEPARATOR if separated else not line.strip()

    block: list[str] = []
    for _, line in _lines(path):
        if not ends(line):
            block.append(line)
            continue
        yield from _text_block(block)
        block = []
    yield from _text_block(block)


def _text_block(lines: list[str]) -> Iterator[Document]:
    text = "\n".join(lines).strip("\n")
    if text.strip():
        yield Document.of_text(text)


def _read_json_lines(path: Path) -> Iterator[Document]:
    for number, line in _lines(path):
        if line.strip():
            try:
                yield parse_document(json.loads(line))
            except json.JSONDecodeError as error:
                raise UserError(f"{path} line {number} is not JSON ({error.msg}); mend the line") from error
            except UserError as error:
                raise UserError(f"{path} line {number}: {error}") from error


def parse_document(record: object) -> Document:
    """A document from one decoded JSON object; raises UserError that says which field is wrong."""
    if not isinstance(record, dict):
        raise UserError('expected an object such as {"text": "…"} or {"messages": […]}')
    fields = cast(dict[str, object], record)
    text, messages = fields.get("text"), fields.get("messages")
    if (text is None) == (messages is None):
        names = ", ".join(sorted(fields)) or "none"
        raise UserError(f"a document has either the field text or the field messages (fields found: {names})")
    id_ = fields.get("id")
    if id_ is not None and (not isinstance(id_, str) or not id_):
        raise UserError("the field id must be a non-empty string")
    if text is not None:
        last = _string(text, "text")
        return Document.of_text(last, id=id_, focus=_parse_focus(fields.get("focus"), last))
    parsed = _parse_messages(messages)
    focus = _parse_focus(fields.get("focus"), parsed[-1]["content"])
    return Document.of_messages(parsed, id=id_, focus=focus)


def _string(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"the field {name} must be a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the field {name} has half a surrogate pair at character {error.start}") from error
    return value


def _parse_messages(value: object) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise UserError("the field messages must be a list of at least one message")
    messages: list[Message] = []
    for item in cast(list[object], value):
        if not isinstance(item, dict):
            raise UserError("every message must be an object with the fields role and content")
        message = cast(dict[str, object], item)
        role, content = message.get("role"), message.get("content")
        if role is None or content is None:
            raise UserError("every message must have the fields role and content")
        messages.append({"role": _string(role, "role"), "content": _string(content, "content")})
    return messages


def _parse_focus(value: object, content: str) -> tuple[int, int] | None:
    if value is None:
        return None
    pair = cast(list[object], value) if isinstance(value, list) else []
    match pair:
        case [int() as start, int() as end] if 0 <= start < end <= len(content):
            return start, end
        case _:
            raise UserError(
                "the field focus must be [start, end] with 0 ≤ start < end ≤ the length of the"
                f" {'text or last message'} ({len(content)} characters)"
            )
