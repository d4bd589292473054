"""Shares, merging, growing and neighbours elsewhere, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unbraid.cli import main
from unbraid.features.page import Index

from .conftest import index_words

TEXTS = [
    f"The {a} would like a {b} and water."
    for a in ("girl", "doctor", "cook")
    for b in ("ball", "pan", "dose")
]


@pytest.fixture(scope="module")
def words(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command line of an index without --out."""
    words = index_words(tmp_path_factory.mktemp("inputs"), tiny_llama, TEXTS, d_sae=16, k=4)
    return [*words, "--part", "60"]


def test_shares_are_merged(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in "12":
        assert main([*words, "--share", f"{number}/2", "--out", str(tmp_path / number)]) == 0
        assert f"this is share {number} of 2" in capsys.readouterr().out
    folders = [str(tmp_path / number) for number in "12"]
    assert main(["index", "--merge", *folders, "--out", str(tmp_path / "merged"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert main([*words, "--out", str(tmp_path / "alone")]) == 0
    alone = Index(tmp_path / "alone")
    assert record["tokens"] == alone.n_tokens == sum(Index(folder).n_tokens for folder in folders)
    assert main(["verify", str(tmp_path)]) == 0
    assert main(["index", "--merge", folders[0], "--out", str(tmp_path / "half")]) == 2
    assert "needs each of 1/2 … 2/2 once" in capsys.readouterr().err


def test_an_index_is_appended_to_and_looks_beside_itself(words: list[str], tmp_path: Path) -> None:
    sae = words[words.index("--sae") + 1]
    more = tmp_path / "more.txt"
    more.write_text("\n\n".join([*TEXTS, "A new text about a storm."]))
    assert main([*words, "--beside", sae, "--out", str(tmp_path / "old")]) == 0
    old = Index(tmp_path / "old")
    other = [n for n in old.latent(3).neighbours if n.sae is not None and n.kind == "decoder"]
    assert other[0].latent == 3 and other[0].value == pytest.approx(1)
    grown = ["--text", str(more), "--beside", sae, "--append", str(tmp_path / "old")]
    assert main([*words, *grown, "--out", str(tmp_path / "new")]) == 0
    new = Index(tmp_path / "new")
    assert new.manifest.facts["documents"] == len(TEXTS) + 1 and new.n_tokens > old.n_tokens
    assert new.manifest.inputs["index"] == old.manifest.id


def test_progress_counts_tokens_as_tokens_and_latents_as_latents(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--tokens", "40", "--out", str(tmp_path / "out")]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("index: ")]
    assert any(line.startswith("index: 16/16 latents ") for line in lines)
    counted = [line for line in lines if " tokens" in line]
    assert counted and all("/40 tokens (" in line and "latents" not in line for line in counted)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--share", "3/2"], "give it as 1/4 … 4/4"),
        (["--merge", "a", "b"], "--merge takes everything from the shares"),
        (["--append", "nowhere"], "not an artifact of kind index"),
    ],
)
def test_mistakes_are_named(
    more: list[str], said: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, *more, "--out", str(tmp_path / "out")]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_nothing_to_index_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["index", "--out", str(tmp_path / "out")]) == 2
    assert "--sae DIR --model M --text FILE, or --merge DIR DIR" in " ".join(capsys.readouterr().err.split())
