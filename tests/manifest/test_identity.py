"""Content ids."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unbraid.manifest.identity import canonical_json, content_id, sha256_bytes, sha256_file

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
records = st.dictionaries(st.text(), values, max_size=5)


def _shuffled(value: Any, rng: random.Random) -> Any:
    if isinstance(value, dict):
        keys = list(value)
        rng.shuffle(keys)
        return {key: _shuffled(value[key], rng) for key in keys}
    return [_shuffled(item, rng) for item in value] if isinstance(value, list) else value


@settings(deadline=None, max_examples=60)
@given(records, st.integers(0, 1000))
def test_the_id_ignores_the_order_of_keys(record: dict[str, Any], seed: int) -> None:
    assert content_id(_shuffled(record, random.Random(seed))) == content_id(record)


@settings(deadline=None, max_examples=60)
@given(records)
def test_the_id_ignores_itself_and_times_at_any_depth(record: dict[str, Any]) -> None:
    bare = content_id({**record, "inner": {"a": 1}})
    assert content_id({**record, "id": "x", "time": 3, "inner": {"a": 1, "times": [1, 2]}}) == bare


@settings(deadline=None, max_examples=60)
@given(records, st.text().filter(lambda key: key not in {"id", "time", "times"}))
def test_the_id_notices_any_other_key(record: dict[str, Any], key: str) -> None:
    assert content_id({**record, key: "one"}) != content_id({**record, key: "two"})


def test_a_nested_id_counts() -> None:
    assert content_id({"input": {"id": "a"}}) != content_id({"input": {"id": "b"}})


def test_canonical_json_has_one_spelling() -> None:
    assert canonical_json({"b": [1, 2.5], "a": "ø"}) == '{"a":"ø","b":[1,2.5]}'.encode()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_canonical_json_refuses_what_json_cannot_say(bad: float) -> None:
    with pytest.raises(ValueError):
        canonical_json({"fvu": bad})


def test_hashing_a_file_equals_hashing_its_bytes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    (tmp_path / "f").write_bytes(data)
    assert sha256_file(tmp_path / "f") == sha256_bytes(data) == hashlib.sha256(data).hexdigest()
