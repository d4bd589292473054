"""`unbraid label`: labels are proposed, scored, shown, decided, exported and loaded from the terminal."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from unbraid.cli import main
from unbraid.features.labels.store import Labels, labels_path
from unbraid.features.page import Index

from .conftest import index_words

WORDS = ["storm", "onions", "tablets", "refund", "ball", "doctor", "water", "order", "pan", "dose"]
FEW = ["--length", "8", "--train", "8", "--positives", "8", "--negatives", "8", "--passages", "40"]


@pytest.fixture(scope="module")
def index(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("label")
    texts = [f"I would like the {a} and then the {b}." for a in WORDS for b in WORDS]
    words = index_words(folder, tiny_llama, texts, d_sae=64, k=3)
    assert main([*words, "--out", str(folder / "index")]) == 0
    return folder / "index"


@pytest.fixture(scope="module")
def busy(index: Path) -> list[str]:
    rows = Index(index).query("SELECT latent FROM latents ORDER BY count DESC, latent LIMIT 6")
    return [str(row["latent"]) for row in rows]


def test_labels_are_proposed_and_decided(
    index: Path, busy: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["label", "--index", str(index)]
    out = tmp_path / "labels.json"
    assert main([*words, "--latents", *busy, *FEW, "--json", "--out", str(out)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads(out.read_text())
    labelled = [one for one in result["latents"] if one["label"]]
    assert len(result["latents"]) == 6 and labelled
    for one in labelled:
        assert set(one["scores"]) == {"detection", "fuzzing", "simulation"}
        assert (
            one["scores"]["detection"]["base_rate"] is None or 0 < one["scores"]["detection"]["base_rate"] < 1
        )
    name = labelled[0]["id"]
    assert main([*words, "--queue"]) == 0 and name in capsys.readouterr().out
    assert main([*words, "--reject", name, "--by", "anna"]) == 2
    assert "why the label is rejected is empty" in capsys.readouterr().err
    assert main([*words, "--needs-work", name, "--why", "too broad", "--by", "anna"]) == 0
    assert main([*words, "--accept", name, "--by", "ben", "--json"]) == 0
    printed = capsys.readouterr().out
    accepted = json.loads(printed[printed.index("{") :])
    assert [r["by"] for r in accepted["reviews"]] == ["anna", "ben"] and accepted["status"] == "accepted"
    assert main([*words, "--queue", "--json"]) == 0
    assert name not in [one["id"] for one in json.loads(capsys.readouterr().out)]
    assert main([*words, "--agreement"]) == 0
    assert json.loads(capsys.readouterr().out)["percent"]["value"] == 0
    assert main([*words, "--latents", str(labelled[0]["latent"]), "--history"]) == 0
    assert "too broad" in capsys.readouterr().out

    lines = tmp_path / "labels.jsonl"
    assert main([*words, "--export", str(lines)]) == 0
    before = lines.read_bytes()
    labels_path(index).unlink()
    assert main([*words, "--import", str(lines)]) == 0 and "lines added" in capsys.readouterr().out
    assert main([*words, "--import", str(lines)]) == 0 and " 0 lines added" in capsys.readouterr().out
    assert main([*words, "--export", str(lines)]) == 0 and lines.read_bytes() == before


def test_a_person_proposes(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["label", "--index", str(index), "--by", "anna"]
    assert main([*words, "--latents", "3", "--propose", "the <b>storm</b> [red]"]) == 0
    label = Labels(labels_path(index)).current([3])[3]
    assert (label.text, label.kind, label.by) == ("the <b>storm</b> [red]", "person", "anna")
    capsys.readouterr()
    assert main([*words, "--queue"]) == 0 and "[red]" in capsys.readouterr().out  # no markup is obeyed


def test_mistakes_are_named(index: Path, busy: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["label", "--index", str(index)]
    for more, message in (
        (["--scorers", "luck"], "no scorer 'luck'"),
        (["--latents", "999"], "latent 999 does not exist"),
        (["--explainer", "llm"], "--base-url"),
        (["--accept", "nothing"], "has no label 'nothing'"),
        (["--propose", "x"], "about one latent"),
        (["--sae", "nowhere"], "nowhere"),
        (["--scorers", "embedding", "--embedding-model", "nowhere"], "holds no embedding model"),
    ):
        assert main([*words, *more]) == 2, more
        assert message in capsys.readouterr().err


def test_a_language_model_labels_and_judges_through_an_endpoint(
    index: Path, busy: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            given = json.loads(body["messages"][1]["content"].split("\nYour last")[0])
            said = {"label": "things one would like"}
            if "description" in given:
                said = {"answers": [1] * len(given["texts"])}
            content = json.dumps(said) if len(asked) % 9 else "I'd rather not."
            data = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    words = ["label", "--index", str(index), "--latents", *busy[:3], *FEW, "--explainer", "llm"]
    words += ["--judge", "llm", "--scorers", "detection", "fuzzing", "--model-name", "small", "--json"]
    words += ["--base-url", f"http://127.0.0.1:{server.server_address[1]}/v1", "--concurrency", "2"]
    words += ["--price-in", "1", "--price-out", "1", "--calls", str(tmp_path / "calls.sqlite")]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert "calls to small" in shown.err and "at most" in shown.err
    result = json.loads(shown.out)
    assert {one["label"] for one in result["latents"]} == {"things one would like"}
    assert result["explainer"] == result["judge"] == "small"
    assert result["spent"]["calls"] == len(asked) and result["unread"]["asked again"] >= 1
    first = len(asked)
    assert main(words) == 0  # every reply is there already
    again = json.loads(capsys.readouterr().out)
    assert len(asked) == first and again["spent"]["calls"] == 0
    for before, after in zip(result["latents"], again["latents"], strict=True):
        assert before["scores"] == after["scores"]
    server.shutdown()
    server.server_close()
