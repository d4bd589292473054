"""An edit as data: where, what, when. The NumPy reference here says what each operation means.

For latent i with probe e_i, bias b_i, threshold t_i and write direction d_i, at a token with activation x:
p_i = x·e_i + b_i, and the latent *fires* when p_i > t_i. All latents of one edit read the same x; their
changes are added up. Several edits at one site are applied one after the other, in the order given.

========== ==================================================================
clamp      x + (value − p) d                     where it fires
scale      x + (value − 1) p d                   where it fires
ablate     x − p d                               where it fires (scale by 0)
add        x + value d                           where it fires (threshold −inf: at every token)
project    x − (x·u) u, u = d / ‖d‖              where it fires ("project_out")
clip       x − max(0, x·u − value) u             where it fires and x·u > value
========== ==================================================================

For elementwise autoencoders (ReLU, JumpReLU, BatchTopK with its threshold) clamp is exactly what encoding,
setting the latent and decoding would do with the reconstruction error kept, at O(d) instead of O(d·d_sae).
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from unbraid.model.sites import Site

Operation = Literal["clamp", "scale", "add", "ablate", "project_out", "clip"]
Positions = Literal["all", "prompt", "reply"]
Array = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Gate:
    """Decides once per sequence, on the last prompt token, whether an edit is applied to that sequence."""

    site: Site
    """Where the activation is read; at or before the edit's site unless the edit touches the reply alone."""
    weight: Array
    """Direction of the linear classifier, shape (d,)."""
    bias: float
    """Its intercept."""
    threshold: float = 0.0
    """Open when x·weight + bias > threshold; −inf is always open, inf always closed."""
    name: str = ""
    """What the gate is about, for logs."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", _frozen(self.weight, (None,), "gate weight"))

    def to_json(self) -> dict[str, Any]:
        """A lossless record of plain JSON values."""
        return {
            "site": str(self.site),
            "weight": _pack(self.weight),
            "bias": _pack(np.float64(self.bias)),
            "threshold": _pack(np.float64(self.threshold)),
            "name": self.name,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Gate:
        """The inverse of `to_json`."""
        return cls(
            site=Site.parse(record["site"]),
            weight=_unpack(record["weight"]),
            bias=float(_unpack(record["bias"])),
            threshold=float(_unpack(record["threshold"])),
            name=record["name"],
        )


@dataclass(frozen=True, eq=False)
class Edit:
    """A change of activations at one site by n latents together; the module's table has the operations."""

    site: Site
    """Where the activation is read and changed."""
    operation: Operation
    """What happens to a token where a latent fires."""
    value: float | tuple[float, ...]
    """The operation's number, one for all latents or one each; unused by ablate and project_out."""
    probe: Array
    """Read directions, shape (n, d); a single (d,) vector is taken as n = 1."""
    bias: Array
    """Added to the probe's product, shape (n,)."""
    threshold: Array
    """A latent fires above it, shape (n,); −inf: at every token."""
    write: Array
    """Directions in which the activation moves, shape (n, d)."""
    positions: Positions = "all"
    """prompt: every token of the prefill; reply: generated tokens, as they are fed back; all: both."""
    gate: Gate | None = None
    """When given, sequences for which it is closed are left untouched."""
    name: str = ""
    """What the edit is called in counts and logs."""

    def __post_init__(self) -> None:
        if self.operation not in get_args(Operation):
            raise ValueError(f"unknown operation {self.operation!r}")
        if self.positions not in get_args(Positions):
            raise ValueError(f"unknown positions {self.positions!r}")
        probe = _frozen(np.atleast_2d(np.asarray(self.probe)), (None, None), "probe")
        n, d = probe.shape
        write = _frozen(np.atleast_2d(np.asarray(self.write)), (n, d), "write")
        object.__setattr__(self, "probe", probe)
        object.__setattr__(self, "write", write)
        object.__setattr__(self, "bias", _frozen(np.atleast_1d(np.asarray(self.bias)), (n,), "bias"))
        threshold = np.atleast_1d(np.asarray(self.threshold))
        object.__setattr__(self, "threshold", _frozen(threshold, (n,), "threshold", finite=False))
        if isinstance(self.value, tuple | list | np.ndarray):
            values = tuple(float(v) for v in cast("list[float]", self.value))
            if len(values) != n:
                raise ValueError(f"{len(values)} values for {n} latents")
            object.__setattr__(self, "value", values)
        else:
            object.__setattr__(self, "value", float(self.value))
        if not np.isfinite(self.values).all():
            raise ValueError("an edit's value must be finite")
        if self.operation in ("project_out", "clip") and not (np.linalg.norm(write, axis=1) > 0).all():
            raise ValueError(f"{self.operation} needs a write direction that is not zero")

    @property
    def n_latents(self) -> int:
        """How many latents act together."""
        return int(self.probe.shape[0])

    @property
    def d_in(self) -> int:
        """Size of the activation."""
        return int(self.probe.shape[1])

    @property
    def values(self) -> NDArray[np.float64]:
        """The value for each latent, shape (n,)."""
        return np.broadcast_to(np.asarray(self.value, dtype=np.float64), (self.n_latents,))

    @property
    def directions(self) -> NDArray[np.float64]:
        """Write directions, shape (n, d); unit vectors for project_out and clip."""
        write = self.write.astype(np.float64)
        if self.operation in ("project_out", "clip"):
            return write / np.linalg.norm(write, axis=1, keepdims=True)
        return write

    def to_json(self) -> dict[str, Any]:
        """A lossless record of plain JSON values (arrays as base64 of little-endian float32)."""
        return {
            "site": str(self.site),
            "operation": self.operation,
            "value": list(self.value) if isinstance(self.value, tuple) else self.value,
            "probe": _pack(self.probe),
            "bias": _pack(self.bias),
            "threshold": _pack(self.threshold),
            "write": _pack(self.write),
            "positions": self.positions,
            "gate": None if self.gate is None else self.gate.to_json(),
            "name": self.name,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Edit:
        """The inverse of `to_json`."""
        value = record["value"]
        return cls(
            site=Site.parse(record["site"]),
            operation=record["operation"],
            value=tuple(value) if isinstance(value, list) else value,
            probe=_unpack(record["probe"]),
            bias=_unpack(record["bias"]),
            threshold=_unpack(record["threshold"]),
            write=_unpack(record["write"]),
            positions=record["positions"],
            gate=None if record["gate"] is None else Gate.from_json(record["gate"]),
            name=record["name"],
        )


@dataclass(frozen=True)
class EditCount:
    """Proof of application: what one edit saw and did."""

    name: str
    """The edit's name."""
    considered: int
    """Tokens where the edit was in force: real ones, at its positions, in sequences whose gate was open."""
    fired: int
    """Those of them at which at least one of its latents fired."""
    sequences: int
    """Sequences that ran under it."""
    gated: int
    """Those of them that its closed gate left untouched."""


def apply_reference(x: ArrayLike, edit: Edit) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Apply an edit's operation in float64: the definition that the fast path is tested against.

    x: shape (..., d). Returns the changed activations and where at least one latent fired, shape (...).
    Positions and gate are not looked at.
    """
    before = np.asarray(x, dtype=np.float64)
    after = before.copy()
    fired = np.zeros(before.shape[:-1], dtype=bool)
    for i, direction in enumerate(edit.directions):
        p = before @ edit.probe[i].astype(np.float64) + float(edit.bias[i])
        on = p > float(edit.threshold[i])
        value = edit.values[i]
        if edit.operation == "clamp":
            amount = value - p
        elif edit.operation == "scale":
            amount = (value - 1.0) * p
        elif edit.operation == "ablate":
            amount = -p
        elif edit.operation == "add":
            amount = np.full_like(p, value)
        elif edit.operation == "project_out":
            amount = -(before @ direction)
        else:
            amount = value - before @ direction
            on &= amount < 0
        after += np.where(on, amount, 0.0)[..., None] * direction
        fired |= on
    return after, fired


def _frozen(array: ArrayLike, shape: tuple[int | None, ...], what: str, *, finite: bool = True) -> Array:
    """A read-only float32 copy, its shape checked (None: any size)."""
    copy = np.array(array, dtype=np.float32, order="C")
    if copy.ndim != len(shape) or any(
        want is not None and want != have for want, have in zip(shape, copy.shape, strict=True)
    ):
        raise ValueError(f"{what} has shape {copy.shape}, expected {shape}")
    if np.isnan(copy).any() or (finite and np.isinf(copy).any()):
        raise ValueError(f"{what} holds numbers that are not finite")
    copy.flags.writeable = False
    return copy


def _pack(array: NDArray[Any] | np.float64) -> dict[str, Any]:
    values = np.asarray(array)
    little = values.astype(values.dtype.newbyteorder("<"))
    return {
        "dtype": values.dtype.name,
        "shape": list(values.shape),
        "base64": base64.b64encode(little.tobytes()).decode("ascii"),
    }


def _unpack(record: Mapping[str, Any]) -> NDArray[Any]:
    dtype = np.dtype(record["dtype"])
    raw = base64.b64decode(record["base64"], validate=True)
    return np.frombuffer(raw, dtype=dtype.newbyteorder("<")).astype(dtype).reshape(record["shape"])
