"""SIGKILL at random moments, ten times; the files are those of a run that nobody disturbed, byte for byte."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

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
KILLS = 10

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
def test_ten_kills_leave_no_trace(store: ActivationStore, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "killed"
    train(store, None, TrainConfig(**OPTIONS), whole)  # pyright: ignore[reportArgumentType]
    chance = random.Random(0)
    environment = os.environ | {"PYTHONPATH": str(Path(unbraid.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", SCRIPT, str(store.folder), json.dumps(OPTIONS), str(out)]
    parent = subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment
    )
    assert parent.stdin is not None and parent.stdout is not None
    kills = 0
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
                    if reports == 0 and kills < KILLS:
                        time.sleep(chance.random() * 0.02)
                        os.kill(int(word), signal.SIGKILL)
                        kills += 1
        finally:
            parent.stdin.close()
    assert kills == KILLS
    names = sorted(path.name for path in whole.iterdir())
    assert sorted(path.name for path in out.iterdir()) == names
    for name in names:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
