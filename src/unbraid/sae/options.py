"""Hyperparameters that an architecture declares: a frozen dataclass, checked at the edge."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, cast

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from unbraid.manifest.errors import UserError

EDGE = ConfigDict(extra="forbid")
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""A finite number of 0 or more."""
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""A finite number above 0."""
Count = Annotated[int, Field(ge=1)]
"""A whole number of 1 or more."""


@dataclass(frozen=True)
class NoOptions:
    """For architectures without hyperparameters of their own."""

    __pydantic_config__ = EDGE


def check_options(kind: type, given: Mapping[str, Any], architecture: str) -> Any:
    """An instance of the dataclass `kind` from values by name, texts from a command line among them.

    Raises UserError that names the option and, for an unknown one, lists those that there are.
    """
    known = [f.name for f in fields(kind)]
    for name in given:
        if name not in known:
            rest = f"its options are {', '.join(known)}" if known else "it has none"
            raise UserError(f"architecture {architecture} has no option {name!r}; {rest}")
    try:
        return cast(Any, TypeAdapter(kind)).validate_python(dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise UserError(
            f"option {name} of architecture {architecture} is {given[name]!r}: {first['msg']}; "
            f"change --set {name}"
        ) from error


def read_options(words: Sequence[str]) -> dict[str, Any]:
    """Values by name from words such as `l1=0.3`; a list is written `widths=64,256`.

    Raises UserError for a word without a name and for a name given twice.
    """
    found: dict[str, Any] = {}
    for word in words:
        name, sign, value = word.partition("=")
        name = name.strip().replace("-", "_")
        if not name or not sign:
            raise UserError(f"--set takes name=value, not {word!r}")
        if name in found:
            raise UserError(f"--set gives {name} twice; give it once")
        found[name] = value.split(",") if "," in value else value
    return found


def plain(options: Any) -> dict[str, Any]:
    """The dataclass as JSON values by name."""
    values = {f.name: getattr(options, f.name) for f in fields(options)}
    return cast("dict[str, Any]", json.loads(json.dumps(values)))
