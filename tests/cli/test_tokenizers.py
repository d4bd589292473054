"""The same weights behind another tokenizer are refused wherever something captured or trained is used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from unbraid.cli import main
from unbraid.manifest.record import check_files

LATER = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def other(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with another chat template."""
    folder = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(tiny_llama, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": LATER}))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("\n\n".join(f"the red ball {i} was delayed by the storm" for i in range(40)))
    return path


@pytest.fixture(scope="module")
def sae(tiny_llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    model = ["--model", str(tiny_llama)]
    acts = ["--site", "layers.1.resid_post", "--text", str(text), "--out", str(folder / "acts")]
    assert main(["capture", *model, *acts]) == 0
    words = ["train", "--activations", str(folder / "acts"), "--width", "32", "--k", "4", "--steps", "3"]
    assert main([*words, "--batch-size", "64", "--kernels", "plain", "--out", str(folder / "sae")]) == 0
    assert main(["convert", str(folder / "sae"), "--to", "sparsify", "--out", str(folder / "converted")]) == 0
    corpus = ["--sae", str(folder / "sae"), "--text", str(text), "--out", str(folder / "index")]
    assert main(["index", *model, *corpus]) == 0
    return folder


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["evaluate", "--sae", "{made}/sae", "--text", "{text}"], "sae"),
        (["evaluate", "--sae", "{made}/converted", "--text", "{text}"], "converted"),
        (["index", "--sae", "{made}/sae", "--text", "{text}", "--out", "{made}/new"], "sae"),
        (["finetune", "--sae", "{made}/sae", "--text", "{text}", "--out", "{made}/new"], "sae"),
        (["find", "--index", "{made}/index", "--positive", "{text}", "--negative", "{text}"], "index"),
        (
            [
                "sweep",
                "--activations",
                "{made}/acts",
                "--text",
                "{text}",
                "--width",
                "8",
                "--out",
                "{made}/new",
            ],
            "acts",
        ),
    ],
)
def test_another_tokenizer_is_refused(
    sae: Path, other: Path, text: Path, words: list[str], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [word.format(made=sae, text=text) for word in words]
    assert main([*filled, "--model", str(other)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"{sae}/{what} was made with tokenizer" in said and "load the model with the tokenizer" in said
    assert not (sae / "new").exists()


def test_the_tokenizer_of_then_is_taken(sae: Path, tiny_llama: Path, text: Path) -> None:
    for name in ("sae", "converted"):
        assert check_files(sae / name).facts["tokenizer_id"]
        assert (
            main(["evaluate", "--sae", str(sae / name), "--text", str(text), "--model", str(tiny_llama)]) == 0
        )
