"""`unbraid evaluate` from the command line: what it writes, its gates, and what it says of mistakes."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from unbraid.cli import main
from unbraid.manifest.record import check_files
from unbraid.model.load import load_model
from unbraid.sae.base import SAEConfig
from unbraid.sae.registry import build

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def words(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder with two autoencoders, one of a hostile name, and the words of a command."""
    folder = tmp_path_factory.mktemp("evaluate")
    lm = load_model(tiny_llama)
    for name, k in (("small", 4), (HOSTILE.replace("/", "_"), 16)):
        sae = build(SAEConfig("topk", lm.d_in, 96, k, site="layers.1.resid_post", model_id=lm.id))
        x = torch.randn(64, lm.d_in, generator=torch.Generator().manual_seed(0))
        sae.initialise(x, x, torch.Generator().manual_seed(0))
        sae.save_pretrained(folder / name)
    text = folder / "text.jsonl"
    lines = [{"text": f"the red ball {i} and the delayed package with two tablets " * 2} for i in range(8)]
    text.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder, ["evaluate", "--model", str(tiny_llama), "--text", str(text), "--context", "32", "--sae"]


class _Page(HTMLParser):
    """What a page would load or run."""

    def __init__(self) -> None:
        super().__init__()
        self.bad: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "img", "iframe", "object", "embed"):
            self.bad.append(tag)
        self.bad += [name for name, _ in attrs if name in ("src", "href", "srcset") or name.startswith("on")]


