"""A finished capture opens only when its files are what its manifest says."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from unbraid.activations.capture import capture
from unbraid.activations.reading import CaptureConfig
from unbraid.activations.store import ActivationStore
from unbraid.activations.text import Document
from unbraid.manifest.errors import IntegrityError, UserError
from unbraid.model.load import LanguageModel
from unbraid.model.sites import Site

SHARD = "shard-00001.safetensors"


@pytest.fixture(scope="module")
def made(
    lm: LanguageModel, texts: Callable[..., Iterator[Document]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("store") / "out"
    capture(lm, texts(20), CaptureConfig(sites=(Site(0, "mlp_out"),), shard_tokens=128), out)
    return out


@pytest.fixture()
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def test_slices_are_parts_of_the_whole(made: Path) -> None:
    store = ActivationStore(made, check=True)
    whole = store.read("blocks.0.hook_mlp_out", 1)
    assert whole.shape == (128, 48) and len(store.columns(1).tokens) == 128
    assert (store.read(Site(0, "mlp_out"), 1, 5, 9) == whole[5:9]).all()
    assert sum(store.rows(i) for i in range(len(store.shards))) == store.n_tokens


def test_a_site_that_was_not_captured_is_refused_with_those_that_were(made: Path) -> None:
    with pytest.raises(UserError, match=r"no site layers.1.mlp_out; choose one of layers.0.mlp_out"):
        ActivationStore(made).read("layers.1.mlp_out", 0)


def test_a_truncated_shard_is_named_when_the_store_is_opened(folder: Path) -> None:
    shard = folder / SHARD
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=rf"{SHARD} has \d+ bytes"):
        ActivationStore(folder)


def test_a_missing_shard_is_named_when_the_store_is_opened(folder: Path) -> None:
    (folder / SHARD).unlink()
    with pytest.raises(IntegrityError, match=f"{SHARD} is missing"):
        ActivationStore(folder)


def test_a_flipped_bit_is_named_by_a_check(folder: Path) -> None:
    shard = folder / SHARD
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    ActivationStore(folder)
    with pytest.raises(IntegrityError, match=f"{SHARD} was changed"):
        ActivationStore(folder, check=True)


def test_a_damaged_header_is_named_when_it_is_read(folder: Path) -> None:
    shard = folder / SHARD
    shard.write_bytes(b"\xff" * shard.stat().st_size)
    with pytest.raises(IntegrityError, match=f"{SHARD} cannot be read"):
        ActivationStore(folder).read("layers.0.mlp_out", 1)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"F16"', b'"F64"'),  # a type that no shard has
        (b"[128,48]", b"[128,24]"),
        (b"layers.0.mlp_out", b"layers.0.mlp_uot"),
        (b'"data_offsets"', b'"data_offset5"'),
        (b"{", b"["),
    ],
)
def test_a_header_that_says_something_else_is_named(folder: Path, old: bytes, new: bytes) -> None:
    shard = folder / SHARD
    data = shard.read_bytes()
    assert old in data
    shard.write_bytes(data.replace(old, new, 1))
    with pytest.raises(IntegrityError, match=rf"{SHARD} (cannot be read|does not hold)"):
        ActivationStore(folder).read("layers.0.mlp_out", 1)


def test_a_shard_that_is_cut_while_it_is_open_is_named(folder: Path) -> None:
    store = ActivationStore(folder)
    store.read("layers.0.mlp_out", 1)
    with (folder / SHARD).open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(IntegrityError, match=f"{SHARD} cannot be read .it ends early"):
        store.read("layers.0.mlp_out", 1)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="manifest"):
        ActivationStore(tmp_path)
