"""Shards are listed by the hash taken while writing; int8 keeps what it says it keeps."""

from __future__ import annotations

import dataclasses
import errno
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import blake3
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from unbraid.activations import shards
from unbraid.activations.capture import capture
from unbraid.activations.filling import COLUMNS
from unbraid.activations.reading import CaptureConfig
from unbraid.activations.shards import FINISHED, ShardWriter
from unbraid.activations.stream import batches
from unbraid.activations.text import Document
from unbraid.manifest.errors import IntegrityError
from unbraid.manifest.record import check_files, read_manifest
from unbraid.model.load import LanguageModel
from unbraid.model.sites import Site

SITE = Site(1, "resid_post")
SMALL = CaptureConfig(sites=(SITE,), context=64, batch_tokens=256, dtype="float32", shard_tokens=300)
Make = Callable[..., Iterator[Document]]


def write(folder: Path, stored: str, values: torch.Tensor, pieces: int, shard: int = 100) -> ShardWriter:
    writer = ShardWriter(folder, {"shard_tokens": shard, "dtype": stored}, widths={"s": values.shape[1]})
    try:
        for rows in values.split(pieces):
            writer.add({"s": rows}, {name: torch.zeros(len(rows), dtype=torch.int32) for name in COLUMNS}, "")
        writer.close()
    except OSError:
        writer.abandon(clear=True)
        raise
    return writer


@given(st.integers(3, 400), st.integers(1, 130), st.floats(1e-6, 1e4), st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_int8_is_off_by_half_a_step_and_says_by_how_much(
    tmp_path_factory: pytest.TempPathFactory, n: int, pieces: int, size: float, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("s")
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 12, generator=g) * size + size
    x[n // 2] = 0
    writer = write(folder, "int8", x, pieces)
    parts = [load_file(path) for path in sorted(folder.glob("shard-*.safetensors"))]
    read = torch.cat([part["s"] * part["s.scale"][:, None] for part in parts])
    assert all(part["s"].dtype == torch.int8 for part in parts)
    steps = x.abs().amax(dim=1, keepdim=True) / 127
    assert ((read - x).abs() <= steps * 0.5001).all()
    assert (read[n // 2] == 0).all()
    error, variance = (read - x).square().sum(), sum((p - p.mean(0)).square().sum() for p in x.split(100))
    found = writer.error()
    assert found is not None and found["s"] == pytest.approx(float(error / variance), rel=1e-2)


def test_an_int8_capture_is_half_as_large_and_within_its_error(
    lm: LanguageModel, texts: Make, tmp_path: Path
) -> None:
    documents = list(texts(30))
    exact = capture(lm, documents, SMALL, tmp_path / "exact")
    half = capture(lm, documents, dataclasses.replace(SMALL, dtype="float16"), tmp_path / "half")
    small = capture(lm, documents, dataclasses.replace(SMALL, dtype="int8"), tmp_path / "small")
    stored = small.manifest.facts["int8_error"][str(SITE)]
    x, q = (torch.cat([s.read(SITE, i) for i in range(len(s.shards))]) for s in (exact, small))
    assert q.dtype == torch.float32
    assert float((q - x).square().sum() / (x - x.mean(0)).square().sum()) == pytest.approx(stored, rel=0.05)
    assert "int8_error" not in half.manifest.facts
    d, columns = x.shape[1], 4 * len(COLUMNS)
    sizes = {s: sum(path.stat().st_size for path in s.shards) / len(x) for s in (half, small)}
    assert (
        sizes[small] - sizes[half] == pytest.approx((d + 4) - 2 * d, abs=2) and sizes[half] > 2 * d + columns
    )


def test_int8_rows_come_out_of_the_stream_as_they_are_read(
    lm: LanguageModel, texts: Make, tmp_path: Path
) -> None:
    store = capture(lm, texts(20), dataclasses.replace(SMALL, dtype="int8"), tmp_path / "out")
    stream = torch.cat(list(batches(store, SITE, 64, seed=0, epochs=1, buffer_shards=2)))
    whole = torch.cat([store.read(SITE, i) for i in range(len(store.shards))])
    assert stream.dtype == torch.float32 and len(stream) == len(whole)
    assert {tuple(row) for row in stream.tolist()} == {tuple(row) for row in whole.tolist()}


def test_shards_are_listed_by_the_hash_taken_while_writing(
    lm: LanguageModel, texts: Make, tmp_path: Path
) -> None:
    store = capture(lm, texts(20), SMALL, tmp_path / "out")
    for path in store.shards:
        assert store.manifest.files[path.name].blake3 == blake3.blake3(path.read_bytes()).hexdigest()
    assert read_manifest(store.folder).files["documents.jsonl"].sha256
    check_files(store.folder)
    data = bytearray(store.shards[1].read_bytes())
    data[-1] ^= 1
    store.shards[1].write_bytes(data)
    with pytest.raises(IntegrityError, match=rf"{store.shards[1].name} was changed: its blake3 is"):
        check_files(store.folder)


@pytest.mark.parametrize("where", ["write_tensors", "settle"])
def test_a_failed_write_is_raised_and_what_was_finished_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    real: Any = getattr(shards, where)
    calls: list[int] = []

    def failing(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise OSError(errno.EIO, "Input/output error")
        return real(*args)

    monkeypatch.setattr(shards, where, failing)
    x = torch.randn(1000, 4)
    with pytest.raises(OSError, match="Input/output error") as caught:
        write(tmp_path, "float32", x, 50)
    assert str(caught.value.filename).endswith("shard-00002.safetensors")
    records = [json.loads(line) for line in (tmp_path / FINISHED).read_text().splitlines()]
    assert [record["file"] for record in records] == ["shard-00000.safetensors", "shard-00001.safetensors"]
    assert sorted(path.name for path in tmp_path.glob("*shard-*")) == [r["file"] for r in records]
