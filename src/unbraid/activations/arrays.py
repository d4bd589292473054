"""Arrays in other tools' files (.npy, .safetensors, a Hugging Face dataset in Arrow) as columns of rows.

Nothing is read whole: an array is known by its shape, and rows are copied out of the mapped file, which is
opened anew for each piece so that no more of it than that counts as this process's memory. Files that hold
Python objects are refused, since reading those could run code.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unbraid.manifest.errors import IntegrityError, UserError

PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".joblib")
STATE = "state.json"
"""What a dataset that was saved to disk has in its folder: the names of its Arrow files."""
AGAIN = "save or fetch it again"
_END_OF_ARROW = b"\xff\xff\xff\xff\0\0\0\0"
Key = tuple[slice, ...]


@dataclass(frozen=True, eq=False)
class Array:
    """Numbers in one file, or in one record batch of an Arrow file."""

    path: Path
    """The file."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    take: Callable[[Key], Tensor] = field(repr=False)
    """A copy of the part that the slices of the first axes cut out."""


@dataclass(frozen=True, eq=False)
class Column:
    """Arrays of one name, one after the other: rows of numbers, or single numbers, for tokens.

    Their axes are (rows, …) or (documents, positions, …), whose rows are taken document by document.
    """

    name: str
    """What the files call it."""
    arrays: tuple[Array, ...]
    """In order, each with at least one row."""
    trailing: int
    """Axes of what belongs to one row: 1 for vectors, 2 for vectors of each head, 0 for token ids."""

    def __post_init__(self) -> None:
        first = self.arrays[0] if self.arrays else None
        if first is None:
            raise UserError(f"{self.name} has no rows; there is nothing to import")
        for array in self.arrays:
            if len(array.shape) - self.trailing not in (1, 2):
                one = "(batch, positions, d) or (n, d)" if self.trailing else "(n,) or (batch, positions)"
                raise UserError(f"{array.path}: {self.name} has shape {array.shape} where {one} is meant")
            if (self._one(array), array.dtype) != (self._one(first), first.dtype):
                raise UserError(
                    f"{array.path}: {self.name} is {_form(array)} but {_form(first)} in {first.path}; give "
                    "files that were written alike"
                )

    @property
    def rows(self) -> int:
        """Rows in all arrays."""
        return self._starts[-1]

    @property
    def width(self) -> int:
        """Numbers a row: heads stand side by side."""
        return int(np.prod(self._one(self.arrays[0]), dtype=np.int64))

    @property
    def dtype(self) -> torch.dtype:
        """How the files hold it."""
        return self.arrays[0].dtype

    @property
    def batched(self) -> bool:
        """Whether the files say which rows belong together, by an axis of documents."""
        return len(self.arrays[0].shape) - self.trailing == 2

    @cached_property
    def blocks(self) -> list[tuple[int, int]]:
        """(documents, positions) of each array; one without an axis of documents counts as one document."""
        shapes = [array.shape[: len(array.shape) - self.trailing] for array in self.arrays]
        return [(shape[0], shape[1]) if len(shape) == 2 else (1, shape[0]) for shape in shapes]

    def read(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop): (n, width), or (n,) where a row is a number, in the files' type."""
        pieces: list[Tensor] = []
        number = bisect_right(self._starts, start) - 1
        while start < stop:
            first, end = self._starts[number : number + 2]
            keys = _keys(start - first, min(stop, end) - first, self.blocks[number][1], self.batched)
            pieces += [self.arrays[number].take(key) for key in keys]
            start, number = end, number + 1
        flat = [piece.reshape((-1, self.width) if self.trailing else (-1,)) for piece in pieces]
        return flat[0] if len(flat) == 1 else torch.cat(flat)

    @cached_property
    def _starts(self) -> list[int]:
        """The first row of each array, and the end of the last."""
        return list(accumulate((documents * positions for documents, positions in self.blocks), initial=0))

    def _one(self, array: Array) -> tuple[int, ...]:
        return array.shape[len(array.shape) - self.trailing :]


def _keys(low: int, high: int, positions: int, batched: bool) -> Iterator[Key]:
    """Slices that cut rows [low, high) out of an array: the rest of a document, whole ones, a beginning."""
    if not batched:
        yield (slice(low, high),)
        return
    while low < high:
        document, position = divmod(low, positions)
        whole = (high - low) // positions if position == 0 else 0
        taken = whole * positions or min(high - low, positions - position)
        yield slice(document, document + (whole or 1)), slice(position, None if whole else position + taken)
        low += taken


def _form(array: Array) -> str:
    return f"{str(array.dtype).removeprefix('torch.')} {array.shape}"


