"""Ten times killed at random moments, a capture still ends in the bytes of an undisturbed one."""

from __future__ import annotations

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
# Forks a process for each capture, so that torch is imported once and not for each of the kills.
SERVER = """
import os, sys
import numpy as np
from pathlib import Path
from unbraid.activations.capture import CaptureConfig, capture
from unbraid.activations.documents import Document
from unbraid.model.load import load_model

lm = load_model(sys.argv[1])
config = CaptureConfig(
    sites=("layers.1.resid_post", "layers.0.mlp_out"), tokens=SHARDS * 200 - 50, context=64,
    batch_tokens=256, shard_tokens=200, CHOSEN
)

def documents():
    rng = np.random.default_rng(0)
    while True:
        yield Document.of_text("wait red ball " * int(rng.integers(1, 30)), stratum=str(rng.integers(3)))

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            capture(lm, documents(), config, Path(line.strip()))
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

    def start(self, out: Path) -> int:
        """Begin a capture; returns its process id."""
        assert self.process.stdin
        self.process.stdin.write(f"{out}\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> int:
        assert self.process.stdout
        return int(self.process.stdout.readline())


@contextmanager
def serving(model: Path, chosen: str) -> Iterator[Server]:
    code = SERVER.replace("SHARDS", str(SHARDS)).replace("CHOSEN", chosen)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(model)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env) as process:
        try:
            yield Server(process)
        finally:
            process.kill()


@pytest.mark.parametrize("chosen", ["", "per_document=20, per_stratum=30, skip_norm_above=1.05"])
def test_ten_kills_change_no_byte(tiny_llama: Path, tmp_path: Path, chosen: str) -> None:
    chance = random.Random(0)
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    with serving(tiny_llama, chosen) as server:
        server.start(tmp_path / "whole")
        begun = time.monotonic()
        assert server.answer() == 0
        shards = len(list((tmp_path / "whole").glob("shard-*")))
        assert shards == SHARDS if not chosen else SHARDS / 2 < shards < SHARDS
        per_shard = (time.monotonic() - begun) / shards
        codes: list[int] = []
        for kill in range(10):
            child = server.start(out)
            # Somewhere after a few more shards, in the middle of whatever it does then.
            wanted = (kill + 1) * shards // 12
            while len(list(partial.glob("shard-*"))) < wanted and not out.exists():
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 2 * per_shard))
            os.kill(child, signal.SIGKILL)
            codes.append(server.answer())
        assert codes == [-signal.SIGKILL] * 10
        assert not out.exists() and len(list(partial.glob("shard-*"))) < shards
        server.start(out)
        assert server.answer() == 0
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert len(files) == shards + 4 + bool(chosen) and not partial.exists()
