"""What a sweep trains: every combination of sites, architectures, widths, k, options, rates and seeds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from unbraid.manifest.errors import UserError
from unbraid.sae.options import read_options
from unbraid.sae.registry import architecture
from unbraid.training.config import LoopOptions, TrainConfig
from unbraid.training.sources import Activations, Sources, choose_sources


@dataclass(frozen=True)
class Grid:
    """The values to combine."""

    arch: tuple[str, ...] = ("topk", "batchtopk")
    """Architectures that read one site and reconstruct it."""
    k: tuple[int, ...] = (32,)
    """Numbers of latents that fire, for the architectures that fix this."""
    width: tuple[int, ...] = (8192,)
    """Numbers of latents."""
    site: tuple[str, ...] = ()
    """Captured sites; all of them when left out."""
    set: tuple[str, ...] = ()
    """Architectures' own options, such as relu.l1=0.3; one given twice takes both values in turn."""
    lr: tuple[float, ...] = ()
    """Learning rates; the one that belongs to the width when left out."""
    seed: tuple[int, ...] = (0, 1, 2)
    """Seeds of the initial directions and of the order of the tokens; intervals are taken over them."""


@dataclass(frozen=True)
class Trial:
    """One autoencoder of a sweep."""

    point: str
    """What it is in short, without the seed: trials of one point are averaged."""
    sources: Sources
    """What it reads."""
    config: TrainConfig
    """How it is trained."""

    @property
    def name(self) -> str:
        """Its folder."""
        return f"{self.point}-seed{self.config.seed}"


def trials(grid: Grid, options: LoopOptions, store: Activations) -> list[Trial]:
    """Every combination once. Raises UserError for settings that cannot be trained with."""
    given = _by_architecture(grid)
    sites = grid.site or tuple(map(str, store.sites))
    found: dict[str, Trial] = {}
    for site, arch, width, lr, seed in product(sites, grid.arch, grid.width, grid.lr or (None,), grid.seed):
        kind = architecture(arch)
        if kind.reads != "site":
            raise UserError(f"a sweep compares what reconstructs the site it reads; train {arch} with train")
        sources = choose_sources([store], site, None, kind.reads, arch)
        for k, own in product(grid.k if kind.uses_k else (None,), _combinations(given[arch])):
            parts = [arch, f"w{width}", *([f"k{k}"] if k is not None else [])]
            parts += [f"{name}={_short(value)}" for name, value in own.items()]
            parts += [f"lr={lr:g}"] if lr is not None else []
            point = "-".join(([site] if len(sites) > 1 else []) + parts)
            config = TrainConfig(
                **asdict(options), lr=lr, seed=seed, architecture=arch, d_sae=width,
                k=TrainConfig.k if k is None else k, options=own,
            )  # fmt: skip
            config.check()
            trial = Trial(point, sources, config)
            found[trial.name] = trial
    if not found:
        raise UserError("the sweep is empty; give --arch, --width and --seed at least one value each")
    return list(found.values())


def _by_architecture(grid: Grid) -> dict[str, dict[str, list[Any]]]:
    """The values of every option of every architecture, from words such as `relu.l1=0.3`."""
    found: dict[str, dict[str, list[Any]]] = {arch: {} for arch in grid.arch}
    for word in grid.set:
        arch, dot, rest = word.partition(".")
        if not dot or arch not in found:
            raise UserError(
                f"--set {word}: name one of the sweep's architectures first, as in {grid.arch[0]}.name=value"
            )
        for name, value in read_options([rest]).items():
            found[arch].setdefault(name, []).append(value)
    return found


def _combinations(values: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    for chosen in product(*values.values()):
        yield dict(zip(values, chosen, strict=True))


def _short(value: Any) -> str:
    """An option's value as a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9.,+-]", "_", ",".join(value) if isinstance(value, list) else str(value))
