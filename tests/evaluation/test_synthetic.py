"""The planted world: SAELens's process, random numbers of our own, the same samples however asked for."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.sparse import vstack

from unbraid.activations.store import ActivationStore
from unbraid.evaluation import synthetic
from unbraid.evaluation.synthetic import BLOCK, SITE, TRUTH, Planted, PlantedConfig, read_world, write_world
from unbraid.manifest.errors import IntegrityError, UserError
from unbraid.manifest.record import check_files
from unbraid.training.run import first_weights

SMALL = PlantedConfig(features=120, d_in=24, seed=3)


@pytest.fixture(scope="module")
def world() -> Planted:
    return Planted.draw(SMALL)


@pytest.fixture(scope="module")
def codes(world: Planted) -> NDArray[np.float32]:
    """How strongly the features fire at 12 blocks of samples, (12 BLOCK, F)."""
    return vstack([world.block("train", i)[1] for i in range(12)]).toarray()


def off_diagonal(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    gram = rows.astype(np.float64) @ rows.T
    return gram - np.diag(np.diag(gram))


def test_more_directions_than_dimensions_are_as_orthogonal_as_can_be(world: Planted) -> None:
    F, d = world.directions.shape
    assert np.linalg.norm(world.directions, axis=1) == pytest.approx(1, abs=1e-6)
    # Welch's bound: no F unit vectors have a smaller sum of squared products.
    assert np.square(off_diagonal(world.directions)).sum() == pytest.approx(F * F / d - F, rel=1e-5)


def test_fewer_directions_than_dimensions_are_orthogonal() -> None:
    few = Planted.draw(PlantedConfig(features=10, d_in=24))
    assert np.abs(off_diagonal(few.directions)).max() < 1e-6


def test_the_planted_directions_are_nobodys_first_weights(world: Planted) -> None:
    seed, shape = SMALL.seed, world.directions.shape
    for generator in (first_weights(seed), torch.Generator().manual_seed(seed)):
        rows = torch.randn(shape, generator=generator).numpy()
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        # A seed that both share gave a cosine of 0.96 once; chance alone gives these.
        assert np.abs((rows * world.directions).sum(axis=1)).mean() < 0.25
    numpys = np.random.default_rng(seed).standard_normal(shape)
    numpys /= np.linalg.norm(numpys, axis=1, keepdims=True)
    assert np.abs((numpys * world.directions).sum(axis=1)).mean() < 0.25


@settings(deadline=None, max_examples=8)
@given(st.integers(0, 3 * BLOCK), st.integers(1, 3 * BLOCK))
def test_a_sample_depends_on_its_number_alone(start: int, more: int) -> None:
    tiny = Planted.draw(PlantedConfig(features=30, d_in=8))
    whole = np.concatenate([tiny.block("fit", i)[0] for i in range(6)])
    parts = [x for x, _ in tiny.batches("fit", start + more, start=start)]
    assert np.array_equal(np.concatenate(parts), whole[start : start + more])


def test_streams_and_seeds_share_no_sample(world: Planted) -> None:
    other = Planted.draw(PlantedConfig(features=120, d_in=24, seed=4))
    drawn = [world.block(stream, 0)[0] for stream in synthetic.STREAMS]
    drawn += [world.block("train", 1)[0], other.block("train", 0)[0]]
    for i, first in enumerate(drawn):
        for second in drawn[i + 1 :]:
            assert not ((first == second).all(axis=1) & (first != 0).any(axis=1)).any()  # some fire nothing


def test_activations_are_sums_of_the_features_that_fire(world: Planted) -> None:
    x, fired = world.block("train", 0)
    assert x == pytest.approx(fired.toarray() @ world.directions, abs=1e-4)


def test_children_need_parents_and_siblings_exclude_each_other(world: Planted, codes) -> None:
    parent = world.parent
    assert (parent[:85] >= 0).sum() == 84 and (parent[85:] == -1).all()  # one tree of 1 + 4 + 16 + 64
    assert (np.bincount(parent[parent >= 0])[:21] == 4).all()
    children = np.flatnonzero(parent >= 0)
    assert (codes[:, parent[children]][codes[:, children] > 0] > 0).all()
    for family in range(21):
        assert ((codes[:, parent == family] > 0).sum(axis=1) <= 1).all()
        assert (codes[:, parent == family] > 0).any()


def test_a_childs_magnitude_scales_with_its_parents(world: Planted, codes) -> None:
    # Of many samples: E[child | parent = v] is proportional to v.
    strong = world.parent == 0
    on = (codes[:, strong] > 0).any(axis=1)
    parent, child = codes[on, 0], codes[on][:, strong].sum(axis=1)
    above = parent > np.median(parent)
    ratio = child[above].mean() / child[~above].mean()
    assert ratio == pytest.approx(parent[above].mean() / parent[~above].mean(), rel=0.05)


def saelens_generator(features: int, d_in: int):
    os.environ.setdefault("TQDM_DISABLE", "1")
    synthetic_data = pytest.importorskip("sae_lens.synthetic")
    return synthetic_data.SyntheticModel(
        synthetic_data.SyntheticModelConfig(
            num_features=features,
            hidden_dim=d_in,
            firing_probability=synthetic_data.ZipfianFiringProbabilityConfig(0.5, 0.4, 5e-4),
            hierarchy=synthetic_data.HierarchyConfig(
                total_root_nodes=1,
                branching_factor=4,
                max_depth=3,
                mutually_exclusive_portion=1.0,
                compensate_probabilities=True,
                scale_children_by_parent=True,
            ),
            orthogonalization=synthetic_data.OrthogonalizationConfig(),
            correlation=synthetic_data.LowRankCorrelationConfig(rank=25, correlation_scale=0.1),
            std_firing_magnitudes=synthetic_data.FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
            mean_firing_magnitudes=synthetic_data.LinearMagnitudeConfig(start=5.0, end=4.0),
            seed=0,
        )
    )


def test_the_process_is_saelenss(world: Planted, codes) -> None:
    theirs = saelens_generator(SMALL.features, SMALL.d_in)
    generator = theirs.activation_generator
    assert world.drawn == pytest.approx(generator.firing_probabilities.numpy(), rel=1e-5)
    assert world.mean == pytest.approx(generator.mean_firing_magnitudes.numpy(), rel=1e-6)
    # The same frame potential; theirs goes there by 200 steps of Adam.
    found, reached = (
        np.square(off_diagonal(w)).sum()
        for w in (world.directions, theirs.feature_dict.feature_vectors.detach().numpy())
    )
    assert (1 - 1e-6) * found <= reached <= 1.05 * found
    # What the two draw with their own random numbers: spreads of magnitude are given to both.
    generator.std_firing_magnitudes = torch.from_numpy(world.deviation)
    generator.low_rank_correlation = (
        torch.from_numpy(world.factor),
        torch.from_numpy(np.sqrt(1 - np.square(world.factor).sum(axis=1))),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        drawn = torch.cat([generator.sample(BLOCK) for _ in range(12)]).numpy()
    n = len(codes)
    p, q = (codes > 0).mean(axis=0), (drawn > 0).mean(axis=0)
    error = np.sqrt((p + q) / 2 * (1 - (p + q) / 2) * 2 / n)
    z = (p - q)[error > 0] / error[error > 0]
    assert np.abs(z).max() < 4.5 and z.std() == pytest.approx(1, abs=0.25)
    assert (codes > 0).sum(axis=1).mean() == pytest.approx((drawn > 0).sum(axis=1).mean(), rel=0.04)
    assert (codes > 0).sum(axis=1).std() == pytest.approx((drawn > 0).sum(axis=1).std(), rel=0.06)
    for level in (world.parent == -1, world.parent == 0, (world.parent > 0) & (world.parent < 5)):
        ours, other = codes[:, level], drawn[:, level]
        for moment in (1, 2):
            assert (ours[ours > 0] ** moment).mean() == pytest.approx(
                (other[other > 0] ** moment).mean(), rel=0.06
            )


def test_it_is_a_capture_that_can_be_trained_on_and_checked(tmp_path: Path, world: Planted) -> None:
    store = write_world(SMALL, tmp_path / "w", 3000)
    check_files(tmp_path / "w")
    truth, identity = read_world(tmp_path / "w")
    assert store.model_id == identity and store.n_tokens == 3000 and store.n_documents == 3
    assert np.array_equal(truth.directions, world.directions) and truth.config == SMALL
    rows = torch.cat([store.read(SITE, i).float() for i in range(len(store.shards))])
    wanted = np.concatenate([x for x, _ in world.batches("train", 3000)])
    assert np.array_equal(rows.numpy(), wanted.astype(np.float16).astype(np.float32))
    assert store.manifest.facts["active"] == pytest.approx(world.l0())


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "SHARD", 2 * BLOCK)

    def killed(done: int, total: int, note: str = "") -> None:
        if done >= 3 * BLOCK:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_world(SMALL, tmp_path / "w", 5000, progress=killed)
    write_world(SMALL, tmp_path / "w", 5000)
    write_world(SMALL, tmp_path / "whole", 5000)
    files = {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}
    assert {p.name: p.read_bytes() for p in (tmp_path / "w").iterdir()} == files
    ActivationStore(tmp_path / "w", check=True)


def test_mistakes_are_named(tmp_path: Path) -> None:
    for wrong in ({"features": 0}, {"seed": -1}, {"most": 1.0}, {"depth": -1}):
        with pytest.raises(UserError):
            PlantedConfig(**wrong)
    with pytest.raises(UserError, match="--samples is 0"):
        write_world(SMALL, tmp_path / "w", 0)
    write_world(SMALL, tmp_path / "w", 10)
    damaged = tmp_path / "w" / TRUTH
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"abcd")
    with pytest.raises(IntegrityError, match="plant the world again"):
        read_world(tmp_path / "w")
    damaged.unlink()
    with pytest.raises(UserError, match="holds no planted world"):
        read_world(tmp_path / "w")
