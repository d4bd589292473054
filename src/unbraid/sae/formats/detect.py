"""Which format a folder's files have, and how to load them."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor

from unbraid.manifest.errors import UserError
from unbraid.sae.base import SAE
from unbraid.sae.formats import saelens
from unbraid.sae.formats.files import INDEX, read_json, read_tensors, weights_files
from unbraid.sae.formats.folds import Found
from unbraid.sae.formats.foreign import FORMATS, LAYERS
from unbraid.sae.formats.table import Format, interpret


@dataclass(frozen=True, eq=False)
class Source:
    """An autoencoder on disk whose format is known."""

    format: str
    """The tool's name."""
    weights: Path
    """The file with its tensors."""
    config: Path | None
    """The file with its configuration, where the format has one."""
    row: Format | None
    """How to read it; None for SAELens's."""
    tensors: tuple[dict[str, Tensor], dict[str, Any]] | None = None
    """What the weights file holds, where it had to be read to know the format."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that decides what is loaded."""
        files = [*weights_files(self.weights), *([self.config] if self.config else [])]
        if self.row is None:
            extra = (self.weights.with_name(name) for name in (saelens.THRESHOLDS, saelens.SCALE))
            files += [path for path in extra if path.is_file()]
        return tuple(files)

    def load(self, k: int | None = None) -> SAE:
        """The autoencoder; `k` says what a TopK's files do not. Raises what `detect` and `interpret` do."""
        if self.row is None:
            return saelens.load(self.weights.parent)
        tensors, extras = self.tensors or read_tensors(self.weights)
        record = {**extras, **(read_json(self.config) if self.config else {})}
        return interpret(self.row, Found(self.weights, self.config or self.weights, tensors, record), k)


def detect(path: Path) -> Source:
    """Find out by a folder's files, or one weights file, which tool wrote it.

    Raises UserError when it holds no autoencoder of a known format, several, or one over several layers, and
    what reading a .pt or .npz file raises (`formats.files`), for only its tensors tell whose it is.
    """
    folder, only = (path.parent, path) if path.is_file() else (path, None)
    if any(fnmatchcase(file.name, LAYERS) for file in ([only] if only else folder.glob("*"))):
        raise UserError(
            f"{path} is a cross-layer transcoder or crosscoder of Gemma Scope 2 (a file {LAYERS} for each "
            "layer), which is not supported; choose an autoencoder or transcoder of one layer"
        )
    for row in FORMATS:
        config = folder / row.config
        if row.config and config.is_file() and _marked(row, read_json(config)):
            return Source(row.name, _weights(row, folder, only), config, row)
    if (folder / saelens.CONFIG).is_file():
        return Source("SAELens", folder / saelens.WEIGHTS, folder / saelens.CONFIG, None)
    # Without a configuration the tensors' names tell; a folder of many layers needs its file named.
    loose = [row for row in FORMATS if not row.config]
    files = (
        [only]
        if only
        else sorted(
            file
            for file in folder.glob("*")
            if any(fnmatchcase(file.name, p) for row in loose for p in row.weights)
        )
    )
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:4])
        raise UserError(f"{folder} holds several weights files ({names} …); name one of them")
    for file in files:
        rows = [row for row in loose if any(fnmatchcase(file.name, pattern) for pattern in row.weights)]
        tensors = read_tensors(file) if rows else ({}, {})
        for row in rows:
            if all(mark in tensors[0] for mark in row.marks):
                return Source(row.name, file, None, row, tensors)
    known = ", ".join(["SAELens", *(row.name for row in FORMATS)])
    raise UserError(
        f"{path} holds no autoencoder in a known format (neither {saelens.CONFIG} nor another tool's files); "
        f"known are {known}"
    )


def _marked(row: Format, record: dict[str, Any]) -> bool:
    found = Found(Path(), Path(), {}, record)
    return all(found.get(mark) is not None for mark in row.marks)


def _weights(row: Format, folder: Path, only: Path | None) -> Path:
    if only is not None and only.name != row.config:
        return only
    for name in row.weights:
        if (folder / name).is_file() or (folder / (name + INDEX)).is_file():
            return folder / name
    raise UserError(f"{folder} has the {row.config} of {row.name} but no {row.weights[0]}; fetch it again")
