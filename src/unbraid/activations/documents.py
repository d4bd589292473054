"""Documents, and reading them from a corpus one at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from unbraid.activations.tables import HUB, hub_records, parquet_records
from unbraid.manifest.errors import UserError
from unbraid.manifest.identity import canonical_json

Message = Mapping[str, str]
Span = tuple[int, int, int]
"""A message's number from 0 (0 in a text) and a character span [start, end) in its content."""
Concept = tuple[int, str, int, int]
"""A span with the name of what stands there: message, concept, start, end."""

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
    mask: tuple[Span, ...] = ()
    """The characters whose tokens `--positions mask` keeps."""
    stratum: str | None = None
    """The kind of text that it is, where the corpus says so; `--per-stratum` counts by it."""
    labels: Mapping[str, str] = field(default_factory=dict[str, str])
    """What is true of the whole document, by name: {"topic": "refund", "angry": "true"}."""
    concepts: tuple[Concept, ...] = ()
    """Which concepts stand where in it."""

    @staticmethod
    def of_text(
        text: str,
        *,
        id: str | None = None,
        focus: tuple[int, int] | None = None,
        mask: Sequence[Span] = (),
        stratum: str | None = None,
        labels: Mapping[str, str] | None = None,
        concepts: Sequence[Concept] = (),
    ) -> Document:
        """A text document; its id is the text's hash unless one is given."""
        id = id or _content_hash(text.encode())
        return Document(id, text, None, focus, tuple(mask), stratum, dict(labels or {}), tuple(concepts))

    @staticmethod
    def of_messages(
        messages: Sequence[Message],
        *,
        id: str | None = None,
        focus: tuple[int, int] | None = None,
        mask: Sequence[Span] = (),
        stratum: str | None = None,
        labels: Mapping[str, str] | None = None,
        concepts: Sequence[Concept] = (),
    ) -> Document:
        """A conversation; its id is the hash of its canonical JSON unless one is given."""
        plain = [{"role": m["role"], "content": m["content"]} for m in messages]
        id = id or _content_hash(canonical_json(plain))
        more = (focus, tuple(mask), stratum, dict(labels or {}), tuple(concepts))
        return Document(id, None, tuple(plain), *more)


def _content_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def read_documents(source: Path | str) -> Iterator[Document]:
    """Documents of a corpus, one at a time, in its order, read as a stream: its size does not matter.

    * `.jsonl`: each line an object with `text` or `messages` and optionally `id`, `focus` [start, end],
      `mask` ([start, end] in a text, [message, start, end] in a conversation, messages counted from 0),
      `stratum`, `labels` (an object of names with text, whole numbers or booleans; `label` for one) and
      `concepts` ([name, start, end], after the message's number in a conversation); others are ignored.
      `.jsonl.gz` and `.jsonl.zst` as well.
    * `.parquet`, or a folder of such files: rows with columns of these names.
    * `hf:owner/name`, `hf:owner/name/configuration` or `hf:FOLDER`, each with `:split` for another than
      train: a Hugging Face dataset, streamed; its code is never run.
    * Any other file is text (`.gz` and `.zst` as well): documents are separated by lines `<|endoftext|>`
      where the file has such a line, else by blank lines.

    `#field` after any of them but text reads the text or the messages from a field of that name.

    Raises UserError, naming the line or row, for a corpus that is missing, empty, not UTF-8 or malformed.
    """
    source = str(source)
    found = False
    for document in _read(source):
        found = True
        yield document
    if not found:
        raise UserError(f"{source} holds no documents; give a file with at least one")


def _read(source: str) -> Iterator[Document]:
    place, _, field = (source, "", "") if Path(source).exists() else source.partition("#")
    if place.startswith(HUB):
        return _parsed(hub_records(place.removeprefix(HUB), field), field)
    path = Path(place)
    if path.is_dir() or (path.is_file() and path.suffix == ".parquet"):
        return _parsed(parquet_records(path, field), field)
    if not path.is_file():
        raise UserError(
            f"{path} is not a file; give --text a .jsonl, .parquet or .txt file, a folder of .parquet files,"
            f" or {HUB}owner/name"
        )
    if ".jsonl" in path.suffixes[-2:]:
        return _parsed(_json_lines(path), field)
    if field:
        raise UserError(f"{path} is read as text, which has no field {field}; leave out #{field}")
    return _read_text(path)


