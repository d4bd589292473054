"""Memory between two passes of a model on the processor: kept, where glibc would hand it back each time.

Every layer allocates tensors of tens of megabytes and frees them. glibc takes such blocks from the system by
themselves (`mmap`) and returns them at once, so that the system has to clear and map all of their pages
again, for every operation: up to a third of a forward pass (benchmarks/RESULTS.md, "capture"). See
mallopt(3).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_… of malloc.h
KEPT = 1 << 30
"""Bytes: larger blocks still come from the system one by one, and more free memory than this at the heap's
end goes back to it."""
_USUAL = {_MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}
"""Where glibc's own thresholds, which rise with what is freed, come to rest in a process that runs models."""


def _library() -> Any:
    """The C library; None but on Linux."""
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def give_back() -> None:
    """Let glibc return what was freed to the system, also from between what lives on.

    A long pass calls it now and then: there would be more such holes the longer it goes on.
    """
    if trim := getattr(_library(), "malloc_trim", None):
        trim(0)


@contextmanager
def kept_pages(device: torch.device) -> Generator[None]:
    """While open, freed memory stays with this process, up to `KEPT` beyond what was in use at once.

    For the whole process, threads and all; it goes back at the end. Does nothing for other devices than the
    processor, nor where the C library is not glibc.
    """
    option: Any = getattr(_library(), "mallopt", None) if device.type == "cpu" else None
    if option is None:
        yield
        return
    for threshold in _USUAL:
        option(threshold, KEPT)
    try:
        yield
    finally:
        for threshold, usual in _USUAL.items():
            option(threshold, usual)
        give_back()
