"""A shard's file is an ordinary safetensors file, hashed as it is written."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import blake3
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from unbraid.activations import shardfile
from unbraid.activations.shardfile import places, write_tensors

HASH = ThreadPoolExecutor(1)


@given(
    st.dictionaries(
        st.sampled_from(["a", "b.c", "tokens", 'q"uote']),
        st.tuples(
            st.sampled_from([torch.float32, torch.float16, torch.int32, torch.int8]), st.integers(0, 9)
        ),
    )
)
@settings(max_examples=40, deadline=None)
def test_the_library_reads_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, kinds: dict[str, tuple[torch.dtype, int]]
) -> None:
    path = tmp_path_factory.mktemp("f") / "x.safetensors"
    tensors = {name: torch.arange(n * 3).view(n, 3).to(dtype) for name, (dtype, n) in kinds.items()}
    size, digest = write_tensors(path, tensors, HASH)
    data = path.read_bytes()
    assert (size, digest) == (len(data), blake3.blake3(data).hexdigest())
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert {name: (place.dtype, place.shape) for name, place in places(path).items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
    }


def test_the_disk_begins_while_the_rest_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, there = tmp_path / "x.safetensors", list[int]()

    def refuse(handle: int, *_: object) -> int:
        there.append(os.fstat(handle).st_size)
        return -1  # as where the file system cannot: the file is whole all the same

    monkeypatch.setattr(shardfile, "_ASK", refuse)
    monkeypatch.setattr(shardfile, "WRITE", 1000)
    size, digest = write_tensors(path, {"x": torch.arange(1200, dtype=torch.int32)}, HASH)
    data = path.read_bytes()
    assert (size, digest) == (len(data), blake3.blake3(data).hexdigest())
    assert len(there) == 1 + 5 and there == sorted(set(there)) and there[-1] == size
