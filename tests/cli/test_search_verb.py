"""`unbraid search` from the command line, each way of searching once, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from unbraid.cli import main
from unbraid.features.labels.store import Labels
from unbraid.features.page import Index
from unbraid.sae.formats.detect import detect

from .conftest import index_words


@pytest.fixture(scope="module")
def index(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verb")
    texts = [f"the [bold]red[/] {a} and the {b}" for a in ("ball", "pan", "dose") for b in ("storm", "order")]
    words = index_words(folder, tiny_llama, texts, d_sae=48, k=4)
    np.save(folder / "direction.npy", detect(folder / "sae").load().W_dec[7].detach().numpy())
    assert main([*words, "--out", str(folder / "index")]) == 0
    return folder / "index"


def searched(index: Path, capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, object]]:
    capsys.readouterr()
    assert main(["search", "--index", str(index), *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)["hits"]


def test_each_way_of_searching(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    by_text = searched(index, capsys, "--text", '"red pan"')
    assert by_text and all(hit["label"] is None for hit in by_text)
    assert searched(index, capsys, "--text", "nowhere") == []
    by_direction = searched(index, capsys, "--direction", str(index.parent / "direction.npy"), "--limit", "1")
    assert by_direction[0]["latent"] == 7 and by_direction[0]["score"] == pytest.approx(1, abs=1e-5)
    by_activation = searched(index, capsys, "--activates-on", "the red ball", "--order", "activation")
    from_file = searched(
        index, capsys, "--activates-on", str(index.parent / "text.txt"), "--order", "activation"
    )
    assert by_activation[0]["activations"] and len(from_file[0]["activations"]) > len(
        by_activation[0]["activations"]
    )  # type: ignore[arg-type]
    densities = Index(index).densities
    by_numbers = searched(index, capsys, "--where", "density>0", "--order", "density", "--limit", "3")
    assert [hit["score"] for hit in by_numbers] == pytest.approx(sorted(densities[densities > 0])[:3])
    Labels.of_index(Index(index)).propose(5, "kitchens", by="me", kind="manual")
    labelled = searched(index, capsys, "--text", "kitchens")
    assert [(hit["latent"], hit["label"]) for hit in labelled] == [(5, "kitchens")]


def test_text_of_the_corpus_is_no_markup(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "--index", str(index), "--activates-on", "a [red] \x1b[2J pan"]) == 0
    shown = capsys.readouterr().out
    assert "\x1b[2J" not in shown and "latent" in shown
    assert main(["search", "--index", str(index), "--text", "nowhere"]) == 0
    assert "No latent was found" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "say what to look for with one of --text"),
        (["--text", "a", "--meaning", "b"], "not 2 of them"),
        (["--text", "a", "--limit", "0"], "at least 1"),
        (["--where", "densty<1"], "no number 'densty'"),
        (["--activates-on", "a", "--order", "max"], "use surprise or activation"),
        (["--activates-on", "."], ". is a folder; give a text"),
        (["--text", "a", "--order", "count"], "--text has an order of its own; leave out --order"),
        (["--direction", "text.txt"], "is no .npy file"),
        (["--meaning", "b", "--embedder", "nowhere"], "holds no embedding model"),
    ],
)
def test_mistakes_are_named(
    index: Path,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(index.parent)
    assert main(["search", "--index", str(index), *words]) == 2
    assert message in capsys.readouterr().err


def test_structure_from_the_command_line(
    index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["structure", "--index", str(index), "--out"]
    assert main([*words, str(tmp_path / "a"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["d_sae"] == 48
    assert main([*words, str(tmp_path / "b"), "--antonym", "-0.9"]) == 0
    assert "single-token" in capsys.readouterr().out
    assert main([*words, str(tmp_path / "c"), "--wider", str(index.parent / "sae")]) == 2
    assert "name a wider one" in capsys.readouterr().err
    assert main(["verify", str(tmp_path)]) == 0
