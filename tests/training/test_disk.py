"""A disk that fills while a run is trained, several times: said in a sentence, and nothing is lost."""

from __future__ import annotations

from pathlib import Path

from unbraid.activations.store import ActivationStore

from ..small_disk import SmallDisk

FULL = """
import os, sys
from pathlib import Path
from unbraid.activations.store import ActivationStore
from unbraid.training.config import TrainConfig
from unbraid.training.trainer import train

store, disk = ActivationStore(Path(sys.argv[1])), Path(sys.argv[2])
config = TrainConfig(
    d_sae=96, k=4, lr=1e-2, steps=60, batch_size=256, checkpoint_every=10, log_every=5,
    calibration_tokens=4096, threads=1,
)
ballast = disk / "ballast"

def filling(at, left):
    def fill(done, total, note=""):
        if done >= at and not ballast.exists():
            room = os.statvfs(disk)
            ballast.write_bytes(bytes(room.f_bavail * room.f_frsize - left))
    return fill

for at, left in ((3, 0), (14, 8192), (31, 0), (60, 0)):
    try:
        train(store, None, config, disk / "sae", progress=filling(at, left))
    except OSError as error:
        print(f"{error.strerror}: {error.filename}")
    ballast.unlink()
for out in (disk / "sae", disk.parent / "whole"):
    train(store, None, config, out)
"""


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


def test_a_disk_that_fills_loses_no_finished_step(store: ActivationStore, small_disk: SmallDisk) -> None:
    said = small_disk.run("-c", FULL, str(store.folder), str(small_disk.folder))
    assert len(said) == 4
    for sentence in said:
        assert sentence.startswith("the disk is full; free some space and run the same command again, what")
        assert str(small_disk.folder / ".sae.partial") in sentence
    assert bytes_of(small_disk.kept / "sae") == bytes_of(small_disk.folder.parent / "whole")