@dataclass(frozen=True)
class Found:
    """What is in a file or folder."""

    format: str
    """npy, safetensors or arrow."""
    arrays: dict[str, tuple[Array, ...]]
    """Arrays by name, those of several files one after the other."""
    files: tuple[Path, ...]
    """Every file that was read."""
    metadata: dict[str, str]
    """What the header of a safetensors file says besides."""


def find_arrays(source: Path) -> Found:
    """The arrays of a .npy or .safetensors file, of a folder of these in the natural order of their names (2
    before 10), or of a dataset's folder.

    A .npy file's array has the name of the file; in a folder that is not a site's, the name of the folder.
    Raises UserError for what is missing, is something else, or holds Python objects; IntegrityError for a
    file that is cut off or damaged.
    """
    found = _find(source)
    for name in found.arrays:
        if not name.isprintable():  # a terminal must not be told what to do
            raise UserError(f"{source} has an array whose name is not printable, {name!r}; rename it")
    return found


def _find(source: Path) -> Found:
    if source.is_dir():
        return _dataset(source) if (source / STATE).is_file() else _folder(source)
    if not source.is_file():
        raise UserError(f"{source} does not exist; give a .npy or .safetensors file or a folder of them")
    _refuse_pickle(source)
    if source.suffix == ".npy":
        return Found("npy", {source.stem: (_npy(source),)}, (source,), {})
    if source.suffix == ".safetensors":
        arrays, metadata = _safetensors(source)
        return Found("safetensors", {name: (array,) for name, array in arrays.items()}, (source,), metadata)
    raise UserError(
        f"{source} is neither .npy nor .safetensors nor the folder of a dataset; save it as one of these"
    )


def natural(path: Path) -> list[tuple[int, str]]:
    """Key that sorts names with numbers as people do, 2 before 10."""
    return [
        (int(part), "") if "0" <= part[0] <= "9" else (-1, part)
        for part in re.split(r"([0-9]+)", path.name)
        if part
    ]


def _folder(folder: Path) -> Found:
    paths = sorted((path for path in folder.iterdir() if path.is_file()), key=natural)
    for path in paths:
        _refuse_pickle(path)
    paths = [path for path in paths if path.suffix in (".npy", ".safetensors")]
    if len(formats := {path.suffix for path in paths}) != 1:
        what = "both .npy and .safetensors files" if formats else f"no .npy or .safetensors file, nor {STATE}"
        raise UserError(f"{folder} holds {what}; give a folder with the parts of one capture")
    if formats == {".npy"}:
        arrays = {path: _npy(path) for path in paths}
        numbered = all(re.fullmatch(r"(.*\D)?\d+", path.stem) for path in paths)
        named = {_stem(path) for path in paths}
        if numbered and len(named) == 1:
            return Found("npy", {named.pop() or folder.name: tuple(arrays.values())}, tuple(paths), {})
        return Found("npy", {path.stem: (array,) for path, array in arrays.items()}, tuple(paths), {})
    parts = {path: _safetensors(path) for path in paths}
    names = list(parts[paths[0]][0])
    for path, (arrays, _) in parts.items():
        if odd := sorted(set(names) ^ set(arrays)):
            raise UserError(
                f"{path} and {paths[0]} do not hold the same arrays ({odd[0]} is in one alone); give a "
                "folder with the parts of one capture, or the files one by one"
            )
    columns = {name: tuple(arrays[name] for arrays, _ in parts.values()) for name in names}
    return Found("safetensors", columns, tuple(paths), parts[paths[0]][1])


def _stem(path: Path) -> str:
    return re.sub(r"[-_.]?\d+$", "", path.stem)


def _refuse_pickle(path: Path) -> None:
    with path.open("rb") as file:
        first = file.read(2)
    # The beginnings of a pickle of today and of a zip file, which is what torch.save and np.savez write.
    if path.suffix in PICKLES or first[:1] == b"\x80" or first == b"PK":
        raise UserError(
            f"{path} may hold Python objects, which could run code, and was not read; save the array with "
            "np.save or safetensors"
        )


# --- .npy ---


def _npy(path: Path) -> Array:
    array = _mapped(path)
    try:
        dtype = _native(array[:0]).dtype
    except (TypeError, IndexError) as error:
        raise UserError(
            f"{path} holds {array.dtype} {array.shape}, not rows of numbers; save it as float32, or in "
            "safetensors where it is bfloat16"
        ) from error
    return Array(path, array.shape, dtype, lambda key: _native(_mapped(path)[key]))


def _mapped(path: Path) -> np.memmap[Any, Any]:
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except ValueError as error:
        if "Python objects" in str(error):
            raise UserError(
                f"{path} holds Python objects, which could run code, and was not read; save an array of "
                "numbers"
            ) from error
        raise IntegrityError(f"{path} is cut off or damaged ({error}); {AGAIN}") from error
    except (OSError, EOFError, SyntaxError, TypeError) as error:
        raise IntegrityError(f"{path} is cut off or damaged ({error}); {AGAIN}") from error


