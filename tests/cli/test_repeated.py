"""Options given more than once."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass, field

import pytest
import tyro

from unbraid import cli
from unbraid.cli.repeated import together


@dataclass(frozen=True)
class Inner:
    """A part."""

    seed: tuple[int, ...] = (0, 1, 2)
    """Seeds."""
    pair: tyro.conf.UseAppendAction[tuple[tuple[int, int], ...]] = ()
    """Pairs."""


@dataclass(frozen=True)
class Options:
    """Options with a part."""

    sae: tuple[str, ...]
    """Some."""
    k_min: int = 1
    """One."""
    json: bool = False
    """A flag."""
    inner: Inner = field(default_factory=Inner)
    """A part."""


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("--sae a --json --sae b c", "--sae a b c --json"),
        ("--sae=a=1 --json --sae=b=2 --sae c --seed 3", "--sae a=1 b=2 c --json --seed 3"),
        ("--pair 1 2 --seed 0 --pair 3 4 --seed -1", "--pair 1 2 --seed 0 -1 --pair 3 4"),
        ("--k-min 1 --k-min 2", "--k-min 1 --k-min 2"),
        ("check --sae=a --k-min=-1", "check --sae=a --k-min=-1"),
        ("x --seed 0 --seed 1", "x --seed 0 1"),
        ("--json --json", "--json --json"),
        ("", ""),
    ],
)
def test_values_of_one_option_stand_together(given: str, wanted: str) -> None:
    assert together(given.split(), Options) == wanted.split()
    assert together(given.split(), Options | Inner) == wanted.split()


def test_none_is_dropped_by_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Options] = []

    module = types.ModuleType("unbraid_try")
    module.Options, module.run = Options, seen.append  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "unbraid_try", module)
    monkeypatch.setitem(cli.VERBS, "try", cli.Verb("unbraid_try", "try something"))
    assert cli.main(["try", "--sae", "a", "--seed", "5", "--sae", "b", "--seed", "7"]) == 0
    assert seen == [Options(("a", "b"), inner=Inner((5, 7)))]
    assert cli.main(["try", "--sae", "a", "--k-min", "2", "--k-min", "3"]) == 0
    assert seen[1] == Options(("a",), k_min=3)
