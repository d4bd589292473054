"""A sweep's grid: every combination once, under a name of its own, and mistakes named."""

from __future__ import annotations

import pytest

from unbraid.activations.store import ActivationStore
from unbraid.manifest.errors import UserError
from unbraid.training.config import LoopOptions
from unbraid.training.grid import Grid, trials

LOOP = LoopOptions(steps=7, batch_size=64)


def test_every_combination_comes_once(store: ActivationStore) -> None:
    grid = Grid(
        arch=("topk", "relu", "topk"),
        k=(4, 8),
        width=(32, 64),
        set=("relu.l1=0.5", "relu.l1=2"),
        lr=(0.01, 0.001),
        seed=(3, 4),
    )
    found = trials(grid, LOOP, store)
    assert len(found) == 2 * (2 * 2 * 2 + 2 * 2 * 2)  # topk with each k, relu with each price
    assert len({t.name for t in found}) == len(found)
    one = next(t for t in found if t.name == "topk-w64-k8-lr=0.001-seed4")
    assert (one.config.d_sae, one.config.k, one.config.lr, one.config.seed) == (64, 8, 0.001, 4)
    assert (one.config.steps, one.config.batch_size) == (7, 64)
    priced = next(t for t in found if t.name == "relu-w32-l1=2-lr=0.01-seed3")
    assert priced.point == "relu-w32-l1=2-lr=0.01" and priced.config.options == {"l1": "2"}


def test_without_rates_each_width_has_its_own(store: ActivationStore) -> None:
    narrow, wide = trials(Grid(arch=("topk",), width=(1024, 4096), seed=(0,)), LOOP, store)
    assert narrow.config.peak_lr == 2 * wide.config.peak_lr


def test_values_make_no_paths(store: ActivationStore) -> None:
    grid = Grid(arch=("matryoshka",), width=(64,), k=(4,), set=("matryoshka.widths=16,64",), seed=(0,))
    (trial,) = trials(grid, LOOP, store)
    assert trial.name == "matryoshka-w64-k4-widths=16,64-seed0"
    for word in ("relu.l1=../../1", "relu.l1=1/2"):
        with pytest.raises(UserError, match="option l1"):
            trials(Grid(arch=("relu",), set=(word,)), LOOP, store)


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        (Grid(arch=("topq",)), "'topq' is not known"),
        (Grid(arch=("transcoder",)), "train transcoder with train"),
        (Grid(arch=("relu",), set=("l1=0.5",)), "as in relu.name=value"),
        (Grid(arch=("relu",), set=("topk.l1=0.5",)), "as in relu.name=value"),
        (Grid(arch=("relu",), set=("relu.l2=0.5",)), "no option 'l2'"),
        (Grid(k=(100,), width=(32,)), "k is 100"),
        (Grid(site=("layers.9.resid_post",)), "holds no site"),
        (Grid(seed=()), "sweep is empty"),
        (Grid(arch=()), "sweep is empty"),
    ],
)
def test_mistakes_are_named(store: ActivationStore, grid: Grid, words: str) -> None:
    with pytest.raises(UserError, match=words):
        trials(grid, LOOP, store)
