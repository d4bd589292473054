"""The tables of an index: their columns, and how one latent's rows are written and found.

Every table is sorted by latent and cut into row groups of a fixed number of latents, empty ones included, so
that latent j's rows are in row group j // `LATENTS[table]`: a page reads one row group a table, however many
latents there are.  Tokens are stored once, in Arrow files that are read in place: any passage can be had
without its neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from unbraid.manifest.files import writing

LAYOUT = 2
"""Version of these tables; stands in the facts of an index."""
PASSAGES = "passages"
"""Folder of the Arrow files, one a part of the corpus: passages/000007.arrow."""
PLACES = 24
"""A passage's number is its part of the corpus << PLACES, plus its row in that part's file."""

_LIST_F, _LIST_I = pa.list_(pa.float32()), pa.list_(pa.int64())
SCHEMAS: Mapping[str, pa.Schema] = {
    # What each latent did over the corpus, one row a latent.
    "latents": pa.schema(
        {
            "latent": pa.int32(),
            "count": pa.int64(),
            "documents": pa.int64(),
            "density": pa.float64(),
            "max": pa.float32(),
            "mean": pa.float32(),
            "total": pa.float64(),  # sum of the activations, and what rounding left out of it
            "total_rest": pa.float64(),
            "histogram": _LIST_I,  # 64 bins of equal width over [0, histogram_top)
            "histogram_top": pa.float64(),
            "levels": _LIST_I,  # all below, then 32 bins an octave up to histogram_top: see `groups`
            "position_total": pa.int64(),  # sum of positions in the window, and of their squares
            "position_squares": pa.int64(),
            "position_first": pa.int64(),  # firings on a window's first counted token
            "position_octaves": _LIST_I,  # firings at positions 0, 1, 2–3, 4–7, …
            "strata": _LIST_I,  # firings by stratum, in the order of the facts' strata
            "distinct_tokens": pa.int64(),  # how many different tokens it fires on
        }
    ),
    # What its weights say, one row a latent.
    "weights": pa.schema(
        {
            "latent": pa.int32(),
            "promoted": pa.list_(pa.string()),
            "promoted_logits": _LIST_F,
            "suppressed": pa.list_(pa.string()),
            "suppressed_logits": _LIST_F,
            "logits": _LIST_I,  # output tokens by effect, bins of equal width from logits_low to logits_high
            "logits_low": pa.float32(),
            "logits_high": pa.float32(),
        }
    ),
    # Latents whose weights point the same way, here and in other autoencoders.
    "neighbours": pa.schema(
        {
            "latent": pa.int32(),
            "kind": pa.string(),  # decoder, encoder
            "sae": pa.string(),  # content id of the other autoencoder; null for this one
            "rank": pa.int16(),
            "neighbour": pa.int32(),
            "cosine": pa.float32(),
        }
    ),
    # Latents that fire on the same tokens, from the sample of tokens that the facts describe.
    "coactive": pa.schema(
        {
            "latent": pa.int32(),
            "rank": pa.int16(),
            "neighbour": pa.int32(),
            "together": pa.int64(),  # sampled tokens on which both fire, and each of them does
            "own": pa.int64(),
            "other": pa.int64(),
            "jaccard": pa.float32(),
            "pmi": pa.float32(),  # nats
        }
    ),
    # Every token that it fires on, counted over all firings, the most frequent first.
    "tokens": pa.schema({"latent": pa.int32(), "token": pa.int32(), "firings": pa.int64()}),
    # Where it fires: top (rank −1: like another one), sample (uniform over all firings), interval (uniform
    # over the firings in [group, group + 1) / 16 of histogram_top).
    "examples": pa.schema(
        {
            "latent": pa.int32(),
            "kind": pa.string(),
            "group": pa.int8(),
            "rank": pa.int16(),
            "passage": pa.int64(),
            "position": pa.int32(),
            "value": pa.float32(),
            "activations": _LIST_F,  # the same latent's, to either side
        }
    ),
}
"""Columns of each Parquet table."""
LATENTS: Mapping[str, int] = {
    "latents": 128,
    "weights": 128,
    "neighbours": 128,
    "coactive": 128,
    "tokens": 128,
    "examples": 64,
}
"""Latents in a row group."""
PASSAGE = pa.schema(
    {
        "passage": pa.int64(),
        "document": pa.int64(),
        "id": pa.string(),
        "stratum": pa.string(),
        "first": pa.int32(),  # place in its document of its first token, had it no repeated BOS
        "tokens": pa.list_(pa.int32()),
    }
)
"""Columns of a passage, which is a window of the text: a document, or a part of a longer one."""
VOCABULARY = pa.schema(
    {"token": pa.int32(), "text": pa.string(), "occurrences": pa.int64()}  # among counted tokens
)
"""Columns of vocabulary.parquet: each token of the corpus."""


class TableWriter:
    """Writes one table, a block of latents at a time, in their order."""

    def __init__(self, folder: Path, table: str) -> None:
        self.schema, self.per_group = SCHEMAS[table], LATENTS[table]
        self._writer = pq.ParquetWriter(
            folder / f"{table}.parquet",
            self.schema,
            compression="zstd",
            use_dictionary=_recurring(self.schema),
        )

    def write(self, columns: Any) -> None:
        """The rows of the next `per_group` latents, or of the last few: a table, or columns by name."""
        block = columns if isinstance(columns, pa.Table) else pa.table(dict(columns), schema=self.schema)
        self._writer.write_table(block, row_group_size=max(len(block), 1))

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()


def _recurring(schema: Any) -> Any:
    """Parquet's names of the columns whose values recur. A dictionary of floats takes time and room."""
    found: list[str] = []
    for column in schema:
        listed = pa.types.is_list(column.type)
        if not pa.types.is_floating(column.type.value_type if listed else column.type):
            found.append(f"{column.name}.list.element" if listed else column.name)
    return found


