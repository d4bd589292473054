"""What keeps the memory of a long pass from growing with it."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from unbraid.features import finish
from unbraid.features.coactive import TokenSample
from unbraid.features.memory import give_back, grown


def _codes(rows: int, seed: int, d_sae: int = 50) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random keys, where each row's latents begin, and the latents, in no order."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 9, rows)
    latents = [rng.choice(d_sae, n, replace=False).astype(np.int32) for n in sizes]
    keys = rng.integers(0, 2**64, rows, dtype=np.uint64)
    return keys, np.concatenate([[0], np.cumsum(sizes)]), np.concatenate([np.zeros(0, np.int32), *latents])


def test_an_array_grows_where_it_is() -> None:
    held = np.arange(1 << 20)
    tracemalloc.start()
    held = grown(held, np.arange(5))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert held[-6:].tolist() == [(1 << 20) - 1, 0, 1, 2, 3, 4]
    # The old array was not traced, the new one is: once, where a copy would have both at a time.
    assert most < 1.1 * held.nbytes


def test_a_sample_of_tokens_holds_no_copy_of_itself() -> None:
    tracemalloc.start()
    sample = TokenSample(50, 1 << 22)
    for seed in range(8):
        sample.add(*_codes(20_000, seed))
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    sample.add(*_codes(100, 99))
    most = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert len(sample) == 160_100
    assert most < 0.2 * sample.latents.nbytes


def test_a_sample_is_written_by_key_however_many_tokens_go_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, starts, latents = _codes(1000, 3)
    sample = TokenSample(50, 1 << 20)
    sample.add(keys, starts, latents)
    wanted = sorted((int(key), sorted(latents[starts[i] : starts[i + 1]])) for i, key in enumerate(keys))
    for block in (1, 7, 1000, 4096):
        monkeypatch.setattr(finish, "SAMPLE_BLOCK", block)
        finish._write_sampled(tmp_path, sample)  # pyright: ignore[reportPrivateUsage]
        rows = pq.read_table(tmp_path / finish.SAMPLED).to_pylist()
        assert [(row["key"], row["latents"]) for row in rows] == wanted


def test_an_empty_sample_is_written(tmp_path: Path) -> None:
    finish._write_sampled(tmp_path, TokenSample(50, 8))  # pyright: ignore[reportPrivateUsage]
    assert pq.read_table(tmp_path / finish.SAMPLED).num_rows == 0


def test_giving_back_leaves_everything_as_it_is() -> None:
    held = np.arange(1 << 20)
    give_back()
    assert (held == np.arange(1 << 20)).all()