def _native(array: Any) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))


# --- safetensors ---


def _safetensors(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    found: dict[str, Array] = {}
    try:
        with safe_open(path, "pt") as file:
            metadata = cast("dict[str, str] | None", file.metadata()) or {}
            for name in file.keys():  # noqa: SIM118 - no dictionary
                part = file.get_slice(name)
                if shape := tuple(part.get_shape()):
                    found[name] = Array(path, shape, part[:0].dtype, _slices(path, name))
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"{path} is cut off or damaged ({error}); {AGAIN}") from error
    return found, metadata


def _slices(path: Path, name: str) -> Callable[[Key], Tensor]:
    def take(key: Key) -> Tensor:
        with safe_open(path, "pt") as file:
            return file.get_slice(name)[key].clone()

    return take


# --- Arrow, as the datasets library saves it ---


def _dataset(folder: Path) -> Found:
    """Read the format without the library: a stream of record batches in each file that state.json names."""
    state = folder / STATE
    try:
        names = [str(entry["filename"]) for entry in json.loads(state.read_bytes())["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{state} does not name the dataset's files; {AGAIN}") from error
    paths = [folder / name for name in names]
    if any(Path(name).name != name for name in names):
        raise UserError(f"{state} names files outside its folder; {AGAIN}")
    columns: dict[str, list[Array]] = {}
    for path in paths:
        if not path.is_file():
            raise IntegrityError(f"{path} is missing; {AGAIN}")
        for name, array in _record_batches(path):
            columns.setdefault(name, []).append(array)
    info = folder / "dataset_info.json"
    files = (state, *((info,) if info.is_file() else ()), *paths)
    return Found("arrow", {name: tuple(arrays) for name, arrays in columns.items()}, files, {})


def _record_batches(path: Path) -> Iterator[tuple[str, Array]]:
    """Columns of numbers in each record batch, by name."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - len(_END_OF_ARROW)))
        ended = file.read() == _END_OF_ARROW
    try:
        with pa.memory_map(str(path)) as source:
            schema = pa.ipc.read_schema(pa.ipc.read_message(source))
            while True:
                offset = source.tell()
                try:
                    message = pa.ipc.read_message(source)
                except EOFError:
                    break
                batch = pa.ipc.read_record_batch(message, schema)
                for number, name in enumerate(schema.names if batch.num_rows else ()):
                    array = _rows(batch.column(number), path, name)
                    if array is not None:
                        take = _out_of_batch(path, schema, offset, number)
                        yield name, Array(path, array.shape, _native(array[:0]).dtype, take)
    except (pa.ArrowException, ValueError, OSError, EOFError) as error:
        raise IntegrityError(f"{path} is cut off or damaged ({error}); {AGAIN}") from error
    if not ended:
        raise IntegrityError(f"{path} is cut off; {AGAIN}")


def _out_of_batch(path: Path, schema: Any, offset: int, number: int) -> Callable[[Key], Tensor]:
    def take(key: Key) -> Tensor:
        with pa.memory_map(str(path)) as source:
            source.seek(offset)
            batch = pa.ipc.read_record_batch(pa.ipc.read_message(source), schema)
            rows = batch.column(number).slice(key[0].start, key[0].stop - key[0].start)
            return _native(cast("NDArray[Any]", _rows(rows, path, schema.names[number]))[:, *key[1:]])

    return take


def _rows(column: Any, path: Path, name: str) -> NDArray[Any] | None:
    """A column of lists of lists … of numbers as an array on the mapped file; None where it holds no numbers.

    Raises UserError where lists differ in length or values are missing.
    """
    rows, shape = (column.storage if isinstance(column, pa.ExtensionArray) else column), [len(column)]
    rows.validate(full=True)  # a damaged file must not lead us beyond its end
    while pa.types.is_list(rows.type) or pa.types.is_large_list(rows.type) or _fixed(rows.type):
        outer, rows = rows, rows.flatten()
        lengths = {outer.type.list_size} if _fixed(outer.type) else _differences(outer.offsets)
        if outer.null_count or len(lengths) > 1:
            raise UserError(f"{path}: {name} has lists of different lengths; save it with padding and a mask")
        shape.append(lengths.pop() if lengths else 0)
    if not any(is_(rows.type) for is_ in (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)):
        return None
    if rows.null_count:
        raise UserError(f"{path}: {name} lacks {rows.null_count} values; save it without missing ones")
    return rows.to_numpy(zero_copy_only=not pa.types.is_boolean(rows.type)).reshape(shape)


def _fixed(kind: Any) -> bool:
    return pa.types.is_fixed_size_list(kind)


def _differences(offsets: Any) -> set[int]:
    return set(np.unique(np.diff(offsets.to_numpy())).tolist())
