"""Reading other tools' files (JSON, safetensors, .npz, .pt), and never running what is in one."""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from unbraid.manifest.errors import IntegrityError, UserError

AGAIN = "fetch or make the autoencoder again"
INDEX = ".index.json"
"""What Hugging Face appends to the name of a weights file that it stored in parts."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError, naming the file, when it is missing or something else."""
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; give the folder of an autoencoder") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON; {AGAIN}") from error
    if not isinstance(record, dict):
        raise UserError(f"{path} is not a JSON object; {AGAIN}")
    return cast("dict[str, Any]", record)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a weights file by name, and whatever else it names (only a .pt does).

    The kind of file is told from the end of its name. Raises UserError for a file that is missing or wants to
    run code, which is not done, and IntegrityError for one that is cut off or damaged.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path), {}
    if not path.is_file():
        raise UserError(f"{path} does not exist; {AGAIN}")
    return (_read_npz(path), {}) if path.suffix == ".npz" else _read_torch(path)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name; a file stored in parts is put together from its index."""
    index = path.with_name(path.name + INDEX)
    if not path.is_file() and index.is_file():
        return {name: t for part in weights_files(path)[1:] for name, t in read_safetensors(part).items()}
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; {AGAIN}") from error
    except SafetensorError as error:
        raise IntegrityError(f"{path} is cut off or damaged; {AGAIN}") from error


def weights_files(path: Path) -> list[Path]:
    """The files that hold the weights of `path`: itself, or its index and its parts."""
    index = path.with_name(path.name + INDEX)
    if path.is_file() or not index.is_file():
        return [path]
    parts = read_json(index).get("weight_map")
    if not isinstance(parts, dict):
        raise UserError(f"{index} has no weight_map; {AGAIN}")
    names = sorted({str(name) for name in cast("dict[str, Any]", parts).values()})
    if any(Path(name).name != name for name in names):  # a foreign index must not name files elsewhere
        raise UserError(f"{index} names files outside its folder; {AGAIN}")
    return [index, *(path.parent / name for name in names)]


def _read_npz(path: Path) -> dict[str, Tensor]:
    if not zipfile.is_zipfile(path):
        raise IntegrityError(f"{path} is cut off or damaged; {AGAIN}")
    try:
        arrays: Any = np.load(path, allow_pickle=False)
        with arrays:
            return {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays.files}
    except ValueError as error:
        if "allow_pickle" in str(error):
            raise UserError(
                f"{path} holds Python objects, which could run code; nothing was read from it"
            ) from error
        raise IntegrityError(f"{path} is cut off or damaged; {AGAIN}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, TypeError) as error:
        raise IntegrityError(f"{path} is cut off or damaged; {AGAIN}") from error


def _read_torch(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with warnings.catch_warnings(action="ignore"):  # of what is refused below in a sentence
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # PyTorch names what was refused; anything but a plain dotted name stays out of our sentence.
        named = re.search(r"(?:GLOBAL|Unsupported class|Unsupported global:) ([\w.]+)", str(error))
        if named:
            raise UserError(
                f"{path} wants to run code ({named.group(1)}) where only tensors belong; nothing of it was "
                "run, do not load it elsewhere"
            ) from error
        raise IntegrityError(f"{path} is damaged or holds more than tensors; {AGAIN}") from error
    except (
        Exception
    ) as error:  # a damaged file fails in the reader's own ways: RuntimeError, KeyError, EOFError …
        raise IntegrityError(f"{path} is cut off or damaged; {AGAIN}") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path} is not a dictionary of tensors; name the file with the autoencoder's weights"
        )
    items = {str(name): value for name, value in cast("dict[Any, Any]", content).items()}
    tensors = {name: value for name, value in items.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in items.items() if name not in tensors}
