"""Records of a corpus in Parquet files or of a Hugging Face dataset, one at a time, in bounded memory."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from unbraid.manifest.errors import UserError

FIELDS = ("text", "messages", "id", "focus", "mask", "stratum", "label", "labels", "concepts")
"""The columns that are read, besides one that the user names."""
HUB = "hf:"
ROWS_AT_ONCE = 64
"""Rows of Parquet decoded at once; a row group, however large, is never held as a whole."""
OLDEST_DATASETS = 4
"""Older versions of `datasets` run the code that a dataset's repository brings."""

Placed = Iterator[tuple[str, dict[str, Any]]]
"""Where a record stands, for messages, and its fields."""


def parquet_records(path: Path, field: str = "") -> Placed:
    """Rows of a Parquet file, or of all below a folder in the order of their paths.

    Only the columns in FIELDS and `field` are read. Raises UserError for a folder without Parquet files, a
    file that is not one or is damaged, and one without a column of text.
    """
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} is not a file, nor a folder with .parquet files; check --text")
    for file in files:
        number = 0
        try:
            with pq.ParquetFile(file, buffer_size=1 << 16, pre_buffer=False) as table:
                columns = _columns(str(file), table.schema_arrow.names, field)
                for batch in table.iter_batches(ROWS_AT_ONCE, columns=columns):
                    for row in batch.to_pylist():
                        number += 1
                        yield f"{file} row {number}", _named(row)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{file} is no readable Parquet file ({_first_line(error)}); check it") from error


def hub_records(source: str, field: str = "") -> Placed:
    """Rows of the Hugging Face dataset `source`, streamed: nothing is downloaded but what is read.

    `source` is owner/name, owner/name/configuration or a local folder, each with :split or "train". Raises
    UserError when `datasets` is missing or old, and for whatever that library says about the dataset.
    """
    place, _, split = source.rpartition(":") if ":" in source else (source, "", "train")
    local = Path(place).expanduser()
    parts = place.split("/")
    if not (place and local.is_dir()) and not (2 <= len(parts) <= 3 and all(parts)):
        raise UserError(
            f"{HUB}{source} names no dataset; write {HUB}owner/name, {HUB}owner/name/configuration or"
            f" {HUB}FOLDER, with :split after it for another than train"
        )
    name, configuration = (str(local), None) if local.is_dir() else ("/".join(parts[:2]), "".join(parts[2:]))
    datasets = _datasets()
    number = 0
    try:
        table: Any = datasets.load_dataset(name, configuration or None, split=split, streaming=True)
        if table.column_names is not None:
            table = table.select_columns(_columns(f"{HUB}{source}", table.column_names, field))
        for row in table:
            number += 1
            yield f"{HUB}{source} row {number}", _named(row)
    except UserError:
        raise
    except Exception as error:  # whatever the library and its many readers raise is about this dataset
        what = f"{type(error).__name__}: {_first_line(error)}"
        raise UserError(
            f"{HUB}{source} cannot be read after row {number} ({what}); check its name"
        ) from error


def _datasets() -> Any:
    try:
        module = importlib.import_module("datasets")
    except ImportError as error:
        raise UserError(
            f"{HUB}… needs the package datasets; install it with: pip install 'unbraid[datasets]'"
        ) from error
    if int(module.__version__.split(".")[0]) < OLDEST_DATASETS:
        raise UserError(
            f"datasets {module.__version__} would run code that a dataset brings; install a newer one with:"
            " pip install 'unbraid[datasets]'"
        )
    return module


def _columns(place: str, there: Collection[str], field: str) -> list[str]:
    """The columns to read; raises UserError that lists them all when the one with the text is missing."""
    if field in there or (not field and ("text" in there or "messages" in there)):
        return [name for name in there if name in (*FIELDS, field)]
    wanted = f"column {field}" if field else "column text or messages"
    raise UserError(
        f"{place} has no {wanted}; name one of its columns ({', '.join(there)}) after the path, as in"
        " PATH#COLUMN"
    )


def _named(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose number for an id, which is usual in tables, is a string as in JSON Lines."""
    id_ = row.get("id")
    return {**row, "id": str(id_)} if isinstance(id_, int) else row


def _first_line(error: BaseException) -> str:
    lines: Iterable[str] = str(error).strip().splitlines()
    return next(iter(lines), type(error).__name__)
