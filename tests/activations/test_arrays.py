"""Other tools' files are read as rows; what is cut off, damaged or holds Python objects is named."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from unbraid.activations.arrays import Array, Column, find_arrays
from unbraid.manifest.errors import IntegrityError, UserError


def in_memory(x: Tensor) -> Array:
    return Array(Path("x"), tuple(x.shape), x.dtype, lambda key: x[key].clone())


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_rows_are_document_by_document_whatever_the_files(data: st.DataObject) -> None:
    trailing = data.draw(st.integers(0, 2))
    lead, size = data.draw(st.integers(1, 2)), st.integers(1, 5)
    one = tuple(data.draw(st.lists(size, min_size=trailing, max_size=trailing)))
    shapes = data.draw(st.lists(st.tuples(*[size] * lead), min_size=1, max_size=4))
    parts = [torch.rand(*shape, *one) for shape in shapes]
    flat = torch.cat([part.reshape(-1, *one) for part in parts])
    column = Column("x", tuple(map(in_memory, parts)), trailing)
    assert column.rows == len(flat) and column.width == (flat[0].numel() if trailing else 1)
    start = data.draw(st.integers(0, len(flat) - 1))
    stop = data.draw(st.integers(start + 1, len(flat)))
    wanted = flat[start:stop].flatten(1) if trailing else flat[start:stop]
    assert torch.equal(column.read(start, stop), wanted)
    assert column.batched == (lead == 2)
    assert column.blocks == [shape if lead == 2 else (1, *shape) for shape in shapes]


def whole(arrays: tuple[Array, ...]) -> Tensor:
    return torch.cat([array.take((slice(0, array.shape[0]),)) for array in arrays])


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", ["<f4", ">f4", "<f2", "<f8"])
def test_npy_of_any_order_of_bytes_and_axes(tmp_path: Path, kind: str, order: str) -> None:
    x = np.asarray(np.random.default_rng(0).normal(size=(5, 3, 4)).astype(kind), order=order)  # type: ignore
    np.save(tmp_path / "acts.npy", x)
    (name,), found = find_arrays(tmp_path / "acts.npy").arrays, find_arrays(tmp_path / "acts.npy")
    array = found.arrays[name][0]
    assert name == "acts" and array.shape == (5, 3, 4)
    assert np.array_equal(array.take((slice(1, 2), slice(1, 3))).numpy(), x[1:2, 1:3])


def test_safetensors_keep_bfloat16_and_what_the_header_says(tmp_path: Path) -> None:
    path, x = tmp_path / "a.safetensors", torch.randn(4, 3, 2).bfloat16()
    save_file({"x": x, "scale": torch.tensor(2.0)}, path, {"model_name": "tiny"})
    found = find_arrays(path)
    assert found.metadata == {"model_name": "tiny"} and list(found.arrays) == ["x"]
    assert torch.equal(whole(found.arrays["x"]), x)


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_parts_in_a_folder_are_in_the_order_of_their_numbers(tmp_path: Path, suffix: str) -> None:
    for number in (0, 2, 10, 1):
        x = np.full((2, 3), float(number), dtype=np.float32)
        if suffix == ".npy":
            np.save(tmp_path / f"acts_{number}.npy", x)
        else:
            save_file({"acts": torch.from_numpy(x)}, tmp_path / f"{number}.safetensors")
    found = find_arrays(tmp_path)
    assert whole(found.arrays["acts"])[:, 0].tolist() == [0, 0, 1, 1, 2, 2, 10, 10]


def test_npy_files_of_several_sites_in_a_folder_are_several_arrays(tmp_path: Path) -> None:
    names = ["blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"]
    for name in names:
        np.save(tmp_path / f"{name}.npy", np.zeros((2, 3), dtype=np.float32))
    assert sorted(find_arrays(tmp_path).arrays) == names


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor, Tensor]:
    """2,100 contexts of 4 tokens, as the datasets library saves them: several record batches in two files."""
    datasets = pytest.importorskip("datasets", reason="writes the folder that is read")
    folder = tmp_path_factory.mktemp("dataset") / "cache"
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2100, 4, 3, generator=g).half()
    tokens = torch.randint(0, 99, (2100, 4), generator=g).int()
    columns = {"x": datasets.Array2D(shape=(4, 3), dtype="float16"), "words": datasets.Value("string")}
    columns["token_ids"] = datasets.Sequence(datasets.Value("int32"), length=4)
    rows = {"x": x, "token_ids": tokens, "words": ["word"] * len(x)}
    made = datasets.Dataset.from_dict(rows, features=datasets.Features(columns))
    made.save_to_disk(folder, num_shards=2)
    return folder, x, tokens


def test_a_dataset_is_read_without_its_library(dataset: tuple[Path, Tensor, Tensor]) -> None:
    folder, x, tokens = dataset
    found = find_arrays(folder)
    assert found.format == "arrow" and sorted(found.arrays) == ["token_ids", "x"]
    assert len(found.arrays["x"]) == 4  # 1,000 and 50 rows in each file
    assert torch.equal(whole(found.arrays["x"]), x) and torch.equal(whole(found.arrays["token_ids"]), tokens)
    column = Column("x", found.arrays["x"], 1)
    assert torch.equal(column.read(3998, 4203), x.reshape(-1, 3)[3998:4203])


def test_lists_of_different_lengths_are_refused(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="writes the folder that is read")
    datasets.Dataset.from_dict({"x": [[1.0], [1.0, 2.0]]}).save_to_disk(tmp_path / "cache")
    with pytest.raises(UserError, match="x has lists of different lengths; save it with padding and a mask"):
        find_arrays(tmp_path / "cache")


@pytest.mark.parametrize("cut", [1, 8, 9, 3000])
def test_a_dataset_that_is_cut_off_is_named(
    dataset: tuple[Path, Tensor, Tensor], tmp_path: Path, cut: int
) -> None:
    folder = Path(shutil.copytree(dataset[0], tmp_path / "cache"))
    arrow = folder / "data-00001-of-00002.arrow"
    arrow.write_bytes(arrow.read_bytes()[:-cut])
    with pytest.raises(IntegrityError, match=r"data-00001-of-00002\.arrow is cut off"):
        find_arrays(folder)
    arrow.unlink()
    with pytest.raises(IntegrityError, match=r"data-00001-of-00002\.arrow is missing"):
        find_arrays(folder)


def test_a_damaged_dataset_is_named_or_other_numbers_but_never_a_crash(
    dataset: tuple[Path, Tensor, Tensor], tmp_path: Path
) -> None:
    folder, chance = Path(shutil.copytree(dataset[0], tmp_path / "cache")), random.Random(0)
    arrow = folder / "data-00000-of-00002.arrow"
    whole_file = arrow.read_bytes()
    refused = 0
    for _ in range(100):
        data = bytearray(whole_file)
        for _ in range(chance.choice([1, 3, 20])):
            data[chance.choice([chance.randrange(3000), chance.randrange(len(data))])] = chance.randrange(256)
        arrow.write_bytes(data)
        try:
            for arrays in find_arrays(folder).arrays.values():
                whole(arrays)
        except (IntegrityError, UserError):
            refused += 1
    assert 10 < refused < 100


def test_a_dataset_does_not_lead_out_of_its_folder(
    dataset: tuple[Path, Tensor, Tensor], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(dataset[0], tmp_path / "cache"))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../x.arrow"}]}))
    with pytest.raises(UserError, match="names files outside its folder"):
        find_arrays(folder)
    (folder / "state.json").write_text("[]")
    with pytest.raises(IntegrityError, match=r"state\.json does not name"):
        find_arrays(folder)


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
@pytest.mark.parametrize("cut", [1, 200, 1000])
def test_a_file_that_is_cut_off_is_named(tmp_path: Path, suffix: str, cut: int) -> None:
    path = tmp_path / f"acts{suffix}"
    x = np.zeros((40, 6), dtype=np.float32)
    np.save(path, x) if suffix == ".npy" else save_file({"acts": torch.from_numpy(x)}, path)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(IntegrityError, match=f"acts{suffix} is cut off or damaged"):
        find_arrays(path)


class Trap:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_what_holds_python_objects_is_refused_and_never_run(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    torch.save({"x": torch.zeros(2, 2)}, tmp_path / "a.pt")
    (tmp_path / "b.npy").write_bytes(pickle.dumps(Trap(sprung)))
    np.save(tmp_path / "c.npy", np.array([Trap(sprung)], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "d.npz", x=np.zeros(3))
    (tmp_path / "e.safetensors").write_bytes(pickle.dumps(Trap(sprung)))
    for name in ("a.pt", "b.npy", "c.npy", "d.npz", "e.safetensors"):
        with pytest.raises(UserError, match=f"{name} (may hold|holds) Python objects"):
            find_arrays(tmp_path / name)
    with pytest.raises(UserError, match=r"a\.pt may hold Python objects"):
        find_arrays(tmp_path)
    assert not sprung.exists()


def test_other_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        find_arrays(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no \.npy or \.safetensors file"):
        find_arrays(tmp_path)
    (tmp_path / "a.csv").write_text("1,2")
    with pytest.raises(UserError, match=r"a\.csv is neither"):
        find_arrays(tmp_path / "a.csv")
    np.save(tmp_path / "a.npy", np.float32(1))
    with pytest.raises(UserError, match=r"a\.npy holds float32 \(\), not rows"):
        find_arrays(tmp_path / "a.npy")
    np.save(tmp_path / "a.npy", np.zeros((0, 4)))
    assert find_arrays(tmp_path / "a.npy").arrays["a"][0].shape == (0, 4)
    np.save(tmp_path / "a.npy", np.zeros(3, dtype="V2"))
    with pytest.raises(UserError, match=r"a\.npy holds \|V2"):
        find_arrays(tmp_path / "a.npy")
    save_file({"x\x1b[2J": torch.zeros(2)}, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="not printable"):
        find_arrays(tmp_path / "b.safetensors")
    save_file({"x": torch.zeros(2)}, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=r"both \.npy and \.safetensors files"):
        find_arrays(tmp_path)
    (tmp_path / "a.npy").unlink()
    save_file({"y": torch.zeros(2)}, tmp_path / "c.safetensors")
    with pytest.raises(UserError, match="do not hold the same arrays"):
        find_arrays(tmp_path)
