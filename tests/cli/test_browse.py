"""`unbraid browse`: what it refuses, what it opens, and that it serves."""

from __future__ import annotations

import socket
import threading
import urllib.request
from pathlib import Path

import pytest
import torch

from unbraid.cli import main
from unbraid.cli.browse import Options, _Models
from unbraid.manifest.errors import UserError
from unbraid.manifest.record import write_manifest
from unbraid.model.load import load_model
from unbraid.sae.base import SAEConfig
from unbraid.sae.registry import build
from unbraid.ui.security import Access
from unbraid.ui.serve import serve
from unbraid.ui.shelf import Shelf
from unbraid.ui.workbench import Workbench

from ..features.handmade import Made, handmade


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A folder with an autoencoder and an index of the tiny model."""
    folder = tmp_path_factory.mktemp("browsed")
    lm = load_model(tiny_llama)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sae = build(SAEConfig(architecture="relu", d_in=lm.d_in, d_sae=3, site="layers.1.resid_post"))
        sae.save_pretrained(folder / "sae")
    made = write_manifest(folder / "sae", kind="sae", command="", seed=0, inputs={"model": lm.id}, facts={})
    inputs = {"sae": made.id, "model": lm.id}
    handmade(folder / "index", [["the", " ball"]], [Made([(0, 1, 2.0)]), Made(), Made()], inputs=inputs)
    return folder


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "is no folder"),
        (["."], "holds no index"),
        (["index", "--host", "0.0.0.0"], "--token"),
        (["index", "--token", "short"], "12 or more"),
    ],
)
def test_mistakes_are_told_before_anything_is_served(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    place = folder / "index" if words[0] == "index" else tmp_path / words[0]
    assert main(["browse", str(place), *words[1:]]) == 2
    assert said in capsys.readouterr().err


def test_the_model_must_be_the_one_that_was_indexed(folder: Path, tiny_llama: Path, tiny_gpt2: Path) -> None:
    (source,) = Shelf.open(folder).sources
    models = _Models(Options(folder, model=str(tiny_llama)))
    assert models.model(source).id == source.index.manifest.inputs["model"]
    assert models.sae(source).config.d_sae == 3
    with pytest.raises(UserError, match="was made with"):
        _Models(Options(folder, model=str(tiny_gpt2))).model(source)
    with pytest.raises(UserError, match="--model"):
        _Models(Options(folder)).model(source)


def test_it_serves_and_a_taken_port_is_told(folder: Path) -> None:
    shelf = Shelf.open(folder)
    found: list[str] = []
    ready = threading.Event()

    def told(url: str) -> None:
        found.append(url)
        ready.set()

    arguments = (shelf, Workbench(None, None), Access())
    threading.Thread(target=serve, args=arguments, kwargs={"port": 0, "ready": told}, daemon=True).start()
    assert ready.wait(300)
    with urllib.request.urlopen(found[0] + "index.json", timeout=300) as answer:
        assert shelf.sources[0].key.encode() in answer.read()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="another --port"):
            serve(*arguments, port=taken.getsockname()[1])