def test_an_artifact_with_a_page_that_loads_nothing(
    words: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder, command = words
    saes = [str(folder / "small"), str(folder / HOSTILE.replace("/", "_"))]
    assert (
        main([*command, *saes, "--out", str(tmp_path / "ev"), "--json", "--require", "l0>1 fvu<0.001"]) == 1
    )
    out, err = capsys.readouterr()
    assert "fvu<0.001 is broken: the upper end" in err and "l0>1 is kept" in err
    printed = json.loads(out)["evaluations"]
    assert [one["sae"] for one in printed] == saes
    assert [v["kept"] for v in printed[0]["verdicts"]] == [True, False]
    assert printed[0]["references"].keys() == {"untrained", "pca", "neurons", "directions", "mean"}
    manifest = check_files(tmp_path / "ev")
    assert manifest.kind == "evaluation" and manifest.facts["kept"] is False
    names = sorted(manifest.files)
    assert names[:2] == ["evaluation.json", "report.html"] and len(names) == 4
    stored = json.loads((tmp_path / "ev" / "evaluation.json").read_text())["evaluations"]
    histograms = stored[0].pop("histograms")
    assert [stored[0], {k: v for k, v in stored[1].items() if k != "histograms"}] == printed
    fired = sum(histograms["density"]["counts"]) + histograms["density"]["never"]
    assert fired == 96 and len(histograms["density"]["edges"]) == len(histograms["density"]["counts"]) + 1
    l0 = printed[0]["metrics"]["l0"]["value"]
    assert sum(histograms["activation"]["counts"]) == pytest.approx(l0 * printed[0]["tokens"])
    page = (tmp_path / "ev" / "report.html").read_text("utf-8")
    parser = _Page()
    parser.feed(page)
    assert parser.bad == [] and HOSTILE.split("/")[0] not in page and "&lt;script&gt;" in page
    assert "default-src 'none'" in page and not re.search(r"https?://", page)
    assert page.count('<svg class="chart"') == 2 + 2 * 2 and "is broken" not in page
    assert ">broken<" in page and ">kept<" in page
    for definition in printed[0]["definitions"].values():
        assert definition in page


def test_the_table_fits_and_kept_limits_give_0(
    words: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, command = words
    assert main([*command, str(folder / "small"), "--references", "pca", "--require", "l0<=4"]) == 0
    out, err = capsys.readouterr()
    assert "l0<=4 is kept" in err and "what took no training" in out and "pca" in out
    assert "share of the variance" in re.sub(r"\s+", " ", out)
    assert main([*command, str(folder / "small"), "--references"]) == 0
    assert "what took no training" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--require", "fuv<1"], "did you mean fvu"),
        (["--require", "fvu=1"], "cannot be read"),
        (["--require", "scr_metric_threshold_5>0"], "add --suite scr"),
        (["--out", "."], "exists already"),
        (["--tokens", "0"], "tokens is 0"),
        (["--site", "layers.9.resid_post"], "layers.9.resid_post does not exist"),
    ],
)
def test_mistakes_are_one_sentence(
    words: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    folder, command = words
    assert main([*command, str(folder / "small"), *more]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_one_autoencoder_twice_and_broken_weights_are_named(
    words: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_llama: Path
) -> None:
    folder, command = words
    small = str(folder / "small")
    assert main([*command, small, small]) == 2
    assert "twice" in capsys.readouterr().err
    lm = load_model(tiny_llama)
    sae = build(SAEConfig("topk", lm.d_in, 96, 4, site="layers.1.resid_post", model_id=lm.id))
    with torch.no_grad():
        sae.b_dec[0] = torch.nan
    sae.save_pretrained(tmp_path / "broken")
    assert main([*command, small, str(tmp_path / "broken")]) == 1
    err = capsys.readouterr().err
    assert "broken/sae_weights.safetensors: b_dec holds values that are not numbers" in err


def test_suites_stand_in_the_table_the_page_and_saebenchs_files(
    words: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder, command = words
    text = tmp_path / "labelled.jsonl"
    kinds = ("red ball", "two tablets", "delayed package")
    lines = [
        {"text": f"the {kinds[i % 3]} was {i}", "labels": {"what": HOSTILE[i % 3 :]}} for i in range(210)
    ]
    text.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [*command[:3], "--text", str(text), "--tokens", "200", "--sae", str(folder / "small")]
    suites = ["--references", "--suite", "probing", "tpp", "--out", str(tmp_path / "ev")]
    limits = ["--require", "probe_top_1>0.99 tpp_threshold_2_total_metric<=1 l0>0"]
    assert main([*command, *suites, *limits]) == 1
    shown, said = capsys.readouterr()
    assert "probe_top_1>0.99 is broken: the lower end" in said
    assert "tpp_threshold_2_total_metric<=1 is kept" in said and "l0>0 is kept" in said
    assert "probing at" in shown and "tpp at" in shown and "detectable" in shown
    manifest = check_files(tmp_path / "ev")
    assert {name.split("/")[0] for name in manifest.files if "/" in name} == {"sparse_probing", "tpp"}
    stored = json.loads((tmp_path / "ev" / "suites.json").read_text())["suites"]
    assert [result["suite"] for result in stored] == ["probing", "tpp"]
    # In a terminal of 80 characters, too, every name and number stands in full.
    tables = shown[shown.index("suite probing at") :]
    assert "…" not in tables and max(len(line) for line in tables.splitlines() if "│" in line) <= 80
    assert all(metric in tables for result in stored for metric in result["definitions"])
    probing = stored[0]["rows"]
    assert probing[str(folder / "small")].keys() == stored[0]["definitions"].keys()
    assert all(
        0 <= i["low"] <= i["value"] <= i["high"] <= 1 for row in probing.values() for i in row.values()
    )
    page = (tmp_path / "ev" / "report.html").read_text()
    assert "Suite probing at" in page and "<script>" not in page
    main([*command, "--json", "--references", "--suite", "probing"])
    again = json.loads(capsys.readouterr().out)["suites"][0]
    assert again == stored[0]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--suite", "stability"], "the suite stability compares autoencoders; name two or more"),
        (["--suite", "probing"], "no label divides the 8 documents (no document has the field labels)"),
        (["--suite", "probing", "--suite-documents", "0"], "suite_documents is 0; choose 1 or more"),
    ],
)
def test_what_a_suite_lacks_is_one_sentence(
    words: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str], more: list[str], says: str
) -> None:
    folder, command = words
    assert main([*command, str(folder / "small"), "--references", *more]) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("evaluate:")]
    assert says in said
