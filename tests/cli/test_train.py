"""`unbraid train` beside a running capture, and straight from a model: real processes, really killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import unbraid
from unbraid.cli import main
from unbraid.manifest.files import partial_of
from unbraid.manifest.record import check_files, read_manifest

SITE = "layers.1.resid_post"
TRAIN = ("--site", SITE, "--width", "64", "--k", "4", "--batch-size", "200", "--steps", "60")
LOOP = ("--checkpoint-every", "5", "--calibration-tokens", "500", "--threads", "1", "--buffer-tokens", "1500")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "corpus.jsonl"
    words = ["once", "upon", "a", "time", "the", "doctor", "had", "package", "red", "ball", "wait"]
    lines = [" ".join(words[(n * i) % 11] for i in range(5 + n % 60)) for n in range(120)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def reading(model: Path, text: Path) -> list[str]:
    return ["--model", str(model), "--text", str(text), "--context", "64", "--batch-tokens", "512"]


def process(*words: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(unbraid.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "unbraid", *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def weights(folder: Path) -> dict[str, bytes]:
    check_files(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


def killed_after_a_checkpoint(words: list[str], out: Path) -> None:
    checkpoint = partial_of(out) / "checkpoint.safetensors"
    for _ in range(20):  # on a busy machine a kill may come when the run has ended
        with process(*words) as run:
            while not checkpoint.exists() and run.poll() is None:
                time.sleep(0.005)
            run.kill()
            stderr = run.communicate()[1]
        if not out.exists():
            assert run.returncode == -signal.SIGKILL, stderr
            return
        shutil.rmtree(out)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs SIGKILL")
def test_beside_the_capture_and_straight_from_the_model(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    acts = tmp_path / "acts"
    words = (
        "capture",
        *reading(tiny_llama, text),
        "--site",
        SITE,
        "--shard-tokens",
        "500",
        "--out",
        str(acts),
    )
    follow = [
        "train",
        "--activations",
        str(acts),
        "--follow",
        *TRAIN,
        *LOOP,
        "--out",
        str(tmp_path / "follow"),
    ]
    live = ["train", *reading(tiny_llama, text), *TRAIN, *LOOP, "--out", str(tmp_path / "live")]
    beside, said = process(*follow), ""
    try:
        assert beside.stderr is not None
        while f"train: waiting for {acts} to have 1 tokens; 0 are there" not in said:
            line = beside.stderr.readline()
            assert line, said
            said += line
        with process(*words) as capture:
            killed_after_a_checkpoint(live, tmp_path / "live")
            assert capture.wait(600) == 0, capture.communicate()[1]
        assert beside.wait(600) == 0, beside.communicate()[1]
    finally:
        beside.kill()
        beside.communicate()
    assert partial_of(tmp_path / "live").is_dir() and not (tmp_path / "live").exists()
    # A process of the same kind: what ran before in one can change the last bits of a product.
    with process(*live) as again:
        stdout, stderr = again.communicate()
    assert again.returncode == 0 and "width 64 on layers.1.resid_post of" in stdout, stderr
    assert weights(tmp_path / "live") == weights(tmp_path / "follow")

    store, one, other = (read_manifest(tmp_path / name) for name in ("acts", "live", "follow"))
    assert one.inputs == store.inputs and other.inputs == {"activations": store.id}
    assert "--buffer-tokens 1500" in one.made_by.command and "--context 64" in one.made_by.command
    assert " --follow " in other.made_by.command
    assert main(["verify", str(tmp_path)]) == 0


def impossible(model: str, text: str, acts: str) -> dict[str, tuple[list[Any], str]]:
    live, site = ["--model", model, "--text", text], ["--site", SITE]
    return {
        "nothing to train on": ([], "give either --activations, or --model"),
        "two things to train on": (["--activations", acts, *live, *site], "give either --activations"),
        "follow without a capture": (["--follow", *live, *site], "--follow reads one folder"),
        "follow two captures": (["--follow", "--activations", acts, acts], "--follow reads one folder"),
        "model without text": (["--model", model, *site], "needs --text and --site"),
        "model without site": (live, "needs --text and --site"),
        "text of a capture": (["--activations", acts, "--text", text], "--text say how to read a --model"),
        "tokens of a capture": (
            ["--activations", acts, "--tokens", "9"],
            "--tokens say how to read a --model",
        ),
        "precision of a capture": (
            ["--activations", acts, "--model-dtype", "bfloat16"],
            "--model-dtype say how to read a --model",
        ),
        "buffer of a shuffle": (["--activations", acts, "--buffer-tokens", "9"], "belongs to --follow and"),
        "no buffer": ([*live, *site, "--buffer-tokens", "0"], "buffer_tokens is 0"),
        "no replies": ([*live, *site, "--positions", "reply"], "has no tokens to train on"),
        "no such text": (["--model", model, *site, "--text", text + "x"], "is not a file"),
        "no such site": ([*live, "--site", "layers.9.resid_post"], "layers.9"),
    }


@pytest.mark.parametrize("name", impossible("", "", ""))
def test_what_does_not_go_together_is_one_sentence(
    name: str, tiny_llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, said = impossible(str(tiny_llama), str(text), str(tmp_path / "acts"))[name]
    assert main(["train", *map(str, words), "--out", str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    sentences = [line for line in error.splitlines() if line.startswith("unbraid: ")]
    assert len(sentences) == 1 and said in sentences[0], error
    assert not list(tmp_path.iterdir())


def test_what_a_model_computes_in_is_recorded(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    words = ["train", *reading(tiny_llama, text), *TRAIN, *LOOP]
    for dtype in ("float32", "bfloat16"):
        assert main([*words, "--steps", "6", "--model-dtype", dtype, "--out", str(tmp_path / dtype)]) == 0
    full, half = (read_manifest(tmp_path / dtype) for dtype in ("float32", "bfloat16"))
    assert "--model-dtype bfloat16" in half.made_by.command and "dtype" not in full.made_by.command
    assert [m.facts["reading"]["computed"] for m in (full, half)] == ["float32", "bfloat16"]
    one, other = weights(tmp_path / "float32"), weights(tmp_path / "bfloat16")
    assert one["sae_weights.safetensors"] != other["sae_weights.safetensors"]
