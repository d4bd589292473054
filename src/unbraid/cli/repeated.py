"""Options of several values given more than once: their values count together, instead of the last alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints


def together(words: Sequence[str], options: Any) -> list[str]:
    """Words in which an option of several values stands once, where it was first, with all its values.

    `--seed 0 --seed 1` becomes `--seed 0 1`. Of an option with one value the last counts, as usual; those
    that take a group of values each time (`UseAppendAction`) stay as they are. `options`: a dataclass, or a
    union of some.
    """
    groups: list[list[str]] = [[]]
    for word in words:
        if word.startswith("--"):
            groups.append([])
        groups[-1].append(word)
    first, several = dict[str, list[str]](), set(_several(options))
    for group in groups:
        name, sign, value = (group or [""])[0].partition("=")
        same = first.setdefault(name.replace("_", "-"), group)
        if same is not group and name.replace("_", "-") in several:
            if "=" in same[0]:
                same[:1] = same[0].split("=", 1)
            same += [value, *group[1:]] if sign else group[1:]
            group.clear()
    return [word for group in groups for word in group]


def _several(kind: Any) -> Iterator[str]:
    """Names of the options, also of dataclasses inside, that take several values at once."""
    if isinstance(kind, type) and is_dataclass(kind):
        for field in fields(kind):
            if str(field.type).startswith("tuple["):
                yield "--" + field.name.replace("_", "-")
        for hint in get_type_hints(kind).values():
            yield from _several(hint)
    else:
        for part in get_args(kind):
            yield from _several(part)
