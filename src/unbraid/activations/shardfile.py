"""A shard's file, in the safetensors format: written and hashed in one go, read in pieces."""

from __future__ import annotations

import ctypes
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from blake3 import blake3
from torch import Tensor

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "I32": torch.int32, "I8": torch.int8}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
PIECE = 1 << 20
"""Bytes that are hashed and handed to the system at once; a processor's own cache holds them for both."""
ASK = 1 << 22
"""Bytes after which the system is asked to begin with the disk."""
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


class ShardFile:
    """Tensors on their way into a file and into its BLAKE3, from the first byte to the last.

    Their memory may still be filled meanwhile: `go_on` takes what there is of the first tensor, `finish` the
    rest. What was just computed is then hashed and copied while the processor's cache has it. The library's
    own writer first copies everything into one piece of memory, and the file would have to be read again for
    its hash.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Contiguous tensors of the lengths that they have in the file, whatever they hold yet."""
        self.path = path
        ordered = _ordered(tensors)
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
        self.size = len(head) + end
        """Bytes of the whole file."""
        self._memory = [memoryview(head), *(memory(tensor) for _, tensor in ordered)]
        self._begin, first = len(head), ordered[0][1] if ordered else torch.empty(0)
        self._pitch = first.nbytes // max(1, len(first))
        self._digest, self._file = blake3(), None
        self._done = self._asked = 0
        self._failed: OSError | None = None

    def go_on(self, rows: int) -> None:
        """Write of the first tensor what is not yet written of its first rows, which are there by now. Raises
        OSError, then and ever after, when the system refuses."""
        self._write(self._begin + rows * self._pitch)

    def finish(self) -> str:
        """Write the rest; returns the file's BLAKE3. Raises OSError as `go_on` does."""
        self._write(self.size)
        self.close()
        return self._digest.hexdigest()

    def close(self) -> None:
        """Leave the file as it is."""
        if self._file is not None:
            self._file.close()

    def _write(self, end: int) -> None:
        """Bytes from where it stopped to `end`, a piece at a time."""
        if self._failed is not None:
            raise self._failed
        try:
            if self._file is None:
                self._file = self.path.open("wb", buffering=0)
            begin = 0
            for memory in self._memory:
                stop = min(begin + len(memory), end)
                while self._done < stop:
                    piece = memory[self._done - begin : min(self._done + PIECE, stop) - begin]
                    self._digest.update(piece)
                    written = 0
                    while written < len(piece):
                        written += self._file.write(piece[written:])
                    self._done += len(piece)
                    if self._done - self._asked >= ASK or self._done == self.size:
                        _begin(self._file.fileno())
                        self._asked = self._done
                begin += len(memory)
        except OSError as error:
            self._failed = error
            self.close()
            raise


def _ordered(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """The widest numbers first, as the library has them: then everything is aligned for who maps the file.
    Before them the largest tensor, which is the one to wait for, where they are aligned behind it too."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    largest = max(ordered, key=lambda item: item[1].nbytes, default=None)
    if largest is not None and largest[1].nbytes % ordered[0][1].dtype.itemsize == 0:
        ordered.sort(key=lambda item: item[0] != largest[0])
    return ordered


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
