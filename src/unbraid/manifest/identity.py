"""Content ids: the same content has the same id, whatever the order of its keys and whenever it was made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from blake3 import blake3

TIME_KEYS = frozenset({"time", "times"})


def canonical_json(obj: Any) -> bytes:
    """Return the one JSON spelling of `obj`: sorted keys, no spaces, UTF-8.

    Raises ValueError for NaN and infinities, which JSON cannot say, and TypeError for what is no JSON value.
    """
    text = json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def sha256_bytes(data: bytes) -> str:
    """Return the SHA-256 of `data` as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits, reading it in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def blake3_file(path: Path) -> str:
    """Return the BLAKE3 of a file's bytes as 64 hexadecimal digits, reading it in pieces."""
    digest, piece = blake3(), bytearray(1 << 20)
    with open(path, "rb", buffering=0) as file:
        while read := file.readinto(piece):
            digest.update(memoryview(piece)[:read])
    return digest.hexdigest()


def content_id(record: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the record's canonical JSON without its own "id" and, at any depth, times."""
    return sha256_bytes(canonical_json(_timeless({k: v for k, v in record.items() if k != "id"})))


def _timeless(value: Any) -> Any:
    if isinstance(value, Mapping):
        items = cast("Mapping[str, Any]", value).items()
        return {key: _timeless(item) for key, item in items if key not in TIME_KEYS}
    if isinstance(value, list | tuple):
        return [_timeless(item) for item in cast("list[Any]", value)]
    return value
