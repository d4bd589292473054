"""The stream delivers every row once an epoch, in an order that depends on the seed alone, and well mixed."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from unbraid.activations.rows import Rows
from unbraid.activations.store import ActivationStore
from unbraid.activations.stream import ahead, batches
from unbraid.manifest.errors import UserError
from unbraid.manifest.record import write_manifest
from unbraid.model.sites import Site

SITE = "layers.0.resid_post"


def make(folder: Path, rows: int, shard_tokens: int, *, per_document: int = 50) -> ActivationStore:
    """A store whose row i is (i, document of i)."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, start in enumerate(range(0, rows, shard_tokens)):
        i = torch.arange(start, min(start + shard_tokens, rows))
        values = torch.stack([i, i // per_document], dim=1).float()
        columns = {name: i.int() for name in ("tokens", "documents", "positions")}
        save_file({SITE: values, **columns}, folder / f"shard-{index:05d}.safetensors")
    facts = {"sites": [SITE], "d_in": 2, "tokens": rows, "documents": 0, "dtype": "float32"}
    write_manifest(
        folder,
        kind="activations",
        command="",
        seed=0,
        inputs={},
        facts={**facts, "shard_tokens": shard_tokens},
    )
    return ActivationStore(folder)


def rows_of(parts: Iterator[torch.Tensor]) -> list[int]:
    return [int(row) for part in parts for row in part[:, 0].tolist()]


@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 3000),
    shard_tokens=st.integers(1, 900),
    batch_size=st.integers(1, 700),
    buffer_shards=st.integers(1, 5),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 9),
    data=st.data(),
)
def test_every_row_once_an_epoch_and_exact_continuation(
    tmp_path_factory: pytest.TempPathFactory,
    rows: int,
    shard_tokens: int,
    batch_size: int,
    buffer_shards: int,
    epochs: int,
    seed: int,
    data: st.DataObject,
) -> None:
    shard_tokens = max(shard_tokens, rows // 20 + 1)
    store = make(tmp_path_factory.mktemp("stream"), rows, shard_tokens)

    def run(**more: int) -> list[torch.Tensor]:
        return list(batches(store, SITE, batch_size, seed=seed, buffer_shards=buffer_shards, **more))

    parts = run(epochs=epochs)
    assert all(len(part) == batch_size for part in parts[:-1]) and 0 < len(parts[-1]) <= batch_size
    delivered = rows_of(iter(parts))
    for epoch in range(epochs):
        assert sorted(delivered[epoch * rows : (epoch + 1) * rows]) == list(range(rows))
    start = data.draw(st.integers(0, len(parts) + 1))
    assert rows_of(iter(run(epochs=epochs, start=start))) == delivered[start * batch_size :]
    steps = data.draw(st.integers(0, len(parts) - 1))
    counted = run(steps=steps, start=min(start, steps))
    assert rows_of(iter(counted)) == delivered[min(start, steps) * batch_size : steps * batch_size]
    assert all(len(part) == batch_size for part in counted)


def test_the_order_follows_the_seed_and_changes_with_the_epoch(tmp_path: Path) -> None:
    store = make(tmp_path / "s", 1000, 200)
    one, same, other = (rows_of(batches(store, SITE, 64, seed=seed, epochs=2)) for seed in (1, 1, 2))
    assert one == same and one != other
    assert one[:1000] != one[1000:]


def test_steps_may_go_on_for_many_epochs(tmp_path: Path) -> None:
    store = make(tmp_path / "s", 100, 64)
    many = list(itertools.islice(batches(store, SITE, 30, seed=0, steps=1000), 20))
    assert len(many) == 20 and all(part.shape == (30, 2) and part.dtype == torch.float32 for part in many)


def correlation(values: list[float]) -> float:
    x = np.asarray(values)
    return float(np.corrcoef(x[:-1], x[1:])[0, 1])


def test_neighbours_come_from_unrelated_documents(tmp_path: Path) -> None:
    """A buffer of a tenth of the store, and still neighbours say next to nothing about one another.

    Reading whole shards into such a buffer would leave a correlation near 1/buffer_shards.
    """
    store = make(tmp_path / "s", 160_000, 4096)
    parts = torch.cat(list(batches(store, SITE, 512, seed=0, epochs=1, buffer_shards=4)))
    documents = parts[:, 1].tolist()
    assert abs(correlation(documents)) < 0.05
    same = float(np.mean(np.diff(documents) == 0))
    assert same < 0.01  # chance within a buffer: one in 330 or so; unshuffled: 0.98
    means = parts[: len(parts) // 512 * 512, 1].reshape(-1, 512).mean(dim=1)
    spread = float(parts[:, 1].std()) / 512**0.5
    assert float(means.std()) < 4 * spread  # batches are close to samples of the whole corpus


def test_memory_is_one_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make(tmp_path / "s", 20_000, 1000)
    held: list[int] = []
    places: set[int] = set()
    gather = ActivationStore.gather

    def watched(self: ActivationStore, site: Site, runs: list[tuple[int, int]], rows: Rows) -> None:
        held.append(len(rows.values))
        places.add(rows.values.data_ptr())
        gather(self, site, runs, rows)

    monkeypatch.setattr(ActivationStore, "gather", watched)
    assert len(rows_of(batches(store, SITE, 100, seed=0, epochs=1, buffer_shards=3))) == 20_000
    assert max(held) <= 3 * 1024 and len(held) == 7 and len(places) == 1
    held.clear()
    next(batches(store, SITE, 100, seed=0, epochs=1, buffer_shards=3, start=160))
    assert len(held) == 1  # nothing is read only to be skipped


def test_impossible_requests_are_refused(tmp_path: Path) -> None:
    store = make(tmp_path / "s", 10, 5)
    with pytest.raises(UserError, match=r"no site layers\.3\.resid_post"):
        next(batches(store, "layers.3.resid_post", 4, seed=0, epochs=1))
    for wrong in (
        {},
        {"epochs": 1, "steps": 1},
        {"epochs": 1, "start": -1},
        {"steps": 1, "buffer_shards": 0},
    ):
        with pytest.raises(ValueError):
            next(batches(store, SITE, 4, seed=0, **wrong))


def test_what_is_made_ahead_is_the_same_and_bounded() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in range(40):
            made.append(threading.get_ident())
            yield i

    threads = torch.get_num_threads()
    for i, found in enumerate(ahead(items(), 3)):
        assert found == i and len(made) <= i + 4
    assert len(made) == 40 and set(made) != {threading.get_ident()} and torch.get_num_threads() == threads
    assert list(ahead(iter([]))) == []


def test_what_fails_ahead_fails_in_its_turn_and_nothing_runs_on() -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        raise UserError("here")

    stream = ahead(items())
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match="here"):
        next(stream)
    endless = ahead(iter(int, 1))
    assert next(endless) == 0
    endless.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("unbraid-data")]
