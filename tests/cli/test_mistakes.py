"""Mistakes through the real command line: one clear sentence, exit code 2, nothing overwritten."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from unbraid.cli import main


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, shared_models: Path, shared_data: Path) -> Path:
    """Finished activations and autoencoder of a real model, made by the commands themselves."""
    folder = tmp_path_factory.mktemp("work")
    text = folder / "stories.txt"
    text.write_text((shared_data / "tinystories" / "train.txt").read_text()[:60_000])
    model = str(shared_models / "stories260k")
    site = "layers.2.resid_post"
    acts, sae = str(folder / "acts"), str(folder / "sae")
    assert (
        main(
            [
                "capture",
                "--model",
                model,
                "--site",
                site,
                "--text",
                str(text),
                "--tokens",
                "4000",
                "--out",
                acts,
            ]
        )
        == 0
    )
    assert (
        main(
            [
                "train",
                "--activations",
                acts,
                "--arch",
                "topk",
                "--k",
                "8",
                "--width",
                "128",
                "--steps",
                "20",
                "--batch-size",
                "256",
                "--out",
                sae,
            ]
        )
        == 0
    )
    return folder


def mistakes(work: Path, models: Path) -> dict[str, tuple[list[str], str]]:
    model, text, sae = str(models / "stories260k"), str(work / "stories.txt"), str(work / "sae")
    other = str(models / "tinystories-656k")
    latin, empty = work / "latin.txt", work / "empty.txt"
    latin.write_bytes("caf\xe9 ".encode("latin-1") * 50)
    empty.write_text("\n\n")
    new = str(work / "new")
    capture = ["capture", "--model", model, "--out", new]
    return {
        "unknown site": ([*capture, "--site", "layers.2.nonsense", "--text", text], "nonsense"),
        "site beyond the model": ([*capture, "--site", "layers.77.resid_post", "--text", text], "77"),
        "missing file": (
            [*capture, "--site", "layers.2.resid_post", "--text", str(work / "no.txt")],
            "no.txt",
        ),
        "not UTF-8": ([*capture, "--site", "layers.2.resid_post", "--text", str(latin)], "latin.txt"),
        "empty corpus": ([*capture, "--site", "layers.2.resid_post", "--text", str(empty)], "empty.txt"),
        "k beyond the width": (
            ["train", "--activations", str(work / "acts"), "--k", "200", "--width", "128", "--out", new],
            "k is 200",
        ),
        "other weights": (["evaluate", "--sae", sae, "--model", other, "--text", text], "trained on"),
        "index of other weights": (
            ["index", "--sae", sae, "--model", other, "--text", text, "--out", new],
            "trained on",
        ),
        "out exists": (
            [
                "capture",
                "--model",
                model,
                "--site",
                "layers.2.resid_post",
                "--text",
                text,
                "--out",
                str(work / "acts"),
            ],
            "exists already",
        ),
        "no such model": (
            [
                "capture",
                "--model",
                str(work / "nope"),
                "--site",
                "layers.0.resid_post",
                "--text",
                text,
                "--out",
                new,
            ],
            "nope",
        ),
        "no such verb": (["capture_"], "capture"),
        "demo without prompts": (["demo", "--model", model, "--out", new], "--probes"),
        "practice topic": (["practice", "write", "--topic", "cats", "--out", str(work / "x.jsonl")], "cats"),
    }


NAMES = (
    "unknown site",
    "site beyond the model",
    "missing file",
    "not UTF-8",
    "empty corpus",
    "k beyond the width",
    "other weights",
    "index of other weights",
    "out exists",
    "no such model",
    "no such verb",
    "demo without prompts",
    "practice topic",
)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", NAMES)
def test_one_sentence_exit_code_2_nothing_overwritten(
    name: str, work: Path, shared_models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, said = mistakes(work, shared_models)[name]
    before = snapshot(work)
    assert main(words) == 2
    error = capsys.readouterr().err
    sentences = [line for line in error.splitlines() if line.startswith("unbraid: ")]
    assert len(sentences) == 1 and said in sentences[0]
    assert "Traceback" not in error
    assert snapshot(work) == before and not (work / "new").exists()


def test_a_flipped_byte_is_named_with_exit_code_1(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(work, copy)
    path = copy / "sae" / "sae_weights.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    assert main(["verify", str(copy)]) == 1
    assert "sae_weights.safetensors" in capsys.readouterr().err
