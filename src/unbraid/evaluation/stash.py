"""Tensors of a run kept on the disk, so that memory does not grow with the text."""

from __future__ import annotations

import shutil
import tempfile
from types import TracebackType

import torch
from torch import Tensor

LIMIT = 8 << 30
"""Bytes that a stash takes at most; and half of what is free."""


class Stash:
    """A list of tensors in a file without a name, which is gone when the stash is closed."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115, closed by __exit__
        self._places: list[tuple[int, torch.Size, torch.dtype] | None] = []
        self._left = min(limit, shutil.disk_usage(tempfile.gettempdir()).free // 2)
        self._end = 0

    def __enter__(self) -> Stash:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, tensor: Tensor) -> None:
        """Keep a tensor, or its absence where there is no more room."""
        size = tensor.numel() * tensor.element_size()
        if self._end + size > self._left:
            self._places.append(None)
            return
        data = memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        self._file.seek(self._end)
        while len(data):
            data = data[self._file.write(data) :]
        self._places.append((self._end, tensor.shape, tensor.dtype))
        self._end += size

    def __getitem__(self, number: int) -> Tensor | None:
        """The tensor that was added as number `number`, on the processor; None where there was no room."""
        place = self._places[number]
        if place is None:
            return None
        start, shape, dtype = place
        # Not np.empty, whose memory begins anywhere in a cache line: products of a tensor are rounded by
        # where it lies, and a run begun again must end with the same bits.
        tensor = torch.empty(shape, dtype=dtype)
        self._file.seek(start)
        view = memoryview(tensor.flatten().view(torch.uint8).numpy().data)
        while len(view):
            count = self._file.readinto(view)
            if not count:
                raise OSError("a temporary file became shorter")
            view = view[count:]
        return tensor
