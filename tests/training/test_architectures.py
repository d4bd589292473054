"""Every architecture learns planted structure, is saved and loaded, and can be gone on with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from unbraid.activations.filling import COLUMNS
from unbraid.activations.store import ActivationStore
from unbraid.activations.stream import batches
from unbraid.manifest.errors import UserError
from unbraid.manifest.record import check_files, write_manifest
from unbraid.sae.base import SAE
from unbraid.training.config import TrainConfig
from unbraid.training.trainer import train

SMALL = TrainConfig(
    d_sae=96,
    k=4,
    lr=1e-2,
    steps=120,
    batch_size=256,
    checkpoint_every=40,
    log_every=30,
    calibration_tokens=2048,
)
SITES = ("layers.0.resid_post", "layers.1.resid_post", "layers.2.resid_post")


@pytest.fixture(scope="module")
def several(
    tmp_path_factory: pytest.TempPathFactory, planted: Callable[..., Any]
) -> Callable[[str], ActivationStore]:
    """Captures of the same 6,000 tokens at three sites, each a linear map of the same sparse causes."""
    x = planted(6000)
    rng = np.random.default_rng(1)
    maps = [np.eye(24), *(np.linalg.qr(rng.normal(size=(24, 24)))[0] for _ in range(2))]
    root = tmp_path_factory.mktemp("several")

    def make(name: str, scale: float = 1.0, shift: int = 0) -> ActivationStore:
        folder = root / name
        if folder.exists():
            return ActivationStore(folder)
        folder.mkdir()
        for shard, start in enumerate(range(0, len(x), 2048)):
            rows = x[start : start + 2048]
            sites = {
                site: torch.from_numpy((scale * rows @ m).astype(np.float32))
                for site, m in zip(SITES, maps, strict=True)
            }
            numbers = torch.arange(len(rows), dtype=torch.int32) + shift
            columns = {column: numbers.clone() for column in COLUMNS}
            save_file({**sites, **columns}, folder / f"shard-{shard:05d}.safetensors")
        (folder / "documents.jsonl").write_text('{"id": "a", "tokens": 1, "captured": 1}\n')
        facts = {"model": name, "sites": list(SITES), "d_in": 24, "tokens": len(x), "documents": 1}
        facts |= {"context": 256, "positions": "all", "dtype": "float32", "shard_tokens": 2048}
        inputs = {"model": "m" * 64, "tokenizer": "t" * 64}
        write_manifest(folder, kind="activations", command="", seed=0, inputs=inputs, facts=facts)
        return ActivationStore(folder)

    return make


def _fvu(sae: SAE, x: torch.Tensor, y: torch.Tensor) -> float:
    return float((y - sae(x).x_hat).square().sum() / (y - y.mean(dim=0)).square().sum())


ONE_SITE = {
    "jumprelu": ({"l0": 0.1}, "jumprelu"),
    "jumprelu, tanh": ({"l0": 0.1, "penalty": "tanh", "through_encoder": True}, "jumprelu"),
    "gated": ({"l1": 1.5}, "gated"),
    "matryoshka": ({"widths": (48,)}, "jumprelu"),
    "matryoshka_jumprelu": ({"l0": 0.1, "widths": (48,)}, "jumprelu"),
    "matching_pursuit": ({}, "matching_pursuit"),
    "lista": ({"iterations": 2}, "lista"),
}


@pytest.mark.parametrize("name", ONE_SITE)
def test_one_site(store: ActivationStore, tmp_path: Path, name: str) -> None:
    options, ready = ONE_SITE[name]
    config = replace(SMALL, architecture=name.split(",")[0], options=options)
    sae = train(store, None, config, tmp_path / "sae")
    (x,) = batches(store, store.sites[0], 4000, seed=5, steps=1)
    again = SAE.from_pretrained(tmp_path / "sae")
    assert again.config == sae.config and again.config.architecture == ready
    assert torch.equal(again(x).x_hat, sae(x).x_hat)
    l0 = float(sae.encode(x).l0().double().mean())
    assert _fvu(sae, x, x) < 0.2 and 1 < l0 < 24
    recorded = check_files(tmp_path / "sae").facts["train"]["options"]
    assert all(recorded[key] == (list(v) if isinstance(v, tuple) else v) for key, v in options.items())


@pytest.mark.parametrize("name", ["relu", *(name for name in ONE_SITE if name != "matryoshka")])
def test_products_of_bfloat16_learn_the_same(store: ActivationStore, tmp_path: Path, name: str) -> None:
    options, _ = ONE_SITE.get(name, ({}, ""))
    (x,) = batches(store, store.sites[0], 4000, seed=5, steps=1)
    fvu: dict[str, float] = {}
    for precision in ("float32", "bf16"):
        config = replace(SMALL, architecture=name.split(",")[0], options=options, kernels="plain")
        sae = train(store, None, replace(config, precision=precision), tmp_path / precision)
        assert all(p.dtype == torch.float32 for p in sae.state_dict().values())
        fvu[precision] = _fvu(sae, x, x)
    assert fvu["bf16"] != fvu["float32"] and abs(fvu["bf16"] - fvu["float32"]) < 0.02


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("transcoder", {}),
        ("skip_transcoder", {}),
        ("jumprelu_transcoder", {"l0": 0.1}),
        ("topk_transcoder", {}),
    ],
)
def test_a_transcoder(
    several: Callable[[str], ActivationStore], tmp_path: Path, architecture: str, options: dict[str, Any]
) -> None:
    store = several("one")
    config = replace(SMALL, architecture=architecture, options=options)
    sae = train(store, SITES[0], config, tmp_path / "sae", target_site=SITES[1])
    x, y = (next(batches(store, site, 4000, seed=5, steps=1)) for site in SITES[:2])
    again = SAE.from_pretrained(tmp_path / "sae")
    assert again.config == sae.config and torch.equal(again(x).x_hat, sae(x).x_hat)
    assert (str(sae.site), sae.config.target_site) == SITES[:2]
    assert _fvu(sae, x, y) < (0.05 if architecture == "skip_transcoder" else 0.25)
    with pytest.raises(UserError, match="target-site"):
        train(store, SITES[0], config, tmp_path / "other")


def test_a_crosscoder_of_layers_and_of_models(
    several: Callable[..., ActivationStore], tmp_path: Path
) -> None:
    one, other = several("one"), several("other", scale=3.0)
    config = replace(SMALL, architecture="crosscoder", options={"l1": 0.2})
    for stores, sites in (([one], SITES[:2]), ([one, other], (SITES[0],))):
        sae = train(stores, sites, config, tmp_path / f"sae{len(stores)}")
        parts = [next(batches(s, site, 4000, seed=5, steps=1)) for s in stores for site in sites]
        x = torch.cat(parts, dim=1)
        again = SAE.from_pretrained(tmp_path / f"sae{len(stores)}")
        assert again.config == sae.config and torch.equal(again(x).x_hat, sae(x).x_hat)
        assert _fvu(sae, x, x) < 0.25
    with pytest.raises(UserError, match="differ from row 0"):
        train([one, several("shifted", shift=1)], SITES[0], config, tmp_path / "no")
    with pytest.raises(UserError, match="several sites"):
        train(one, SITES[0], config, tmp_path / "no")


def test_a_cross_layer_transcoder(several: Callable[[str], ActivationStore], tmp_path: Path) -> None:
    store = several("one")
    config = replace(SMALL, architecture="clt", options={"l0": 0.1})
    sae = train(store, SITES[:2], config, tmp_path / "sae", target_site=SITES[1:])
    x, y = (
        torch.cat([next(batches(store, site, 4000, seed=5, steps=1)) for site in sites], dim=1)
        for sites in (SITES[:2], SITES[1:])
    )
    again = SAE.from_pretrained(tmp_path / "sae")
    assert again.config == sae.config and torch.equal(again(x).x_hat, sae(x).x_hat)
    stored = load_file(tmp_path / "sae" / "sae_weights.safetensors")
    assert _fvu(sae, x, y) < 0.4 and stored["W_dec"].shape == (96 + 48, 24)


def test_resampling_revives_and_the_rise_of_dead_latents_is_said_once(
    store: ActivationStore, tmp_path: Path
) -> None:
    class Stop(Exception):
        pass

    dead: dict[int, float] = {}
    for every in (0, 20):
        config = replace(
            SMALL, architecture="relu", options={"l1": 12.0}, dead_after=1000, log_every=10,
            resample_every=every, checkpoint_every=15,
        )  # fmt: skip
        notes: list[str] = []
        train(store, None, config, tmp_path / f"a{every}", progress=lambda *a: notes.append(a[2]))  # noqa: B023
        lines = (tmp_path / f"a{every}" / "log.jsonl").read_text().splitlines()
        said = [line for line in lines if '"note"' in line]
        dead[every] = check_files(tmp_path / f"a{every}").facts["dead"]
        if not every:
            assert len(said) == 1 and "--set l1" in said[0] and any("has risen" in note for note in notes)

        def stop(done: int, total: int, note: str = "") -> None:
            if done == 70:
                raise Stop

        with pytest.raises(Stop):
            train(store, None, config, tmp_path / f"b{every}", progress=stop)
        train(store, None, config, tmp_path / f"b{every}")
        for path in (tmp_path / f"a{every}").iterdir():
            assert path.read_bytes() == (tmp_path / f"b{every}" / path.name).read_bytes(), path.name
    assert dead[20] < dead[0]


def test_a_resumed_jumprelu_is_the_undisturbed_one(store: ActivationStore, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int, note: str = "") -> None:
        if done == 70:
            raise Stop

    config = replace(SMALL, architecture="jumprelu", options={"l0": 0.3}, dead_after=2000)
    train(store, None, config, tmp_path / "whole")
    with pytest.raises(Stop):
        train(store, None, config, tmp_path / "resumed", progress=stop)
    train(store, None, config, tmp_path / "resumed")
    weights = [load_file(tmp_path / n / "sae_weights.safetensors") for n in ("whole", "resumed")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
