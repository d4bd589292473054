"""What does not fit into memory is refused before anything is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from unbraid.activations.store import ActivationStore
from unbraid.manifest.errors import UserError
from unbraid.sae.base import SAEConfig
from unbraid.sae.registry import ARCHITECTURES
from unbraid.training import trainer
from unbraid.training.config import TrainConfig
from unbraid.training.memory import available, check_memory, needed
from unbraid.training.trainer import train

SMALL = SAEConfig(architecture="topk", d_in=8, d_sae=32, k=2)


def test_the_need_is_four_times_the_weights_and_the_batch() -> None:
    assert needed(SMALL, 100) == 4 * 4 * (2 * 8 * 32 + 32 + 8) + 3 * 4 * 100 * 16
    assert needed(replace(SMALL, architecture="topk_transcoder", d_out=4), 100) == (
        4 * 4 * (12 * 32 + 32 + 4) + 3 * 4 * 100 * 12
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_can_be_weighed_without_being_made(architecture: str) -> None:
    kind = ARCHITECTURES[architecture]
    blocks = (1 << 19, 1 << 19) if kind.reads in ("sites", "pairs") else ()
    d_out = 1 << 20 if kind.reads in ("pair", "pairs") else 0
    config = SAEConfig(
        architecture=architecture, d_in=1 << 20, d_sae=1 << 22, k=2 if kind.uses_k else 0, d_out=d_out,
        blocks=blocks,
    )  # fmt: skip
    assert needed(config, 1) >= 4 * 4 * (1 << 42)


def test_the_sentence_names_the_width_and_both_sizes() -> None:
    check_memory([SMALL], 1, None)
    check_memory([SMALL], 1, needed(SMALL, 1))
    with pytest.raises(UserError, match=r"width 32 on 8 dimensions .* needs about 0 MB .* 0 MB are free"):
        check_memory([SMALL], 1, needed(SMALL, 1) - 1)
    with pytest.raises(UserError, match=r"batches of 1,000,000,000 needs about 192.0 GB .* --batch-size"):
        check_memory([SMALL], 10**9, 10**9)
    with pytest.raises(UserError, match=r"2 autoencoders of width up to 64 .* fewer at a time"):
        check_memory([SMALL, replace(SMALL, d_sae=64)], 1, 1000)


def test_the_smaller_of_machine_and_container_counts(tmp_path: Path) -> None:
    assert available(tmp_path, tmp_path) is None
    (tmp_path / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable:     700 kB\n")
    assert available(tmp_path, tmp_path) == 700 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    assert available(tmp_path, tmp_path) == 700 * 1024
    (tmp_path / "memory.max").write_text("500000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    (tmp_path / "memory.stat").write_text("anon 1\nactive_file 1000\ninactive_file 9000\n")
    assert available(tmp_path, tmp_path) == 110_000


def test_a_width_that_cannot_fit_leaves_nothing_behind(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "available", lambda: 1_000_000)
    with pytest.raises(UserError, match="choose a smaller --width"):
        train(store, None, TrainConfig(d_sae=10_000), tmp_path / "sae")
    assert not list(tmp_path.iterdir())
