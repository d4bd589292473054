"""SIGKILL at random moments; the files are those of a run that nobody disturbed, byte for byte.

A few kills for most kinds of step here; `python tests/training/test_killed.py` gives every architecture ten.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

import unbraid
from unbraid.activations.store import ActivationStore
from unbraid.training.config import TrainConfig
from unbraid.training.trainer import train

OPTIONS = {
    "d_sae": 64,
    "k": 4,
    "steps": 400,  # ten kills come at most 28 steps apart, so none can find the run finished
    "batch_size": 128,
    "checkpoint_every": 8,
    "log_every": 5,
    "dead_after": 2000,
    "calibration_tokens": 1024,
    "threads": 1,
}
OWN = {"relu": {"resample_every": 90}, "jumprelu": {"options": {"l0": 0.1}}}

# One process is killed again and again by forking it after the slow imports.
SCRIPT = """
import json, os, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from unbraid.activations.store import ActivationStore
from unbraid.training.config import TrainConfig
from unbraid.training.trainer import train
store, config, out = ActivationStore(sys.argv[1]), TrainConfig(**json.loads(sys.argv[2])), Path(sys.argv[3])
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        def report(done, total, note=""):
            if done == 1 or done % 7 == 0:
                os.write(1, f"{os.getpid()} {done}\\n".encode())
        train(store, None, config, out, progress=report)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    os.write(1, f"end {status}\\n".encode())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize(
    ("architecture", "kills"),
    [("topk", 10), ("matryoshka", 3), ("relu", 3), ("jumprelu", 3), ("gated", 3)],
)
def test_kills_leave_no_trace(store: ActivationStore, tmp_path: Path, architecture: str, kills: int) -> None:
    options = OPTIONS | {"architecture": architecture} | OWN.get(architecture, {})
    whole, out = tmp_path / "whole", tmp_path / "killed"
    train(store, None, TrainConfig(**options), whole)  # pyright: ignore[reportArgumentType]
    _train_killed(store, options, out, kills)
    names = sorted(path.name for path in whole.iterdir())
    assert sorted(path.name for path in out.iterdir()) == names
    for name in names:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def _train_killed(store: ActivationStore, options: dict[str, Any], out: Path, kills: int) -> None:
    """Train into `out`, killed so many times on the way."""
    chance = random.Random(0)
    environment = os.environ | {"PYTHONPATH": str(Path(unbraid.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", SCRIPT, str(store.folder), json.dumps(options), str(out)]
    parent = subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment
    )
    assert parent.stdin is not None and parent.stdout is not None
    killed = 0
    with parent:
        try:
            while not out.exists():
                parent.stdin.write("go\n")
                parent.stdin.flush()
                reports = chance.randrange(1, 5)
                for line in parent.stdout:
                    word, number = line.split()
                    if word == "end":
                        assert int(number) in (0, signal.SIGKILL)
                        break
                    reports -= 1
                    if reports == 0 and killed < kills:
                        time.sleep(chance.random() * 0.02)
                        os.kill(int(word), signal.SIGKILL)
                        killed += 1
        finally:
            parent.stdin.close()
    assert killed == kills


if __name__ == "__main__":
    from conftest import _planted, _store
    from unbraid.sae.registry import ARCHITECTURES

    for name in (name for name, kind in ARCHITECTURES.items() if kind.reads == "site"):
        with TemporaryDirectory() as folder:
            test_kills_leave_no_trace(_store(Path(folder) / "acts", _planted(6000)), Path(folder), name, 10)
        print(f"{name}: killed ten times, the same bytes")
