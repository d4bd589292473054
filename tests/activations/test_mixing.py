"""What is measured of a shuffle is 1 by chance, and the orders measured are those that are dealt out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from unbraid.activations.follow import Following
from unbraid.activations.mixing import documents_of, measure, order_of_capture, order_of_store
from unbraid.activations.store import ActivationStore
from unbraid.activations.stream import batches
from unbraid.manifest.record import write_manifest
from unbraid.model.sites import Site

SITE = Site(0, "resid_post")


def documents(n: int = 20_000) -> np.ndarray:
    """Documents of 1 to 99 rows, one after the other."""
    rng = np.random.default_rng(0)
    return np.repeat(np.arange(n), rng.integers(1, 100, n))[:n]


def test_a_perfect_shuffle_is_1_in_everything() -> None:
    found = measure(np.random.default_rng(1).permutation(20_000), documents(), 100)
    assert found.batches == 200
    assert found.same_document == pytest.approx(1, abs=0.1)
    assert found.documents == pytest.approx(1, abs=0.01)
    assert found.drift == pytest.approx(1, abs=0.1)


def test_what_chance_gives_is_what_drawing_gives() -> None:
    """The formulas, on a corpus so small that all draws can be counted."""
    from itertools import combinations

    of = np.array([0, 0, 0, 1, 1, 2])
    draws = np.array(list(combinations(range(6), 3)))
    counts = [np.bincount(of[draw], minlength=3) for draw in draws]
    pairs = np.mean([(c * (c - 1)).sum() / 2 for c in counts])
    different = np.mean([(c > 0).sum() for c in counts])
    order = np.array(
        [0, 1, 2, 3, 4, 5]
    )  # two batches: {0, 1, 2} has 3 pairs and 1 document, {3, 4, 5} 1 and 2
    found = measure(order, of, 3)
    assert found.same_document == pytest.approx(2 / pairs) and found.documents == pytest.approx(
        1.5 / different
    )
    assert found.drift == pytest.approx(1.5 / draws.mean(axis=1).std())


def test_no_shuffle_is_seen() -> None:
    found = measure(np.arange(20_000), documents(), 100)
    assert found.same_document > 50 and found.documents < 0.1 and found.drift > 5


def test_a_small_buffer_mixes_worse_and_order_drifts() -> None:
    of = documents()
    full = {b: measure(order_of_store(20_000, 1000, seed=0, buffer_shards=b), of, 100) for b in (1, 8)}
    captured = {b: measure(order_of_capture(20_000, seed=0, buffer_tokens=b), of, 100) for b in (1000, 8000)}
    assert captured[1000].same_document > 1.5 * captured[8000].same_document > 2
    assert full[1].same_document > full[8].same_document > 1
    assert captured[8000].drift > 2 * full[8].drift


def test_the_orders_are_those_that_are_dealt_out(tmp_path: Path) -> None:
    """A store whose row i is (i, document of i)."""
    n, size, of = 3000, 700, documents(3000)
    for index, start in enumerate(range(0, n, size)):
        i = torch.arange(start, min(start + size, n))
        columns = {"tokens": i.int(), "documents": torch.from_numpy(of)[i].int(), "positions": i.int()}
        save_file({str(SITE): i[:, None].float(), **columns}, tmp_path / f"shard-{index:05d}.safetensors")
    facts = {"sites": [str(SITE)], "d_in": 1, "tokens": n, "documents": 0, "dtype": "float32"}
    facts |= {"shard_tokens": size, "model": "tiny", "context": 9}
    ids = {"model": "m", "tokenizer": "t"}
    write_manifest(tmp_path, kind="activations", command="", seed=0, inputs=ids, facts=facts)
    store = ActivationStore(tmp_path)
    assert documents_of(store).tolist() == of.tolist()
    full = torch.cat(list(batches(store, SITE, 100, seed=4, epochs=1, buffer_shards=2)))
    assert full[:, 0].tolist() == order_of_store(n, size, seed=4, buffer_shards=2).tolist()
    followed = Following(tmp_path, buffer_tokens=1100).batches([SITE], 100, seed=4, steps=n // 100)
    got = torch.cat([batch[SITE] for batch in followed])[:, 0]
    assert got.tolist() == order_of_capture(n, seed=4, buffer_tokens=1100).tolist()


def test_impossible_requests_are_refused() -> None:
    for size in (1, 11):
        with pytest.raises(ValueError, match="batch_size"):
            measure(np.arange(10), np.zeros(10, dtype=np.int64), size)
