from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from unbraid.model.edits import Edit, Gate, apply_reference
from unbraid.model.kernel import EditKernel
from unbraid.model.sites import Site

OPERATIONS = ["clamp", "scale", "add", "ablate", "project_out", "clip"]
SITE = Site(0, "resid_post")


def one(operation: Any, value: float, threshold: float = 0.0, bias: float = 0.0) -> Edit:
    """Reads the first coordinate, writes along twice the second."""
    return Edit(
        SITE,
        operation,
        value,
        np.array([1.0, 0]),
        np.array([bias]),
        np.array([threshold]),
        np.array([0, 2.0]),
    )


@pytest.mark.parametrize(
    ("operation", "value", "expected"),
    [
        ("clamp", 5.0, [3.0, 4 + 2 * (5 - 3)]),
        ("clamp", -1.0, [3.0, 4 + 2 * (-1 - 3)]),
        ("scale", 0.5, [3.0, 4 - 2 * 1.5]),
        ("scale", -1.0, [3.0, 4 - 2 * 2 * 3]),
        ("ablate", 9.0, [3.0, 4 - 2 * 3]),
        ("add", 0.5, [3.0, 5.0]),
        ("project_out", 0.0, [3.0, 0.0]),
        ("clip", 1.0, [3.0, 1.0]),
    ],
)
def test_each_operation_by_hand(operation: str, value: float, expected: list[float]) -> None:
    after, fired = apply_reference([[3.0, 4.0], [-3.0, 4.0]], one(operation, value))
    np.testing.assert_allclose(after, [expected, [-3.0, 4.0]])
    assert fired.tolist() == [True, False]


def test_clip_fires_only_where_it_changes_something() -> None:
    after, fired = apply_reference([[3.0, 4.0]], one("clip", 4.5))
    assert after.tolist() == [[3.0, 4.0]] and not fired.any()


def test_a_threshold_of_minus_infinity_fires_everywhere() -> None:
    after, fired = apply_reference([[-3.0, 4.0]], one("add", 1.0, threshold=-np.inf))
    assert fired.all() and after.tolist() == [[-3.0, 6.0]]


def test_bias_is_part_of_what_is_read() -> None:
    after, _ = apply_reference([[3.0, 4.0]], one("ablate", 0.0, bias=-1.0))
    assert after.tolist() == [[3.0, 0.0]]


@settings(deadline=None, max_examples=80)
@given(
    st.sampled_from(OPERATIONS),
    st.integers(1, 4),
    st.integers(1, 9),
    st.lists(st.integers(1, 3), max_size=2),
    st.sampled_from([-np.inf, -0.7, 0.0, 0.4, np.inf]),
    st.floats(-6, 6),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_torch_does_what_the_reference_says(
    operation: Any,
    n: int,
    d: int,
    shape: list[int],
    threshold: float,
    value: float,
    many: bool,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    edit = Edit(
        SITE,
        operation,
        tuple(value * rng.normal(size=n)) if many else value,
        rng.normal(size=(n, d)),
        rng.normal(size=n),
        np.full(n, threshold),
        rng.normal(size=(n, d)),
    )
    x = rng.normal(size=(*shape, 3, d)).astype(np.float32)
    p = x @ edit.probe.T + edit.bias
    assume(np.abs(p - threshold).min() > 1e-4)  # what float32 can decide
    if operation == "clip":
        assume(np.abs(x @ edit.directions.T - edit.values).min() > 1e-4)
    expected, fired = apply_reference(x, edit)
    delta, on = EditKernel(edit).change(torch.from_numpy(x))
    np.testing.assert_allclose((torch.from_numpy(x) + delta).numpy(), expected, rtol=1e-4, atol=1e-3)
    assert (on.numpy() == fired).all()
    exact, _ = EditKernel(edit).change(torch.from_numpy(x.astype(np.float64)))
    np.testing.assert_allclose(x + exact.numpy(), expected, rtol=1e-10, atol=1e-10)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(0, 2**31), st.booleans(), st.booleans())
def test_json_keeps_every_bit(n: int, d: int, seed: int, gated: bool, many: bool) -> None:
    rng = np.random.default_rng(seed)
    gate = Gate(Site(1, "resid_mid"), rng.normal(size=d), float(rng.normal()), -np.inf, "intent")
    edit = Edit(
        SITE,
        "clamp",
        tuple(rng.normal(size=n)) if many else float(rng.normal()),
        rng.normal(size=(n, d)),
        rng.normal(size=n),
        np.where(rng.random(n) < 0.5, -np.inf, 0.1),
        rng.normal(size=(n, d)),
        positions="reply",
        gate=gate if gated else None,
        name="naïve",
    )
    back = Edit.from_json(json.loads(json.dumps(edit.to_json(), allow_nan=False)))
    for field in ("probe", "bias", "threshold", "write"):
        assert getattr(back, field).tobytes() == getattr(edit, field).tobytes()
    assert (back.site, back.operation, back.value) == (edit.site, edit.operation, edit.value)
    assert (back.positions, back.name) == (edit.positions, edit.name)
    assert (back.gate is None) == (edit.gate is None)
    if back.gate is not None:
        assert back.gate.weight.tobytes() == gate.weight.tobytes()
        assert (back.gate.site, back.gate.bias, back.gate.threshold) == (gate.site, gate.bias, gate.threshold)
    assert back.to_json() == edit.to_json()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": np.zeros(2)}, "bias has shape"),
        ({"write": np.ones((1, 3))}, "write has shape"),
        ({"value": (1.0, 2.0)}, "2 values for 1 latents"),
        ({"value": float("nan")}, "finite"),
        ({"probe": np.array([np.nan, 1])}, "not finite"),
        ({"operation": "clip", "write": np.zeros(2)}, "not zero"),
        ({"operation": "explode"}, "unknown operation"),
        ({"positions": "replies"}, "unknown positions"),
    ],
)
def test_an_edit_that_makes_no_sense_is_refused(change: dict[str, Any], message: str) -> None:
    fields: dict[str, Any] = {"probe": np.ones(2), "bias": 0.0, "threshold": 0.0, "write": np.ones(2)}
    with pytest.raises(ValueError, match=message):
        Edit(**{"site": SITE, "operation": "clamp", "value": 1.0, **fields, **change})
