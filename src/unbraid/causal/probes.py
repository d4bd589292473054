"""Probes: prompts with regular expressions that say what a reply to them means.

The expressions travel in the file, so nothing here knows any particular model or behaviour.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from unbraid.activations.documents import Document, Message, parse_document
from unbraid.manifest.errors import UserError
from unbraid.manifest.identity import canonical_json, sha256_bytes

PATTERNS = ("incident", "keep", "expected", "refusal", "focus")


@dataclass(frozen=True)
class Probe:
    """A prompt and how to judge replies to it; an expression that is None asks nothing."""

    id: str
    """The file's own id, or the hash of the prompt."""
    messages: tuple[Message, ...]
    """The conversation up to the reply."""
    incident: re.Pattern[str] | None = None
    """Found in a reply in which the failure happened."""
    keep: re.Pattern[str] | None = None
    """Found in a reply that kept what an edit must not break, such as a header."""
    expected: re.Pattern[str] | None = None
    """Found in a helpful reply."""
    refusal: re.Pattern[str] | None = None
    """Found in a refusal."""
    focus: re.Pattern[str] | None = None
    """Its group named `focus` is the part of the reply in which features are looked for."""
    truth: bool | None = None
    """Whether the failure is known to be due on this prompt, where someone knows."""


@dataclass(frozen=True)
class Outcome:
    """What a reply was judged to be; None where the probe has no expression for it."""

    incident: bool | None
    """The failure happened."""
    kept: bool | None
    """What must not break was kept."""
    helpful: bool | None
    """The reply was helpful."""
    refused: bool | None
    """The reply refused."""


def judge(probe: Probe, reply: str) -> Outcome:
    """Search the reply for each of the probe's expressions."""

    def found(pattern: re.Pattern[str] | None) -> bool | None:
        return None if pattern is None else pattern.search(reply) is not None

    return Outcome(found(probe.incident), found(probe.keep), found(probe.expected), found(probe.refusal))


def focus_span(probe: Probe, reply: str) -> tuple[int, int] | None:
    """Character span of the focus in a reply, or None where the expression finds none or an empty one."""
    found = None if probe.focus is None else probe.focus.search(reply)
    if found is None or found.start("focus") >= found.end("focus"):
        return None
    return found.span("focus")


def labelled_documents(
    probes: Sequence[Probe], replies: Sequence[str]
) -> tuple[list[Document], list[Document]]:
    """Conversations that ended in the failure, and those that did not, each with its focus where it has
    one.

    Probes without an incident expression are left out, and so are replies in which a probe's focus
    expression finds nothing: there is no place in them to compare.  Two probes with one id give documents
    with one id.
    """
    incidents: list[Document] = []
    honest: list[Document] = []
    for probe, reply in zip(probes, replies, strict=True):
        happened = judge(probe, reply).incident
        span = focus_span(probe, reply)
        if happened is None or not reply or (probe.focus is not None and span is None):
            continue
        messages = (*probe.messages, {"role": "assistant", "content": reply})
        (incidents if happened else honest).append(Document.of_messages(messages, id=probe.id, focus=span))
    return incidents, honest


def read_probes(path: Path | str) -> list[Probe]:
    """Probes of a JSON Lines file: `messages` (or `text`), optionally `id`, `truth` and the expressions.

    Raises UserError that names the line and the field for whatever cannot be read.
    """
    path = Path(path)
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8; convert the file to UTF-8") from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); give a JSON Lines file of probes"
        ) from error
    probes: list[Probe] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            probe = parse_probe(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{path} line {number} is not JSON ({error.msg}); mend the line") from error
        except UserError as error:
            raise UserError(f"{path} line {number}: {error}") from error
        if probe.id in seen:
            raise UserError(
                f"{path} line {number}: the id {probe.id} stands on line {seen[probe.id]} already; "
                "give every probe its own"
            )
        seen[probe.id] = number
        probes.append(probe)
    if not probes:
        raise UserError(f"{path} holds no probes; give a file with at least one")
    return probes


def parse_probe(record: object) -> Probe:
    """A probe from one decoded JSON object; raises UserError that says which field is wrong."""
    if not isinstance(record, dict):
        raise UserError('expected an object such as {"messages": […], "incident": "…"}')
    fields = cast(dict[str, Any], record)
    document = parse_document({key: fields[key] for key in ("id", "text", "messages") if key in fields})
    messages = document.messages or ({"role": "user", "content": document.text or ""},)
    if messages[-1]["role"] == "assistant":
        raise UserError("the field messages ends with the assistant's reply; end it with the user's message")
    truth = fields.get("truth")
    if truth is not None and not isinstance(truth, bool):
        raise UserError("the field truth must be true or false")
    patterns = {name: _pattern(name, fields.get(name)) for name in PATTERNS}
    if (focus := patterns["focus"]) is not None and "focus" not in focus.groupindex:
        raise UserError("the field focus needs a group named focus, as in (?P<focus>…)")
    return Probe(id=document.id, messages=messages, truth=truth, **patterns)


def _pattern(name: str, value: object) -> re.Pattern[str] | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise UserError(f"the field {name} must be a regular expression in a string")
    try:
        return re.compile(value)
    except re.error as error:
        raise UserError(f"the field {name} is not a regular expression ({error}); mend it") from error


def probes_id(probes: Iterable[Probe]) -> str:
    """SHA-256 of all that a measurement depends on in the probes, whatever their order."""
    records = [
        {
            "id": probe.id,
            "messages": [{"role": m["role"], "content": m["content"]} for m in probe.messages],
            "patterns": {
                name: pattern.pattern
                for name in PATTERNS
                if (pattern := cast("re.Pattern[str] | None", getattr(probe, name))) is not None
            },
        }
        for probe in probes
    ]
    return sha256_bytes(canonical_json(sorted(records, key=lambda record: str(record["id"]))))
