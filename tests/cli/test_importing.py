"""`unbraid import`, and what the other verbs say of activations whose origin is unknown."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from unbraid.activations.store import ActivationStore
from unbraid.cli import main
from unbraid.model.load import LanguageModel, load_model
from unbraid.model.read import read_sites
from unbraid.model.sites import Site

POST = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def lm(tiny_llama: Path) -> LanguageModel:
    return load_model(tiny_llama)


@pytest.fixture
def theirs(lm: LanguageModel, tmp_path: Path) -> Path:
    """Activations of the tiny model at one site, in an array that is named as TransformerLens does."""
    ids = torch.randint(9, 300, (40, 16), generator=torch.Generator().manual_seed(0))
    x = read_sites(lm, ids, torch.ones_like(ids), [Site(1, "resid_post")])[Site(1, "resid_post")]
    path = tmp_path / "theirs.safetensors"
    save_file({POST: x, "tokens": ids, "pattern": torch.zeros(3)}, path, {"model_name": "a-llama"})
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(f"the red ball {i} was delayed by the storm" for i in range(40)))
    return path


def train(acts: Path, out: Path) -> int:
    words = ["train", "--activations", str(acts), "--width", "32", "--k", "4", "--steps", "3"]
    return main([*words, "--batch-size", "64", "--kernels", "plain", "--out", str(out)])


def test_what_is_known_and_what_is_not_is_said(theirs: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "acts"
    assert main(["import", str(theirs), "--out", str(out)]) == 0
    assert capsys.readouterr().out == (
        f"{out}: 640 tokens of 40 documents at layers.1.resid_post from {POST}; unknown: model, tokenizer; "
        "left out: pattern\n"
    )
    assert ActivationStore(out, check=True).model_name == "a-llama"
    assert main(["verify", str(out)]) == 0
    assert "theirs.safetensors" in capsys.readouterr().out


def test_json_and_options(theirs: Path, tmp_path: Path, capsys) -> None:
    np.save(tmp_path / "acts.npy", np.zeros((640, 5), dtype=np.float32))
    words = ["import", str(tmp_path / "acts.npy"), "--out", str(tmp_path / "acts")]
    words += ["--site", "layers.3.mlp_out=acts", "--tokens", f"{theirs}#tokens", "--drop-tokens", "9", "10"]
    assert main([*words, "--tool", "nnsight", "--model-name", "big", "--dtype", "float32", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    store = ActivationStore(tmp_path / "acts")
    assert said["id"] == store.id and said["model"] == "big" and said["origin"]["tool"] == "nnsight"
    assert said["origin"]["tokens"] == "tokens" and said["d_in"] == 5 and 560 < said["tokens"] < 640
    assert set(store.manifest.inputs) == {"acts.npy", "theirs.safetensors"}


def test_of_an_unknown_model_one_can_train_and_evaluate_but_not_sweep(
    theirs: Path, tiny_llama: Path, text: Path, tmp_path: Path, capsys
) -> None:
    acts, sae = tmp_path / "acts", tmp_path / "sae"
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(900, 48)))
    words = ["import", str(tmp_path / "x.npy"), "--site", "layers.1.resid_post"]
    assert main([*words, "--out", str(acts)]) == 0
    assert train(acts, sae) == 0
    assert "on layers.1.resid_post of an unknown model" in capsys.readouterr().out
    model, corpus = ["--model", str(tiny_llama)], ["--text", str(text)]
    assert main(["evaluate", "--sae", str(sae), *model, *corpus]) == 0
    assert main(["index", "--sae", str(sae), *model, *corpus, "--out", str(tmp_path / "index")]) == 0
    out = ["--width", "8", "--out", str(tmp_path / "sweep")]
    assert main(["sweep", "--activations", str(acts), *model, *corpus, *out]) == 2
    assert "does not say of which model and tokenizer it is; import it again" in capsys.readouterr().err
    assert main(["verify", str(tmp_path)]) == 0


def test_a_stated_model_is_recorded_and_held_to(
    theirs: Path, tiny_llama: Path, tiny_gpt2: Path, text: Path, lm: LanguageModel, tmp_path: Path, capsys
) -> None:
    acts, sae = tmp_path / "acts", tmp_path / "sae"
    assert main(["import", str(theirs), "--model", str(tiny_llama), "--out", str(acts)]) == 0
    assert "; a forward pass of " in capsys.readouterr().out
    assert ActivationStore(acts).manifest.inputs["tokenizer"] == lm.tokenizer_id
    np.save(tmp_path / "x.npy", np.ones((9, 48)))
    words = ["import", str(tmp_path / "x.npy"), "--site", POST, "--model", str(tiny_llama)]
    assert main([*words, "--out", str(tmp_path / "flat")]) == 0
    assert "; not compared with a forward pass" in capsys.readouterr().out
    assert train(acts, sae) == 0
    corpus = ["--text", str(text)]
    assert main(["evaluate", "--sae", str(sae), "--model", str(tiny_llama), *corpus]) == 0
    assert main(["evaluate", "--sae", str(sae), "--model", str(tiny_gpt2), *corpus]) == 2
    assert "was trained on weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["nowhere.npy"], 2, "nowhere.npy does not exist"),
        (["{path}", "--site", "layers.0.mlp_out=acts"], 2, f"the arrays are {POST}, pattern, tokens"),
        (["{path}", "--site", "layers.0.mlp_out=pattern"], 2, "pattern has shape (3,)"),
        (["{cut}"], 1, "cut.safetensors is cut off or damaged"),
        (["{path}", "--shard-tokens", "0"], 2, "--shard-tokens"),
        (["{path}", "--out", "{folder}"], 2, "exists already"),
        ([], 2, "no array was given"),
    ],
)
def test_mistakes_are_one_sentence(
    theirs: Path, tmp_path: Path, capsys, words: list[str], code: int, says: str
) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(theirs.read_bytes()[:-9])
    before = sorted(tmp_path.iterdir())
    filled = [word.format(path=theirs, cut=cut, folder=tmp_path) for word in words]
    out = [] if "--out" in words else ["--out", str(tmp_path / "out")]
    assert main(["import", *filled, *out]) == code
    error = capsys.readouterr().err
    assert error.count("unbraid: ") == 1 and says in error.splitlines()[-1]
    assert sorted(tmp_path.iterdir()) == before
