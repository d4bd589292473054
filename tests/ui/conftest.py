"""A folder to browse: an index whose text is as hostile as text can be, and what belongs to it."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient

from unbraid.features.page import Index
from unbraid.features.structure import StructureConfig, Wider, build_structure
from unbraid.features.structure_kinds import Kinds
from unbraid.manifest.record import write_manifest
from unbraid.model.load import LanguageModel, load_model
from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.registry import build
from unbraid.ui.app import create_app
from unbraid.ui.shelf import Shelf, Source
from unbraid.ui.workbench import Limits, Workbench

from ..features.handmade import Made, handmade

SITE = "layers.1.resid_post"
D_SAE = 96
SCRIPT = '<script>window.pwned=1</script><img src=x onerror="window.pwned=1">'
RTL = "שלום"
OVERRIDE = "\u202eevil\u202c"
LONG = "x" * 10_000
PASSAGES = [
    ["the", " delayed", " package", "\n", " was", " a", " red", " ball", ".", " wait", " here"] * 4,
    [SCRIPT, " and", f" {SCRIPT}", "</title>", "&amp;", "'", '"', "{{ 7*7 }}", "${7*7}"] * 2,
    [RTL, " עולם", " ", "مرحبا", OVERRIDE, "👩‍👩‍👧", "🇪🇺", "\u0000", "\u0007", "\t", "é", "\ufffd"] * 2,
    ["before", LONG, "after", " ", ""],
    ["the", " delayed", " package", " was", " lost"],
]


@dataclass
class World:
    """What the tests browse."""

    folder: Path
    shelf: Shelf
    bench: Workbench
    lm: LanguageModel
    sae: SAE

    @property
    def source(self) -> Source:
        return next(s for s in self.shelf.sources if s.name == "index")

    @property
    def base(self) -> str:
        return f"/i/{self.source.key}"

    @property
    def empty(self) -> str:
        return next(f"/i/{s.key}" for s in self.shelf.sources if s.name == "empty")


@pytest.fixture(scope="session")
def lm(tiny_llama: Path) -> LanguageModel:
    return load_model(tiny_llama)


@pytest.fixture(scope="session")
def sae(lm: LanguageModel) -> SAE:
    generator = torch.Generator().manual_seed(0)
    sae = build(SAEConfig(architecture="topk", d_in=lm.d_in, d_sae=D_SAE, k=6, site=SITE, model_id=lm.id))
    with torch.no_grad():
        directions = torch.randn(D_SAE, lm.d_in, generator=generator)
        sae.W_dec.copy_(directions / directions.norm(dim=1, keepdim=True))
        sae.W_enc.copy_(sae.W_dec.T)
    return sae


def wider_sae(sae: SAE) -> SAE:
    """Its latents but the third, and four more, two of which point where that one does."""
    wide = build(dataclasses.replace(sae.config, d_sae=D_SAE + 4))
    with torch.no_grad():
        rows = sae.W_dec
        wide.W_dec[:D_SAE] = rows
        wide.W_dec[D_SAE:] = -rows[3]
        wide.W_dec[3], wide.W_dec[97], wide.W_dec[98] = -rows[3], rows[3], (rows[3] + rows[4] / 2) / 1.2
    return wide


def make_index(folder: Path, sae_id: str, lm: LanguageModel, wide_id: str) -> Index:
    """An index in which a latent fires on ordinary text, some on hostile text, and most never."""

    def fires(passage: int, every: int = 1, first: int = 0) -> list[tuple[int, int, float]]:
        places = range(first, len(PASSAGES[passage]), every)
        return sorted(((passage, i, 4.0 - 0.07 * i) for i in places), key=lambda f: -f[2])

    latents = [Made() for _ in range(D_SAE)]
    promoted = [SCRIPT, RTL, OVERRIDE, "👩‍👩‍👧", LONG, " mg", "", "\n"]
    latents[3] = Made([*fires(0, 4, 2), (4, 2, 1.5)], [" refund", " package"], [" no"], [(5, 2)], [(5, 0.9)])
    latents[3].beside = [(wide_id, 98, 0.8), ("an autoencoder elsewhere", 2, 0.7)]
    latents[5] = Made(fires(1), promoted, promoted[::-1], [(3, 2)], [(3, 0.9), (6, 0.5)])
    latents[6] = Made(fires(2), promoted, promoted)
    latents[7] = Made(fires(3), promoted[:2], promoted[2:])
    latents[8] = Made([(0, i, 1.0) for i in (11, 22, *range(11))], [" the"], [" a"])
    inputs = {"sae": sae_id, "model": lm.id, "tokenizer": lm.tokenizer_id}
    return handmade(folder, PASSAGES, latents, inputs=inputs)


def make_wider(folder: Path, sae_id: str, lm: LanguageModel) -> Index:
    """An index of the same text in which latent 3 is two: what fires on " package" and on the rest."""
    latents = [Made() for _ in range(D_SAE + 4)]
    places = [i for i in range(2, len(PASSAGES[0]), 4)]
    latents[97] = Made([(0, i, 2.0) for i in places[::2]])
    latents[98] = Made([(0, i, 2.0) for i in places[1::2]])
    return handmade(folder, PASSAGES, latents, inputs={"sae": sae_id, "model": lm.id})


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, lm: LanguageModel, sae: SAE) -> World:
    folder = tmp_path_factory.mktemp("browsed")
    sae.save_pretrained(folder / "sae")
    made = write_manifest(folder / "sae", kind="sae", command="", seed=0, inputs={"model": lm.id}, facts={})
    wide = wider_sae(sae)
    wider = make_wider(folder / "wider", "a wider autoencoder", lm)
    index = make_index(folder / "index", made.id, lm, "a wider autoencoder")
    make_empty(folder / "empty", made.id, lm)
    build_structure(
        index, sae, folder / "structure",
        StructureConfig(Kinds(dense=0.5), contained=0.5, support=3),
        wider=Wider(wide, "a wider autoencoder"), wider_index=wider,
    )  # fmt: skip
    make_finding(folder / "finding", sae, made.id, lm)
    shelf = Shelf.open(folder)
    source = next(s for s in shelf.sources if s.index.manifest.id == index.manifest.id)
    for latent, text in ((3, "parcels that are late"), (5, SCRIPT), (6, f"{RTL} עולם"), (7, "one long word")):
        source.labels.propose(
            latent, text, by="lexical", kind="lexical", scores={"detection": {"value": 0.8}}
        )
    bench = Workbench(lambda _: lm, lambda _: sae, Limits(characters=5000, tokens=400, new_tokens=32))
    return World(folder, shelf, bench, lm, sae)


def make_empty(folder: Path, sae_id: str, lm: LanguageModel) -> Index:
    """An index over a corpus in which nothing fires."""
    return handmade(folder, [["nothing"]], [Made()] * D_SAE, inputs={"sae": sae_id, "model": lm.id})


def make_finding(folder: Path, sae: SAE, sae_id: str, lm: LanguageModel) -> None:
    """A real finding, measured on a handful of prompts."""
    from unbraid.causal.finding import save_finding
    from unbraid.causal.measure import Sampling
    from unbraid.causal.probes import Probe
    from unbraid.causal.validate import ValidateConfig, validate

    probes = [
        Probe(
            id=f"p{i}", messages=({"role": "user", "content": f"word {i}"},), incident=re.compile("[aeiou]")
        )
        for i in range(4)
    ]
    benign = [Probe(id="b", messages=({"role": "user", "content": "hello"},), expected=re.compile("."))]
    config = ValidateConfig(
        dose=2.0, doses=(1.0, 2.0), random_latents=1, random_directions=1, resamples=50,
        sampling=Sampling(max_new_tokens=4),
    )  # fmt: skip
    found = validate(
        lm, sae, [3], probes, benign, config, sae_id=sae_id, command="unbraid validate --latent 3"
    )
    save_finding(found.finding, folder)


@pytest.fixture(scope="session")
def client(world: World) -> TestClient:
    return TestClient(create_app(world.shelf, world.bench), base_url="http://127.0.0.1")
