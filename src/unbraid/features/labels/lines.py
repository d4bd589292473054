"""Labels, reviews and lists as JSON Lines: sorted, one thing that was said a line, checked when read."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from unbraid.features.labels.label import (
    LONGEST_NAME,
    LONGEST_TEXT,
    LONGEST_WHY,
    Label,
    Review,
    checked_latent,
    checked_scores,
    checked_verdict,
    clean,
)
from unbraid.features.labels.rows import Row
from unbraid.manifest.errors import UserError
from unbraid.manifest.files import write_text

GZIP = b"\x1f\x8b"
"""What a gzip file begins with."""


def write_lines(rows: Sequence[Row], path: Path) -> int:
    """Write rows as lines; equal content gives equal bytes.  Returns their number."""
    lines = [row.line() for row in sorted(rows, key=lambda row: row.order)]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n" for line in lines))
    return len(lines)


def read_lines(path: Path, sae: str) -> list[Row]:
    """The rows of a file of lines, gzip or not, each checked as if it were written now.

    Raises UserError, naming file and line, where a line is no JSON object, lacks a field, is of another
    autoencoder than `sae` (empty: of any, but one alone), or does not hash to its own id.
    """
    rows: list[Row] = []
    for number, text in enumerate(_read(path).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            if not isinstance(line, dict):
                raise UserError("it is no JSON object")
            row = _row(cast("dict[str, Any]", line))
            sae = sae or str(row.values.get("sae", ""))
            if row.values.get("sae", sae) != sae:
                raise UserError(f"it is about autoencoder {row.values['sae'][:12]}…, not {sae[:12]}…")
            if line.get("id") != row.values["id"]:
                raise UserError(
                    "its id does not belong to what it says; it was changed after it was exported"
                )
        except (UserError, KeyError, TypeError, ValueError, RecursionError) as error:
            why = f"the field {error} is missing" if isinstance(error, KeyError) else str(error)
            raise UserError(f"line {number} of {path}: {why}") from error
        rows.append(row)
    return rows


def _read(path: Path) -> str:
    """A file's text; raises UserError where there is none."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; give a file of labels, or add --format neuronpedia")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a file of labels") from error
    try:
        return (gzip.decompress(data) if data[:2] == GZIP else data).decode()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is no gzip file, or is damaged ({error}); fetch it again") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8; give a file that `unbraid label --export` wrote") from error


def _row(line: Mapping[str, Any]) -> Row:
    if "what" not in line and {"modelId", "layer"} <= line.keys():
        raise UserError("it comes from Neuronpedia; add --format neuronpedia")
    what, at = line["what"], _text(line, "at", LONGEST_NAME)
    if what == "label":
        model = None if line["model"] is None else _text(line, "model", LONGEST_NAME)
        return Row.of_label(
            Label(
                sae=_text(line, "sae", LONGEST_NAME),
                latent=checked_latent(line["latent"]),
                text=_text(line, "text", LONGEST_TEXT),
                by=_text(line, "by", LONGEST_NAME),
                kind=_text(line, "kind", LONGEST_NAME),
                model=model,
                at=at,
            )
        )
    if what == "scores":
        return Row.of_scores(_text(line, "label", LONGEST_NAME), checked_scores(line["scores"]), at)
    if what == "review":
        verdict = checked_verdict(line["verdict"])
        why = _text(line, "why", LONGEST_WHY, empty=True)
        return Row.of_review(
            Review(_text(line, "label", LONGEST_NAME), verdict, _text(line, "by", LONGEST_NAME), why, at)
        )
    if what == "list":
        name, latent = _text(line, "list", LONGEST_NAME), checked_latent(line["latent"])
        if not isinstance(line["there"], bool):
            raise UserError("its field there is neither true nor false")
        return Row.of_kept(_text(line, "sae", LONGEST_NAME), name, latent, line["there"], at)
    raise UserError(f"there is nothing called {what!r} in a file of labels")


def _text(line: Mapping[str, Any], field: str, longest: int, *, empty: bool = False) -> str:
    value = line[field]
    if not isinstance(value, str) or clean(value, f"the field {field}", longest, empty=empty) != value:
        raise UserError(f"its field {field} must be one line of text without blanks at its ends")
    return value
