"""Freed memory stays while it is asked for, and goes back afterwards."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from unbraid.model import pages

PROGRAM = """
import resource, torch
from unbraid.model.pages import kept_pages

SIZE = 48 << 20

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(SIZE // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
torch.ones(8)
found = [faults()]
for device in ("cpu", "meta"):
    with kept_pages(torch.device(device)):
        torch.ones(SIZE // 4)
        found.append(faults())
    found.append(faults())
print(*found, SIZE // resource.getpagesize())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these thresholds")
def test_a_block_is_mapped_once_while_pages_are_kept_and_every_time_otherwise() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    before, inside, after, other_device, again, one = map(int, done.stdout.split())
    if before < 6 * one:
        pytest.skip("this system maps more than a page at a time")
    assert inside < 3 * one
    for outside in (after, other_device, again):
        assert outside > 6 * one


def test_thresholds_return_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int, int]] = []

    class Library:
        """A C library that keeps what it is told."""

        def mallopt(self, option: int, value: int) -> int:
            calls.append(("mallopt", option, value))
            return 1

        def malloc_trim(self, pad: int) -> int:
            calls.append(("malloc_trim", 0, pad))
            return 1

    monkeypatch.setattr(pages.sys, "platform", "linux")
    monkeypatch.setattr(pages.ctypes, "CDLL", lambda _: Library())
    with pytest.raises(ValueError, match="inside"), pages.kept_pages(torch.device("cpu")):
        raise ValueError("inside")
    assert calls == [
        *(("mallopt", threshold, pages.KEPT) for threshold in (-3, -1)),
        ("mallopt", -3, 32 << 20),
        ("mallopt", -1, 64 << 20),
        ("malloc_trim", 0, 0),
    ]


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages.ctypes, "CDLL", lambda _: object())
    with pages.kept_pages(torch.device("cpu")):
        assert torch.ones(2).sum() == 2
