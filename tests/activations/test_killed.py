"""Killed at random moments, a capture still ends in the bytes of an undisturbed one.

A few kills here; `python tests/activations/test_killed.py` (`make kills`) gives ten to every kind of capture.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")

SHARDS = 36
TEN = "UNBRAID_KILLS"
"""Environment variable with the number of kills."""
KILLS = int(os.environ.get(TEN, "4"))
# Forks a process for each capture, so that torch is imported once and not for each of the kills.
SERVER = """
import json, os, sys, time
import numpy as np
from pathlib import Path
from unbraid.activations.capture import capture
from unbraid.activations.reading import CaptureConfig
from unbraid.activations.documents import Document
from unbraid.model.load import load_model

lm = load_model(sys.argv[1])

def stop_before(shard):
    # Stays for ever where this shard is opened: a kill never comes too late, however busy the machine is.
    def wait(event, arguments):
        if event == "open" and f"shard-{shard:05d}" in str(arguments[0]):
            time.sleep(10**6)
    sys.addaudithook(wait)

def config(tokens):
    return CaptureConfig(
        sites=("layers.1.resid_post", "layers.0.mlp_out"), tokens=tokens, context=64, batch_tokens=256,
        shard_tokens=200, CHOSEN
    )

def documents():
    rng = np.random.default_rng(0)
    while True:
        yield Document.of_text("wait red ball " * int(rng.integers(1, 30)), stratum=str(rng.integers(3)))

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            out, tokens, append, last = json.loads(line)
            stop_before(last)
            capture(lm, documents(), config(tokens), Path(out), append=append)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(child, flush=True)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


class Server:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def start(self, out: Path, tokens: int, append: Path | None, last: int = -1) -> int:
        """Begin a capture, which stops for ever before its shard `last`; returns its process id."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps([str(out), tokens, append and str(append), last]) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> int:
        assert self.process.stdout
        return int(self.process.stdout.readline())


@contextmanager
def serving(model: Path, chosen: str) -> Iterator[Server]:
    code = SERVER.replace("CHOSEN", chosen)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(model)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env) as process:
        try:
            yield Server(process)
        finally:
            process.kill()


CHOSEN = "per_document=20, per_stratum=30, skip_norm_above=1.05"


@pytest.mark.parametrize(("chosen", "appended"), [("", 0), (CHOSEN, 0), ("", 650), (CHOSEN, 650)])
def test_kills_change_no_byte(tiny_llama: Path, tmp_path: Path, chosen: str, appended: int) -> None:
    chance = random.Random(0)
    tokens, old = SHARDS * 200 - 50 - appended, tmp_path / "old" if appended else None
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    with serving(tiny_llama, chosen) as server:
        if old is not None:
            server.start(old, appended, None)
            assert server.answer() == 0
            before = {path.name: path.read_bytes() for path in old.iterdir()}
        server.start(tmp_path / "whole", tokens, old)
        begun = time.monotonic()
        assert server.answer() == 0
        shards = len(list((tmp_path / "whole").glob("shard-*")))
        assert shards == SHARDS if not chosen else SHARDS / 3 < shards < SHARDS
        per_shard = (time.monotonic() - begun) / shards
        codes: list[int] = []
        for kill in range(KILLS):
            # Somewhere after a few more shards, in the middle of whatever it does then.
            wanted = (kill + 1) * shards // (KILLS + 2)
            child = server.start(out, tokens, old, wanted + 3)
            while len(list(partial.glob("shard-*"))) < wanted:
                os.kill(child, 0)  # of one that failed nothing more comes
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 2 * per_shard))
            os.kill(child, signal.SIGKILL)
            codes.append(server.answer())
        assert codes == [-signal.SIGKILL] * KILLS
        assert not out.exists() and len(list(partial.glob("shard-*"))) < shards
        server.start(out, tokens, old)
        assert server.answer() == 0
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert len(files) == shards + 4 + bool(chosen) and not partial.exists()
    if old is not None:
        assert {path.name: path.read_bytes() for path in old.iterdir()} == before
    print(f"\n{KILLS} kills, {shards} shards; {len(files)} files, same bytes")


if __name__ == "__main__":
    os.environ.setdefault(TEN, "10")
    sys.exit(pytest.main(["-q", "-s", __file__, *sys.argv[1:]]))
