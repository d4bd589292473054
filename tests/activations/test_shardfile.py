"""A shard's file is an ordinary safetensors file, hashed as it is written."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any

import blake3
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from unbraid.activations import shardfile
from unbraid.activations.shardfile import ShardFile, places


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
    file = ShardFile(path, tensors)
    digest = file.finish()
    data = path.read_bytes()
    assert (file.size, digest) == (len(data), blake3.blake3(data).hexdigest())
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert {name: (place.dtype, place.shape) for name, place in places(path).items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
    }


@given(
    st.sampled_from([torch.float32, torch.float16, torch.int8]),
    st.integers(1, 9),
    st.lists(st.integers(0, 40), max_size=6),
    st.integers(1, 300),
)
@settings(max_examples=60, deadline=None)
def test_a_file_that_grows_with_its_rows_has_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, dtype: torch.dtype, d: int, steps: list[int], piece: int
) -> None:
    folder, n = tmp_path_factory.mktemp("f"), 40
    whole = {"x": torch.randn(n, d).to(dtype), "y": torch.randn(n, d).to(dtype), "tokens": torch.arange(n)}
    whole["tokens"] = whole["tokens"].int()
    at_once = ShardFile(folder / "at once", whole)
    wanted = at_once.finish()
    filling = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shardfile, "PIECE", piece)
        file = ShardFile(folder / "growing", filling)
        for rows in sorted(steps):
            for name, tensor in whole.items():
                filling[name][:rows] = tensor[:rows]
            file.go_on(rows)
        for name, tensor in whole.items():
            filling[name].copy_(tensor)
        assert file.finish() == wanted
    assert (folder / "growing").read_bytes() == (folder / "at once").read_bytes()


def test_the_largest_tensor_is_first_where_those_behind_it_stay_aligned(tmp_path: Path) -> None:
    columns = {"tokens": torch.zeros(3, dtype=torch.int32), "z": torch.zeros(3)}
    for d, first in ((4, "x"), (5, "tokens")):  # 24 bytes and 30
        ShardFile(tmp_path / "f", {"x": torch.zeros(3, d).half(), **columns}).finish()
        found = places(tmp_path / "f")
        assert min(found, key=lambda name: found[name].offset) == first
        assert all(place.offset % place.dtype.itemsize == 0 for place in found.values())


def test_what_could_not_be_written_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.FileIO):
        room = 100

        def write(self, data: Any, /) -> int:
            Full.room -= len(data)
            if Full.room < 0:
                Full.room = 10**6  # there would be some again
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    monkeypatch.setattr(Path, "open", lambda path, *_, **__: Full(path, "w"))
    file = ShardFile(tmp_path / "f", {"x": torch.zeros(1000)})
    for attempt in (lambda: file.go_on(500), lambda: file.go_on(600), file.finish):
        with pytest.raises(OSError, match="No space left"):
            attempt()


def test_the_disk_begins_while_the_rest_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, there = tmp_path / "x.safetensors", list[int]()

    def refuse(handle: int, *_: object) -> int:
        there.append(os.fstat(handle).st_size)
        return -1  # as where the file system cannot: the file is whole all the same

    monkeypatch.setattr(shardfile, "_ASK", refuse)
    monkeypatch.setattr(shardfile, "PIECE", 500)
    monkeypatch.setattr(shardfile, "ASK", 1000)
    file = ShardFile(path, {"x": torch.arange(1200, dtype=torch.int32)})
    digest = file.finish()
    data = path.read_bytes()
    assert (file.size, digest) == (len(data), blake3.blake3(data).hexdigest())
    assert len(there) == 5 and there == sorted(set(there)) and there[-1] == file.size