def _parsed(records: Iterable[tuple[str, object]], field: str) -> Iterator[Document]:
    for place, record in records:
        try:
            yield parse_document(_renamed(record, field) if field else record)
        except UserError as error:
            raise UserError(f"{place}: {error}") from error


def _renamed(record: object, field: str) -> object:
    """A record whose `field` is called text, or messages where it is a list of them."""
    if not isinstance(record, dict):
        return record
    fields = cast(dict[str, object], record)
    if field not in fields:
        raise UserError(f"there is no field {field} (fields found: {', '.join(sorted(fields)) or 'none'})")
    kept = {name: value for name, value in fields.items() if name not in ("text", "messages")}
    return {**kept, "messages" if isinstance(fields[field], list) else "text": fields[field]}


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines without their line ends (only \\n and \\r\\n end a line)."""
    try:
        with _opened(path) as file:
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
        raise UserError(f"{path} cannot be read ({error.strerror or error}); check the file") from error


def _opened(path: Path) -> BinaryIO:
    """The file's bytes, decompressed where its name says so."""
    if path.suffix in (".gz", ".zst"):
        return cast(BinaryIO, BufferedReader(cast(Any, pa.input_stream(str(path)))))
    return path.open("rb")


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


def _json_lines(path: Path) -> Iterator[tuple[str, object]]:
    for number, line in _lines(path):
        if line.strip():
            try:
                yield f"{path} line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path} line {number} is not JSON ({error.msg}); mend the line") from error


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
    stratum = fields.get("stratum")
    if stratum is not None and not _string(stratum, "stratum"):
        raise UserError("the field stratum must not be empty")
    parsed = [] if messages is None else _parse_messages(messages)
    contents = [m["content"] for m in parsed] or [_string(text, "text")]
    more: dict[str, Any] = {
        "id": id_,
        "focus": _parse_focus(fields.get("focus"), contents[-1]),
        "mask": _parse_mask(fields.get("mask"), contents, with_message=text is None),
        "stratum": stratum,
        "labels": _parse_labels(fields.get("label"), fields.get("labels")),
        "concepts": _parse_concepts(fields.get("concepts"), contents, with_message=text is None),
    }
    return Document.of_messages(parsed, **more) if parsed else Document.of_text(contents[0], **more)


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


def _parse_mask(value: object, contents: Sequence[str], *, with_message: bool) -> tuple[Span, ...]:
    if value is None:
        return ()
    spans: list[Span] = []
    for span in cast(list[object], value) if isinstance(value, list) else [value]:
        place = [0, *cast(list[object], span)] if isinstance(span, list) and not with_message else span
        match place:
            case [int() as message, int() as start, int() as end] if 0 <= message < len(
                contents
            ) and 0 <= start < end <= len(contents[message]):
                spans.append((message, start, end))
            case _:
                form = "[message, start, end]" if with_message else "[start, end]"
                raise UserError(
                    f"the field mask must be a list of {form}, each with 0 ≤ start < end ≤ the length of"
                    f" {'that message, counted from 0' if with_message else 'the text'} (found {span!r:.40})"
                )
    return tuple(spans)


def _parse_labels(label: object, labels: object) -> dict[str, str]:
    # Many a corpus has a field of that name with something else in it, which is no reason to refuse it.
    named = cast(dict[str, object], labels) if isinstance(labels, dict) else {}
    return {
        name: str(value).lower() if isinstance(value, int) else _string(value, f"labels.{name}")
        for name, value in [("label", label), *named.items()]
        if isinstance(value, int | str)
    }


def _parse_concepts(value: object, contents: Sequence[str], *, with_message: bool) -> tuple[Concept, ...]:
    found: list[Concept] = []
    for item in cast(list[object], value) if isinstance(value, list) else []:
        if not isinstance(item, list):
            continue
        place = cast(list[object], item) if with_message else [0, *cast(list[object], item)]
        match place:
            case [int() as message, str() as name, int() as start, int() as end] if (
                name and 0 <= message < len(contents) and 0 <= start < end <= len(contents[message])
            ):
                found.append((message, _string(name, "concepts"), start, end))
            case _:
                form = "[message, name, start, end]" if with_message else "[name, start, end]"
                raise UserError(
                    f"the field concepts must be a list of {form}, each with 0 ≤ start < end ≤ the length of"
                    f" {'that message, counted from 0' if with_message else 'the text'} (found {item!r:.40})"
                )
    return tuple(found)
