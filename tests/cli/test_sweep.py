"""`unbraid sweep` that follows a capture, and its mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unbraid.cli import main
from unbraid.cli.sweep import _show  # pyright: ignore[reportPrivateUsage]
from unbraid.manifest.record import read_manifest


@pytest.fixture
def words(tiny_llama: Path, tmp_path: Path) -> list[str]:
    text, acts = tmp_path / "corpus.txt", tmp_path / "acts"
    text.write_text("\n\n".join("the red ball was a package " * n for n in range(2, 12)))
    corpus = ["--model", str(tiny_llama), "--text", str(text)]
    assert main(["capture", *corpus, "--site", "layers.1.resid_post", "--out", str(acts)]) == 0
    grid = ["--arch", "topk", "--width", "16", "--k", "2", "--seed", "0", "--threads", "1"]
    loop = ["--steps", "4", "--batch-size", "32", "--calibration-tokens", "64"]
    return ["sweep", "--activations", str(acts), *corpus, *grid, *loop, "--out", str(tmp_path / "swept")]


def test_it_reads_in_the_order_of_capture(words: list[str], tmp_path: Path) -> None:
    assert main([*words, "--follow", "--buffer-tokens", "100"]) == 0
    (point,) = json.loads((tmp_path / "swept" / "sweep.json").read_text())["points"]
    assert point["point"] == "topk-w16-k2"
    manifest = read_manifest(tmp_path / "swept")
    assert manifest.facts["reading"] == {"order": "capture", "buffer_tokens": 100}
    assert manifest.inputs["activations"] == read_manifest(tmp_path / "acts").id
    assert main(["verify", str(tmp_path)]) == 0


def test_a_buffer_belongs_to_follow(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--buffer-tokens", "100"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.endswith("--buffer-tokens belongs to --follow; add it or leave it out") and "\n" not in said


def test_the_table_folds_a_long_name_and_no_number(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    values = {"l0": 15.8, "fvu": 0.0963, "delta_ce": 0.288, "dead": 0.125}
    metrics = {name: {"value": v, "low": v * 0.9, "high": v * 1.1} for name, v in values.items()}
    name = "matching_pursuit-w1024-k16-short_rows=false"
    point = {"point": name, "seeds": 3, "metrics": metrics, "front_fvu": True, "front_delta_ce": False}
    _show({"tokens": 20_000, "points": [point]}, Path("sweep"))
    said = capsys.readouterr().out
    assert "…" not in said
    for number in ("15.8", "0.0963*", "0.0867", "0.106", "0.288", "0.259", "0.317", "12.5%"):
        assert number in said
    cells = [line.split("│")[1].strip() for line in said.splitlines() if line.startswith("│")]
    assert "".join(cells) == name
