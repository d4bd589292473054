"""A shard's file, in the safetensors format: written and hashed in one go, read in pieces."""

from __future__ import annotations

import ctypes
import json
import math
import sys
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from blake3 import blake3
from torch import Tensor

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "I32": torch.int32, "I8": torch.int8}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
WRITE = 1 << 22
"""Bytes handed to the system at once."""
_ASK: Any = getattr(ctypes.CDLL(None), "sync_file_range", None) if sys.platform == "linux" else None


@dataclass(frozen=True)
class Place:
    """Where a tensor is in a shard's file."""

    offset: int
    """Byte at which it begins."""
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def pitch(self) -> int:
        """Bytes from one row to the next."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


def places(path: Path) -> dict[str, Place]:
    """Where the tensors of a shard are, by the header of the safetensors format: eight bytes with its length,
    then JSON. Raises ValueError where that is not what the file holds.
    """
    found: dict[str, Place] = {}
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size - 8 - length
        if size < 0:
            raise ValueError("its header is longer than the file")
        try:
            header = cast("dict[str, Any]", json.loads(file.read(length)))
            for name, entry in header.items():
                if name != "__metadata__":
                    begin, end = entry["data_offsets"]
                    found[name] = place = Place(
                        8 + length + begin, _DTYPES[entry["dtype"]], tuple(entry["shape"])
                    )
                    if not 0 <= begin <= end <= size or place.shape[0] * place.pitch != end - begin:
                        raise ValueError("its header names more than the file holds")
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError("its header is no safetensors header") from error
    return found


def write_tensors(path: Path, tensors: Mapping[str, Tensor], beside: Executor) -> tuple[int, str]:
    """Write contiguous tensors; returns the file's length and its BLAKE3, taken on the way in `beside`'s one
    thread.

    The library's own writer first copies everything into one piece of memory, and the file would have to be
    read again for its hash.
    """
    # The widest first, as the library has them: then everything is aligned for who maps the file.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    pieces = [memoryview(head), *(memory(tensor) for _, tensor in ordered)]
    digest = blake3()
    # Hashing takes as long as writing to the system's cache; neither holds the interpreter's lock.
    with path.open("wb", buffering=0) as file:
        hashed = [beside.submit(digest.update, piece) for piece in pieces]
        for piece in pieces:
            written = 0
            while written < len(piece):
                written += file.write(piece[written : written + WRITE])
                _begin(file.fileno())
        for part in hashed:
            part.result()
    return len(head) + end, digest.hexdigest()


def _begin(handle: int) -> None:
    """Ask the system, where it can be asked (Linux), to begin to put a file on the disk.

    It would begin when the file is flushed, and the disk would wait until then. Whether anything came of it
    does not matter: who needs the file there flushes it.
    """
    if _ASK is not None:
        all_of_it = ctypes.c_int64(0), ctypes.c_int64(0)
        _ASK(handle, *all_of_it, ctypes.c_uint(2))  # SYNC_FILE_RANGE_WRITE


def memory(tensor: Tensor) -> memoryview:
    """A contiguous tensor's own bytes."""
    return memoryview(cast(Any, tensor.view(-1).view(torch.uint8).numpy()))
