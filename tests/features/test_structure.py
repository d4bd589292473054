"""Kinds, clusters, opposites, parts and the map, each against brute force or what was planted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from unbraid.features import structure_clusters
from unbraid.features.page import Index
from unbraid.features.structure import Structure, StructureConfig, Wider, build_structure
from unbraid.features.structure_clusters import clusters_of
from unbraid.features.structure_geometry import antonyms, children, map_of, unit_rows
from unbraid.features.structure_kinds import Kinds, kinds_of
from unbraid.manifest.errors import UserError
from unbraid.manifest.record import check_files
from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.registry import build

from .handmade import Made, handmade

PASSAGES = [["start", *(f"w{(n * 7 + i) % 50}" for i in range(11)), "end"] for n in range(60)]


def _made() -> list[Made]:
    first = Made([(n, 0, 1.0) for n in range(60)], promoted=["up"], suppressed=["down"])
    last = Made([(n, 12, 1.0) for n in range(60)], promoted=["down"], suppressed=["up"])
    dense = Made([(n, i, 1.0) for n in range(60) for i in range(1, 12)])
    early = Made([(n, 1 + n % 3, 1.0) for n in range(60)])
    few = Made([(n, 0, 1.0) for n in range(5)])
    return [
        first,  # 0: position-bound and single-token
        last,  # 1: single-token
        dense,  # 2
        early,  # 3: position-bound
        few,  # 4: too few firings to say
        Made(),  # 5: dead
        Made([(n, 2 + n % 9, 1.0) for n in range(60)], coactive=[(7, 50)]),  # 6
        Made([(n, 2 + n % 9, 1.0) for n in range(55)]),  # 7
    ]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return handmade(tmp_path_factory.mktemp("structure") / "index", PASSAGES, _made())


def _sae(rows: np.ndarray) -> SAE:
    sae = build(SAEConfig("relu", rows.shape[1], len(rows)))
    with torch.no_grad():
        sae.W_dec.copy_(torch.from_numpy(rows).float())
    return sae


@pytest.fixture(scope="module")
def sae() -> SAE:
    rows = np.random.default_rng(0).standard_normal((8, 6))
    rows[1] = -2 * rows[0]
    return _sae(rows)


def test_kinds_are_what_was_planted(index: Index) -> None:
    found = kinds_of(index, Kinds())
    assert found[0] == ["position-bound", "single-token"] and found[1] == ["single-token"]
    assert found[2] == ["dense"] and found[3] == ["position-bound"]
    assert found[4] == [] and found[5] == ["dead"] and found[6] == []
    assert "single-token" in kinds_of(index, Kinds(fewest=5))[4]
    with pytest.raises(UserError, match="dense is 2"):
        Kinds(dense=2)


def test_where_all_texts_are_short_no_latent_is_bound_to_their_beginning(tmp_path: Path) -> None:
    short = [["a", "b", "c"]] * 40
    made = [Made([(n, 0, 1.0) for n in range(40)]), Made([(n, 1 + n % 2, 1.0) for n in range(40)])]
    assert kinds_of(handmade(tmp_path / "index", short, made), Kinds(dense=0.5)) == [["single-token"], []]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 25), share=st.floats(0.02, 0.6))
def test_clusters_are_those_of_average_linkage(seed: int, n: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    jaccard = np.triu(rng.uniform(0.01, 1, (n, n)) * (rng.random((n, n)) < share), 1)
    a, b = np.nonzero(jaccard)
    levels = (0.1, 0.3, 0.6)
    found = clusters_of(a, b, jaccard[a, b], n, levels)
    distance = 1 - jaccard - jaccard.T
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance, checks=False), "average")
    for level, least in enumerate(levels):
        wanted = fcluster(tree, 1 - least + 1e-12, "distance")
        same = wanted[:, None] == wanted[None, :]
        mine = found.of[:, level]
        np.testing.assert_array_equal(mine[:, None] == mine[None, :], same)
        assert all(mine[j] == np.flatnonzero(same[j])[0] for j in range(n))
        if level:  # each cluster lies in one of the level above
            parents = found.of[:, level - 1]
            assert all(len(set(parents[mine == name])) == 1 for name in set(mine.tolist()))


def test_a_piece_that_is_too_large_is_cut_at_its_weakest_links(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structure_clusters, "PIECE", 10)
    # Five tight groups of six in a chain of weak links.
    a, b, weight = [], [], []
    for group in range(5):
        members = range(group * 6, group * 6 + 6)
        for i in members:
            for j in members:
                if i < j:
                    a, b, weight = [*a, i], [*b, j], [*weight, 0.8 + 0.001 * (i + j)]
        if group:
            a, b, weight = [*a, group * 6 - 1], [*b, group * 6], [*weight, 0.05]
    found = clusters_of(np.array(a), np.array(b), np.array(weight), 30, (0.1, 0.5))
    assert found.largest == 30
    assert found.members(0) == found.members(1) == {6 * g: list(range(6 * g, 6 * g + 6)) for g in range(5)}
    none = np.empty(0, dtype=np.int64)
    assert clusters_of(none, none, np.empty(0), 3, (0.5,)).members(0) == {}


def test_all_links_alike_end_somewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structure_clusters, "PIECE", 4)
    n = np.arange(20)
    found = clusters_of(n[:-1], n[1:], np.full(19, 0.5), 20, (0.2,))
    assert found.largest == 20 and found.of.shape == (20, 1)


def test_antonyms_are_all_pairs_that_point_apart(
    index: Index, sae: SAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = unit_rows(sae).numpy()
    alive = [0, 1, 2, 3, 4, 6, 7]
    wanted = {(a, b) for a in alive for b in alive if a < b and rows[a] @ rows[b] <= -0.3}
    for block in (1024, 2):
        monkeypatch.setattr("unbraid.features.structure_geometry.BLOCK", block)
        found = antonyms(sae, index, -0.3)
        assert {(row["a"], row["b"]) for row in found} == wanted
        assert (found[0]["a"], found[0]["b"], found[0]["tokens"]) == (0, 1, ["down", "up"])
        assert found[0]["cosine"] == pytest.approx(-1, abs=1e-6)
        assert [row["cosine"] for row in found] == sorted(row["cosine"] for row in found)


def test_parts_of_a_latent_are_the_nearest_of_the_wider_decoder(sae: SAE) -> None:
    rng = np.random.default_rng(1)
    rows = sae.W_dec.detach().numpy()
    parts = np.concatenate([rows[2] + 0.3 * rng.standard_normal((3, 6)), rng.standard_normal((9, 6))])
    found = children(sae, _sae(parts), 0.5, 4)
    cosines = unit_rows(sae).numpy() @ unit_rows(_sae(parts)).numpy().T
    for latent in range(8):
        mine = [(row["child"], row["cosine"]) for row in found if row["latent"] == latent]
        order = [int(c) for c in np.argsort(-cosines[latent])[:4] if cosines[latent, c] >= 0.5]
        assert [child for child, _ in mine] == order
        np.testing.assert_allclose([value for _, value in mine], cosines[latent, order], atol=1e-6)
    assert {row["child"] for row in found if row["latent"] == 2} >= {0, 1, 2}
    with pytest.raises(UserError, match="name a wider one"):
        children(sae, sae, 0.5, 4)
    with pytest.raises(UserError, match="the same model and site"):
        children(sae, _sae(np.ones((20, 5))), 0.5, 4)


def test_the_map_is_the_same_every_time_and_keeps_groups_together() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(rng.standard_normal((3, 12)), 20, axis=0)
    sae = _sae(groups + 0.1 * rng.standard_normal((60, 12)))
    alive = np.ones(60, bool)
    alive[59] = False
    xy, how = map_of(sae, alive, 100, 0)
    assert how == "t-SNE" and np.isfinite(xy).all() and not xy[59].any()
    np.testing.assert_array_equal(map_of(sae, alive, 100, 0)[0], xy)
    assert _nearest_is_of_its_group(xy[:59])
    flat, how = map_of(sae, alive, 10, 0)
    assert how == "principal components" and _nearest_is_of_its_group(flat[:59])
    rows = unit_rows(sae).numpy()[:59]
    spread = np.linalg.svd(rows - rows.mean(0), compute_uv=False)
    np.testing.assert_allclose(np.linalg.norm(flat[:59], axis=0), spread[:2], rtol=1e-4)
    assert map_of(sae, alive & (np.arange(60) < 3), 100, 0)[1] == "none"


def _nearest_is_of_its_group(xy: np.ndarray) -> bool:
    distance = np.linalg.norm(xy[:, None] - xy[None, :], axis=2)
    np.fill_diagonal(distance, np.inf)
    return bool((distance.argmin(axis=1) // 20 == np.arange(len(xy)) // 20).all())


def test_the_artifact_says_all_of_it(index: Index, sae: SAE, tmp_path: Path) -> None:
    wider = Wider(_sae(np.concatenate([sae.W_dec.detach().numpy(), np.eye(6)])), "wider")
    made = build_structure(index, sae, tmp_path / "structure", wider=wider)
    assert check_files(made.folder).kind == "structure"
    again = build_structure(index, sae, tmp_path / "again", wider=wider)
    assert again.manifest.files == made.manifest.files
    place = Structure(made.folder).of(0)
    assert place.kinds == ("position-bound", "single-token") and place.x is not None
    assert place.antonyms[0][0] == 1 and place.children[0] == (0, pytest.approx(1, abs=1e-6))
    assert made.of(1).antonyms[0][0] == 0 and made.of(5).x is None
    assert made.of(6).clusters == made.of(7).clusters == (6, 6, 6)
    assert made.kind("dead") == [5] and made.manifest.facts["kinds"]["dead"] == 1
    clusters = made.table("clusters").to_pylist()
    assert [(row["level"], row["cluster"], row["parent"], row["size"]) for row in clusters] == [
        (0, 6, None, 2), (1, 6, 6, 2), (2, 6, 6, 2),
    ]  # fmt: skip
    assert set(made.manifest.inputs) == {"index", "sae", "wider"}
    with pytest.raises(UserError, match="no kind 'odd'"):
        made.kind("odd")
    with pytest.raises(UserError, match="latent 8 does not exist"):
        made.of(8)
    narrow = build_structure(index, sae, tmp_path / "narrow", StructureConfig(compared=3))
    assert narrow.manifest.facts["antonyms"] is None and narrow.table("children").num_rows == 0
    with pytest.raises(UserError, match="name the SAE that it was made from"):
        build_structure(index, wider.sae, tmp_path / "other")
    with pytest.raises(UserError, match="levels must rise"):
        StructureConfig(levels=(0.5, 0.1))