class Table:
    """One Parquet table of an index, read a latent at a time; several threads may."""

    def __init__(self, folder: Path, table: str) -> None:
        self.path, self.per_group = folder / f"{table}.parquet", LATENTS[table]
        self._metadata = pq.read_metadata(self.path)

    def rows(self, latent: int) -> list[dict[str, Any]]:
        """A latent's rows, in the order in which they were written."""
        found = self.group(latent // self.per_group)
        column = found["latent"].to_numpy()
        first, stop = column.searchsorted([latent, latent + 1])
        return found.slice(first, stop - first).to_pylist()

    def group(self, number: int, columns: Sequence[str] | None = None) -> Any:
        """A row group: the rows of latents number · per_group and the next ones."""
        # Opening costs nothing with the metadata at hand, and one reader must not be shared by threads.
        with pq.ParquetFile(self.path, metadata=self._metadata) as file:
            return file.read_row_group(number, columns=columns, use_threads=False)

    def column(self, name: str) -> Any:
        """A column of all rows."""
        # There are thousands of small row groups: to share them among threads takes longer than to read.
        with pq.ParquetFile(self.path, metadata=self._metadata) as file:
            return file.read(columns=[name], use_threads=False)[name]

    @property
    def groups(self) -> int:
        """How many row groups there are."""
        return self._metadata.num_row_groups


class PassageWriter:
    """The passages of a part, before they are written."""

    def __init__(self) -> None:
        self._numbers: list[tuple[int, int]] = []
        self._texts: list[tuple[str, str | None]] = []
        self._tokens: list[NDArray[np.int32]] = []

    def add(self, document: int, id: str, stratum: str | None, first: int, tokens: NDArray[np.int32]) -> None:
        """Take the next passage: PASSAGE's columns but its own number."""
        self._numbers.append((document, first))
        self._texts.append((id, stratum))
        self._tokens.append(tokens)

    def write(self, folder: Path, part: int) -> None:
        """Write the part's file, if there are any."""
        if not (n := len(self._tokens)):
            return
        # From their bytes: what makes columns of values loads pandas where it is installed, for good.
        numbers = np.array(self._numbers)
        columns = [
            _numbers((part << PLACES) + np.arange(n), np.int64),
            _numbers(numbers[:, 0], np.int64),
            *(_texts(texts) for texts in zip(*self._texts, strict=True)),
            _numbers(numbers[:, 1], np.int32),
            pa.Array.from_buffers(
                PASSAGE.field("tokens").type,
                n,
                [None, pa.py_buffer(_offsets(self._tokens))],
                children=[_numbers(np.concatenate(self._tokens), np.int32)],
            ),
        ]
        with (
            writing(folder / PASSAGES / part_name(part)) as path,
            pa.OSFile(str(path), "wb") as file,
            pa.ipc.new_file(file, PASSAGE) as writer,
        ):
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=PASSAGE))


def _offsets(parts: Sequence[Any]) -> NDArray[np.int32]:
    return np.cumsum([0, *map(len, parts)]).astype(np.int32)


def _numbers(values: NDArray[Any], dtype: Any) -> Any:
    data = np.ascontiguousarray(values, dtype)
    return pa.Array.from_buffers(pa.from_numpy_dtype(dtype), len(data), [None, pa.py_buffer(data)])


def _texts(texts: Sequence[str | None]) -> Any:
    data = [(text or "").encode() for text in texts]
    there = np.packbits([text is not None for text in texts], bitorder="little")
    return pa.StringArray.from_buffers(
        len(data), pa.py_buffer(_offsets(data)), pa.py_buffer(b"".join(data)), pa.py_buffer(there)
    )


class Passages:
    """The passages of an index, read in place; several threads may."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / PASSAGES
        self._parts: dict[int, Any] = {}
        self._columns: dict[int, tuple[Any, ...]] = {}

    def __getitem__(self, passage: int) -> dict[str, Any]:
        """A passage by its number, as a mapping from PASSAGE's columns."""
        part = self.part(passage >> PLACES)
        return part.slice(passage & ((1 << PLACES) - 1), 1).to_pylist()[0]

    def cut(self, passage: int, start: int, stop: int) -> tuple[str, int, list[int]]:
        """A passage's document, the place in it of its first token, and its tokens from start on, to stop."""
        number, row = passage >> PLACES, passage & ((1 << PLACES) - 1)
        if number not in self._columns:
            part = self.part(number)
            self._columns[number] = tuple(part[name].chunk(0) for name in ("id", "first", "tokens"))
        document, first, tokens = self._columns[number]
        return document[row].as_py(), first[row].as_py(), tokens[row].values[start:stop].to_pylist()

    def part(self, number: int) -> Any:
        """A part's passages; they stay on the disk until they are looked at."""
        if number not in self._parts:
            source = pa.memory_map(str(self.folder / part_name(number)))
            self._parts[number] = pa.ipc.open_file(source).read_all()
        return self._parts[number]

    @property
    def numbers(self) -> list[int]:
        """The numbers of the parts that are there."""
        return sorted(int(path.stem) for path in self.folder.glob("*.arrow"))

    def all(self) -> Any:
        """All parts as one table."""
        return pa.concat_tables([PASSAGE.empty_table(), *(self.part(n) for n in self.numbers)])


def part_name(number: int) -> str:
    """The file of a part's passages."""
    return f"{number:06d}.arrow"
