"""Tokens are found by passage and place."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unbraid.features.tables import PASSAGE, PASSAGES, PLACES, Passages, PassageWriter, part_name

PARTS = {0: [[1, 2, 3], [4], [5, 6, 7, 8]], 3: [[9, 10], [], [11, 12, 13]]}
"""Tokens of the passages of each part; every number is there once."""


@pytest.fixture(scope="module")
def passages(tmp_path_factory: pytest.TempPathFactory) -> Passages:
    folder = tmp_path_factory.mktemp("tables")
    (folder / PASSAGES).mkdir()
    for part, found in PARTS.items():
        rows = [
            {"passage": (part << PLACES) + n, "document": 10 * part + n, "id": f"document {part}.{n}",
             "stratum": None, "first": 100 * n, "tokens": tokens}
            for n, tokens in enumerate(found)
        ]  # fmt: skip
        with pa.ipc.new_file(folder / PASSAGES / part_name(part), PASSAGE) as writer:
            writer.write_table(pa.Table.from_pylist(rows, PASSAGE))
    return Passages(folder)


@settings(max_examples=60, deadline=None)
@given(
    place=st.sampled_from([(part, n) for part, found in PARTS.items() for n in range(len(found))]),
    start=st.integers(0, 6),
    length=st.integers(0, 6),
)
def test_a_cut_holds_the_passages_own_tokens_and_none_of_its_neighbours(
    passages: Passages, place: tuple[int, int], start: int, length: int
) -> None:
    part, n = place
    tokens = PARTS[part][n]
    found = passages.cut((part << PLACES) + n, start, start + length)
    assert found == (f"document {part}.{n}", 100 * n, tokens[start : start + length])


def test_a_passage_is_had_whole_and_all_of_them_in_order(passages: Passages) -> None:
    assert passages.numbers == [0, 3]
    row = passages[(3 << PLACES) + 2]
    assert (row["id"], row["document"], row["first"], row["tokens"]) == (
        "document 3.2",
        32,
        200,
        [11, 12, 13],
    )
    assert passages.all()["tokens"].to_pylist() == [*PARTS[0], *PARTS[3]]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.integers(0, 2**40), st.text(max_size=5), st.none() | st.text(max_size=3),
            st.integers(0, 2**20), st.lists(st.integers(0, 2**31 - 1), max_size=4),
        ),
        max_size=12,
    ),
    part=st.integers(0, 3),
)  # fmt: skip
def test_written_passages_are_what_arrow_makes_of_the_values(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple], part: int
) -> None:
    folder = tmp_path_factory.mktemp("written")
    writer = PassageWriter()
    for document, name, stratum, first, tokens in rows:
        writer.add(document, name, stratum, first, np.array(tokens, np.int32))
    writer.write(folder, part)
    passages = Passages(folder)
    assert passages.numbers == ([part] if rows else [])
    found = passages.all()
    found.validate(full=True)
    columns = zip(*[((part << PLACES) + n, *row) for n, row in enumerate(rows)], strict=True)
    wanted = dict(zip(PASSAGE.names, columns, strict=True)) if rows else {n: [] for n in PASSAGE.names}
    assert found.equals(pa.table(wanted, schema=PASSAGE))


def test_writing_passages_loads_no_pandas(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
import numpy as np
from unbraid.features.tables import PassageWriter
writer = PassageWriter()
writer.add(3, "a document", None, 0, np.arange(5, dtype=np.int32))
writer.write(Path(sys.argv[1]), 0)
sys.exit("pandas" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert Passages(tmp_path)[0]["tokens"] == list(range(5))
