"""Captured activations with a known structure, written without a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from unbraid.activations.filling import COLUMNS
from unbraid.activations.shards import DOCUMENTS, shard_name
from unbraid.activations.store import ActivationStore
from unbraid.manifest.record import write_manifest


def _planted(
    n: int, d_in: int = 24, features: int = 60, active: int = 3, seed: int = 0
) -> NDArray[np.float32]:
    """Sums of a few random directions each, far from the origin and of an arbitrary scale: (n, d_in)."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(features, d_in))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    on = rng.random((n, features)).argsort(axis=1) < active
    codes = on * (1 + rng.random((n, features)))
    return (7.0 * (codes @ directions) + 5.0).astype(np.float32)


def _store(
    folder: Path,
    x: NDArray[np.float32],
    shard_tokens: int = 2048,
    sites: tuple[str, ...] = ("layers.1.resid_post",),
    model_id: str = "m" * 64,
    tokenizer_id: str = "t" * 64,
) -> ActivationStore:
    folder.mkdir(parents=True)
    for index, start in enumerate(range(0, len(x), shard_tokens)):
        rows = torch.from_numpy(x[start : start + shard_tokens])
        columns = {name: torch.zeros(len(rows), dtype=torch.int32) for name in COLUMNS}
        parts = [part.contiguous() for part in rows.chunk(len(sites), dim=1)]
        save_file({**dict(zip(sites, parts, strict=True)), **columns}, folder / shard_name(index))
    (folder / DOCUMENTS).write_text('{"id": "a", "tokens": 1, "captured": 1}\n')
    write_manifest(
        folder,
        kind="activations",
        command="",
        seed=0,
        inputs={"model": model_id, "tokenizer": tokenizer_id},
        facts={
            "model": "tiny",
            "sites": list(sites),
            "d_in": x.shape[1] // len(sites),
            "tokens": len(x),
            "documents": 1,
            "context": 256,
            "positions": "all",
            "dtype": "float32",
            "shard_tokens": shard_tokens,
        },
    )
    return ActivationStore(folder)


@pytest.fixture(scope="session")
def make_store() -> Callable[..., ActivationStore]:
    """Writes activations (n, d_in), those of several sites side by side, as a finished capture."""
    return _store


@pytest.fixture(scope="session")
def planted() -> Callable[..., NDArray[np.float32]]:
    """Makes activations that are sums of a few of many directions."""
    return _planted


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """6,000 planted activations of 24 dimensions in three shards."""
    return _store(tmp_path_factory.mktemp("activations") / "acts", _planted(6000))
