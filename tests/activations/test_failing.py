"""A disk that fails now and then is named in a sentence, and nothing is lost."""

from __future__ import annotations

import errno
import io
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unbraid.cli import main


class Failing:
    """One in fifty of the calls that put something on the disk fails, some after half of their work."""

    def __init__(self, folder: Path, seed: int, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.chance = random.Random(seed)
        self.calls = 0
        self.failed: list[str] = []
        for name in ("fsync", "replace", "rename", "link"):
            patch.setattr(os, name, self.now_and_then(getattr(os, name)))
        patch.setattr(io, "open", self.opening(io.open))

    def fails(self, what: str) -> bool:
        self.calls += 1
        if self.chance.random() < 1 / 50:
            self.failed.append(what)
            return True
        return False

    def now_and_then(self, call: Callable[..., Any]) -> Any:
        def wrapped(*args: Any, **more: Any) -> Any:
            if not self.fails(call.__name__):
                return call(*args, **more)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        return wrapped

    def opening(self, plain: Callable[..., Any]) -> Any:
        failing = self

        class Raw(io.FileIO):
            broken = False

            def write(self, data: Any) -> int:
                if self.broken:
                    self.broken = False
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                # As the system does it: a short write, and the error at the next.
                self.broken = failing.fails("write")
                return super().write(memoryview(data)[: max(len(data) >> self.broken, 1)]) or 0

        def wrapped(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **more: Any) -> Any:
            if mode[0] not in "wa" or not str(file).startswith(str(self.folder)):
                return plain(file, mode, buffering, *args, **more)
            raw = Raw(file, mode[0])
            if buffering == 0:
                return raw
            file = io.BufferedWriter(raw)
            return file if "b" in mode else io.TextIOWrapper(file, *args, **more)

        return wrapped


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def command(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    text = tmp_path_factory.mktemp("text") / "corpus.txt"
    text.write_text("\n\n".join(f"{n} wait " + "red ball " * (n % 40) for n in range(120)))
    words = ["capture", "--model", str(tiny_llama), "--site", "layers.1.resid_post", "--text", str(text)]
    return [*words, "--context", "64", "--batch-tokens", "256", "--shard-tokens", "50"]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("more", [[], ["--skip-norm-above", "1.2"]], ids=str)
def test_a_store_that_fails_one_write_in_fifty_ends_with_the_same_bytes(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    seed: int,
    more: list[str],
) -> None:
    old, out = tmp_path / "old", tmp_path / "out"
    assert main([*command, *more, "--out", str(old), "--tokens", "450"]) == 0
    appending = [*command, *more, "--append", str(old), "--tokens", "2500", "--out", str(out)]
    assert main(appending) == 0
    before, expected = bytes_of(old), bytes_of(out)
    out.rename(tmp_path / "whole")
    capsys.readouterr()
    runs = 0
    with monkeypatch.context() as patch:
        failing = Failing(tmp_path, seed, patch)
        while not out.exists():
            runs += 1
            failed = len(failing.failed)
            assert runs < 200
            code = main(appending)
            said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("capture:")]
            assert len(failing.failed) > failed or code == 0
            if code:
                assert code == 1 and len(said) == 1 and str(tmp_path) in said[0], said
                assert "Input/output error; run the same command again, what was finished is kept" in said[0]
    assert runs > 3 and len(failing.failed) >= runs - 1 and len(set(failing.failed)) > 1
    print(f"{runs} runs; failed: {dict(Counter(failing.failed))} of {failing.calls} calls")
    assert bytes_of(out) == expected and bytes_of(old) == before
