"""Each format against a golden file, and what comes back from files that others wrote."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from unbraid.activations.documents import Document
from unbraid.cli import main
from unbraid.features.exchange import delphi, neuronpedia, saedashboard
from unbraid.features.exchange.neuronpedia import Names, import_labels
from unbraid.features.index import IndexConfig, build_index
from unbraid.features.labels.store import Labels
from unbraid.features.page import Index
from unbraid.manifest.errors import UserError
from unbraid.model.load import LanguageModel
from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.registry import build

from .handmade import Made, handmade

GOLDEN = Path(__file__).parent / "golden"
NAMES = Names("tiny", 1, "res-3", creator="me")
PASSAGES = [["a", " red", " ball"], ["the", " <b>", " 🙂", " pan"], ["one", " red", " pan"]]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    made = [
        Made(
            [(0, 1, 4.0), (2, 1, 3.0), (1, 2, 0.5)],
            promoted=[" ball", " box"],
            suppressed=["x"],
            decoder=[(1, 0.5)],
        ),
        Made([(1, 3, 2.0)], promoted=["\u2028"]),
        Made(),
    ]
    return handmade(tmp_path_factory.mktemp("exchange") / "index", PASSAGES, made)


@pytest.fixture(scope="module")
def made_sae() -> SAE:
    sae = build(SAEConfig("relu", 2, 3))
    with torch.no_grad():
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.5, -0.25], [0.0, 1.0]]))
    return sae


def same_as_golden(name: str, found: Any) -> None:
    """Compare with a file; UNBRAID_WRITE_GOLDEN=1 writes it, to be looked at."""
    path, text = GOLDEN / name, json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    if os.environ.get("UNBRAID_WRITE_GOLDEN") == "1":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def lines(path: Path) -> list[dict[str, Any]]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    # Only a line feed ends a line: text of the corpus may hold others that Unicode calls so.
    return [json.loads(line) for line in data.decode().split("\n") if line]


def test_neuronpedia(index: Index, made_sae: SAE, tmp_path: Path) -> None:
    labels = Labels(tmp_path / "labels.sqlite", "an autoencoder", clock=lambda: "2020-01-01T00:00:00.000000Z")
    labels.propose(0, "things that are red", by="me", kind="manual")
    labels.review(labels.propose(1, "wrong", by="me", kind="manual").id, "rejected", by="you", why="no")
    folder = neuronpedia.export(index, tmp_path / "np", NAMES, sae=made_sae, labels=labels)
    assert folder == tmp_path / "np" / "tiny" / "1-res-3"
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    kinds = ("activations", "explanations", "features")
    heads = ["model.jsonl", "release.jsonl", "source.jsonl", "sourceset.jsonl"]
    assert files == [*(f"{kind}/batch-0.jsonl.gz" for kind in kinds), *heads]
    same_as_golden("neuronpedia.json", {name: lines(folder / name) for name in files})
    again = neuronpedia.export(index, tmp_path / "again", NAMES, sae=made_sae, labels=labels)
    assert all((again / name).read_bytes() == (folder / name).read_bytes() for name in files)


# What Neuronpedia's tables demand of a row, from its schema of 2026-08; its import adds nothing.
DEMANDED = {
    "release": {"name", "description", "creatorName", "creatorId"},
    "model": {"id", "creatorId", "layers", "neuronsPerLayer", "owner"},
    "sourceset": {"modelId", "name", "description", "creatorName", "creatorId"},
    "source": {"id", "modelId", "setName", "creatorId"},
}


def test_neuronpedias_import_finds_what_its_tables_demand(index: Index, tmp_path: Path) -> None:
    labels = Labels(tmp_path / "labels.sqlite", "an autoencoder")
    labels.propose(0, "mine", by="lexical", kind="lexical", model="m")
    labels.propose(1, "theirs", by="neuronpedia:x", kind="oai_token-act-pair", model="gpt-4o")
    labels.propose(2, "theirs", by="neuronpedia", kind="neuronpedia")
    names = Names("tiny", 1, "res-3")
    folder = neuronpedia.export(index, tmp_path / "np", names, labels=labels)
    for head, columns in DEMANDED.items():
        (record,) = lines(folder / f"{head}.jsonl")
        assert all(record[column] is not None for column in columns)
        assert record["creatorId"] == neuronpedia.CREATOR and record["visibility"] == "PUBLIC"
    # Types and models are foreign keys there, so one that it does not have would stop the whole import.
    found = lines(folder / "explanations" / "batch-0.jsonl.gz")
    assert [(e["typeName"], e["explanationModelName"]) for e in found] == [
        (None, None), ("oai_token-act-pair", "gpt-4o"), (None, None),
    ]  # fmt: skip
    assert found[0]["notes"] == "proposed; by lexical (lexical, m)"
    assert {e["authorId"] for e in found} == {neuronpedia.CREATOR}


def test_a_folder_that_is_there_and_a_layer_that_is_not_are_refused_at_once(
    index: Index, made_sae: SAE, tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="there exists already"):  # before a model is needed
        delphi.export(index, tmp_path / "there", made_sae, None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="layer is -3"):
        Names("gemma-2-2b", -3, "res")


def test_neuronpedia_gets_no_empty_file(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neuronpedia, "BATCH", 2)  # the third latent never fires
    folder = neuronpedia.export(index, tmp_path / "np", NAMES)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.gz"))
    assert files == ["activations/batch-0.jsonl.gz", "features/batch-0.jsonl.gz", "features/batch-1.jsonl.gz"]
    assert all(lines(folder / file) for file in files)


def test_a_batch_holds_so_many_features(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neuronpedia, "BATCH", 2)
    folder = neuronpedia.export(index, tmp_path / "np", NAMES)
    numbers = [[r["index"] for r in lines(folder / "features" / f"batch-{n}.jsonl.gz")] for n in range(2)]
    assert numbers == [["0", "1"], ["2"]] and not (folder / "features" / "batch-2.jsonl.gz").exists()
    record = lines(folder / "features" / "batch-0.jsonl.gz")[0]
    assert (record["hasVector"], record["vector"], record["vectorDefaultSteerStrength"]) == (False, [], None)
    with pytest.raises(UserError, match="exists"):
        neuronpedia.export(index, tmp_path / "np", NAMES)
    with pytest.raises(UserError, match="cannot be the name of a folder"):
        Names("../up", 1, "res")


def test_saedashboard(index: Index, made_sae: SAE, tmp_path: Path) -> None:
    folder = saedashboard.export(index, tmp_path / "sd", NAMES, sae=made_sae)
    assert [path.name for path in sorted(folder.iterdir())] == ["batch-0.json"]
    record = json.loads((folder / "batch-0.json").read_text())
    same_as_golden("saedashboard.json", record)
    for activation in (a for f in record["features"] for a in f["activations"]):
        at = activation["qualifying_token_index"]
        assert activation["values"][at] > 0 and len(activation["tokens"]) == len(activation["values"])


# delphi.


@pytest.fixture(scope="module")
def real(
    sae: SAE, lm: LanguageModel, documents: list[Document], tmp_path_factory: pytest.TempPathFactory
) -> Index:
    out = tmp_path_factory.mktemp("delphi") / "index"
    return build_index(sae, lm, documents, IndexConfig(context=24), out, sae_id="an autoencoder")


def test_delphi_has_every_firing_of_the_index(
    real: Index, sae: SAE, lm: LanguageModel, tmp_path: Path
) -> None:
    folder = delphi.export(real, tmp_path / "latents", sae, lm, context=1, files=3) / "layers.1.resid_post"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["0_31.safetensors", "32_63.safetensors", "64_95.safetensors", "config.json"]
    counts, largest = np.zeros(96, int), np.zeros(96)
    for name in names[:-1]:
        data, first = load_file(folder / name), int(name.split("_")[0])
        assert data["locations"].dtype == np.uint16 and data["locations"].shape == (
            len(data["activations"]),
            3,
        )
        latent = data["locations"][:, 2].astype(int) + first
        assert latent.max() <= int(name.split("_")[1].split(".")[0])
        np.add.at(counts, latent, 1)
        np.maximum.at(largest, latent, data["activations"])
    rows = real.query("SELECT count, max FROM latents ORDER BY latent")
    np.testing.assert_array_equal(counts, [row["count"] for row in rows])
    np.testing.assert_allclose(largest, [row["max"] for row in rows], rtol=1e-4)
    # Tokens stand in each file, and a location points to the token that the page shows.
    page = real.latent(int(counts.argmax()))
    example, start = page.top[0], int(counts.argmax()) // 32 * 32
    data = load_file(folder / f"{start}_{start + 31}.safetensors")
    mine = data["locations"][:, 2] == page.latent - start
    best = int(data["activations"][mine].argmax())
    row, position = data["locations"][mine][best][:2]
    assert data["tokens"][row, position] == example.token_ids[example.position - example.start]


def test_delphi_has_full_rows_of_one_passage_after_the_other(
    real: Index, sae: SAE, lm: LanguageModel, tmp_path: Path
) -> None:
    stream = [
        t for part in real.passages.numbers for row in real.passages.part(part)["tokens"] for t in row.as_py()
    ]
    assert len(stream) % 16  # so that something is left over
    folder = delphi.export(real, tmp_path / "rows", sae, lm, context=16, files=1) / "layers.1.resid_post"
    data = load_file(folder / "0_95.safetensors")
    assert data["tokens"].shape == (len(stream) // 16, 16)
    assert data["tokens"].ravel().tolist() == stream[: data["tokens"].size]
    # The same firings as one by one, and each latent's in the order of the text, on which delphi counts.
    single = load_file(
        delphi.export(real, tmp_path / "one", sae, lm, context=1, files=1)
        / "layers.1.resid_post"
        / "0_95.safetensors"
    )
    flat = data["locations"].astype(int) @ [16, 1, 0]
    kept = single["locations"][:, 0] < data["tokens"].size
    np.testing.assert_array_equal(flat, single["locations"][kept, 0])
    np.testing.assert_array_equal(data["locations"][:, 2], single["locations"][kept, 2])
    np.testing.assert_array_equal(data["activations"], single["activations"][kept])
    assert (np.diff(flat) >= 0).all()
    same_as_golden(
        "delphi.json", json.loads((folder / "config.json").read_text()) | {"model_name": "a model"}
    )


def test_delphi_has_a_file_also_where_nothing_fires(
    real: Index, sae: SAE, lm: LanguageModel, tmp_path: Path
) -> None:
    folder = delphi.export(real, tmp_path / "many", sae, lm, tokens=2, context=2, files=96)
    found = [load_file(path) for path in sorted((folder / "layers.1.resid_post").glob("*.safetensors"))]
    assert len(found) == 96 and 0 < sum(len(data["activations"]) > 0 for data in found) < 96
    assert all(data["locations"].shape == (len(data["activations"]), 3) for data in found)


def test_delphi_of_a_part(real: Index, sae: SAE, lm: LanguageModel, tmp_path: Path) -> None:
    folder = delphi.export(real, tmp_path / "part", sae, lm, tokens=30, context=15, files=1)
    data = load_file(folder / "layers.1.resid_post" / "0_95.safetensors")
    assert 2 <= len(data["tokens"]) <= 3 and data["locations"][:, 0].max() < len(data["tokens"])
    # Whoever may read the one may read the other, though safetensors makes files for their owner alone.
    assert len({path.stat().st_mode for path in (folder / "layers.1.resid_post").iterdir()}) == 1
    with pytest.raises(UserError, match="at least 1"):
        delphi.export(real, tmp_path / "none", sae, lm, files=0)
    with pytest.raises(UserError, match="tokens and a row 256; give more"):
        delphi.export(real, tmp_path / "none", sae, lm, tokens=30)
    assert not (tmp_path / "none").exists()


# Labels from others.

OURS = {"modelId": "gemma-2-2b", "layer": "1-res-3"}
OTHERS = {"modelId": "gemma-2-2b", "layer": "20-gemmascope-res-16k"}


def _file(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in records).encode()))
    return path


def test_explanations_become_proposed_labels_once(index: Index, tmp_path: Path) -> None:
    records = [
        {**OURS, "index": "2", "description": " red  things ", "authorId": "x",
         "typeName": "oai_token-act-pair", "explanationModelName": "gpt-4o"},
        {**OURS, "index": "0", "description": "<script>alert(1)</script>", "authorId": None},
    ]  # fmt: skip
    _file(tmp_path / "export" / "explanations" / "batch-0.jsonl.gz", records)
    _file(
        tmp_path / "export" / "explanations" / "batch-1.jsonl.gz", [{**OURS, "index": 1, "description": "e"}]
    )
    labels = Labels(tmp_path / "labels.sqlite", "an autoencoder")
    assert import_labels(tmp_path / "export", labels, index) == 3
    (label,) = labels.of(2)
    assert (label.text, label.by, label.kind, label.model, label.status) == (
        "red things", "neuronpedia:x", "oai_token-act-pair", "gpt-4o", "proposed",
    )  # fmt: skip
    assert import_labels(tmp_path / "export" / "explanations", labels, index) == 0


def test_labels_come_back_from_our_own_export(index: Index, tmp_path: Path) -> None:
    labels = Labels(tmp_path / "labels.sqlite", "an autoencoder")
    labels.propose(1, "pans", by="me", kind="manual", model="m")
    folder = neuronpedia.export(index, tmp_path / "np", NAMES, labels=labels)
    other = Labels(tmp_path / "other.sqlite", "an autoencoder")
    assert import_labels(folder, other, index) == 1
    # What kind it was stands in the notes alone: Neuronpedia has types of its own.
    assert (other.of(1)[0].text, other.of(1)[0].kind, other.of(1)[0].model) == ("pans", "neuronpedia", None)
    third = Labels(tmp_path / "third.sqlite", "an autoencoder")
    assert import_labels(tmp_path / "np", third, index) == 1  # the folder that was given to the export


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({**OURS, "index": "3", "description": "x"}, "line 2 is of latent 3"),
        ({**OURS, "index": "-1", "description": "x"}, "line 2 is of latent -1"),
        ({**OURS, "index": "x", "description": "x"}, "line 2 is no explanation"),
        ({**OURS, "index": "1"}, "line 2 is no explanation"),
        ({**OURS, "index": "1", "description": ""}, "line 2: the label is empty"),
        ({**OURS, "index": "1", "description": "x" * 501}, "line 2: the label has 501 characters"),
        ({**OURS, "index": "1", "description": ["x"]}, "have to be text"),
        ({**OURS, "index": "1", "description": "x", "authorId": 3}, "have to be text"),
        ({"index": "1", "description": "x"}, "line 2 is no explanation: the field layer"),
        (["x"], "line 2 is no explanation"),
        ('{"modelId": "gemma-2-2b", "layer": "1-r', "JSON Lines, or is damaged, at line 2"),
        ("[" * 100_000, "JSON Lines, or is damaged, at line 2"),
    ],
)
def test_a_broken_line_is_named_and_nothing_is_added(
    index: Index, tmp_path: Path, line: Any, message: str
) -> None:
    good = json.dumps({**OURS, "index": "1", "description": "fine"})
    text = f"{good}\n{line if isinstance(line, str) else json.dumps(line)}\n"
    path = tmp_path / "batch-0.jsonl"
    path.write_text(text)
    labels = Labels(tmp_path / "labels.sqlite", "an autoencoder")
    with pytest.raises(UserError, match=f"batch-0.jsonl.*{message}"):
        import_labels(path, labels, index)
    assert not labels.path.exists()


def test_a_file_that_holds_none_is_named(index: Index, tmp_path: Path) -> None:
    labels = Labels(tmp_path / "labels.sqlite", "an autoencoder")
    path = _file(tmp_path / "explanations" / "batch-0.jsonl.gz", [])
    with pytest.raises(UserError, match="holds explanations of nothing"):
        import_labels(tmp_path, labels, index)
    path.write_bytes(b"no gzip")
    with pytest.raises(UserError, match="is no file of JSON Lines"):
        import_labels(path, labels, index)
    with pytest.raises(UserError, match="holds no explanations"):
        import_labels(tmp_path / "nowhere", labels, index)


def test_labels_of_another_source_are_refused_unless_they_are_meant(
    index: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*more: str) -> str:
        words = ["label", "--index", str(index.folder), "--format", "neuronpedia", "--import", *more]
        code = main(words)
        out, err = capsys.readouterr()
        return f"{code}: {out}{err}"

    other = _file(tmp_path / "other.jsonl.gz", [{**OTHERS, "index": "1", "description": "pans"}])
    mixed = _file(
        tmp_path / "mixed.jsonl.gz",
        [{**OURS, "index": "1", "description": "red"}, {**OTHERS, "index": "9", "description": "no"}],
    )
    models = _file(
        tmp_path / "models.jsonl.gz",
        [
            {**OURS, "index": "1", "description": "red"},
            {**OURS, "modelId": "b", "index": "2", "description": "c"},
        ],
    )
    refused = said(str(other))
    assert refused.startswith("2:") and "explains the source 20-gemmascope-res-16k" in refused
    assert "layers.1.resid_post" in refused and "--source 20-gemmascope-res-16k" in refused
    refused = said(str(mixed))
    assert refused.startswith("2:") and "1-res-3 of gemma-2-2b, 20-gemmascope-res-16k" in refused
    assert said(str(models), "--source", "1-res-3").startswith("2:")
    assert said(str(mixed), "--source", "2-res-3").startswith("2:")
    labels = Labels.of_index(index)
    assert not labels.path.exists()
    assert "1 labels proposed" in said(str(mixed), "--source", "1-res-3")
    assert "1 labels proposed" in said(str(other), "--source", "20-gemmascope-res-16k")
    assert "0 labels proposed" in said(str(other), "--source", "20-gemmascope-res-16k")
    assert sorted(label.text for label in labels.of(1)) == ["pans", "red"]
    labels.path.unlink()


@pytest.mark.parametrize("name", ["batch-0.jsonl.gz", "batch-0.jsonl", "explanations"])
def test_neuronpedias_files_are_told_from_ours(
    index: Index, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [{**OURS, "index": "1", "description": "red"}]
    path = tmp_path / name
    if name == "batch-0.jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        _file(path if path.suffix == ".gz" else path / "batch-0.jsonl.gz", records)
    words = ["label", "--index", str(index.folder), "--import", str(path)]
    assert main(words) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert str(path) in said and "--format neuronpedia" in said
    assert main([*words, "--format", "neuronpedia"]) == 0
    labels = Labels.of_index(index)
    assert [label.text for label in labels.of(1)] == ["red"]
    labels.path.unlink()


def test_export_from_the_command_line(
    tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from unbraid.model.load import load_model

    lm = load_model(tiny_llama)
    sae = build(SAEConfig("topk", lm.d_in, 8, k=2, site="layers.1.resid_post", model_id=lm.id))
    with torch.no_grad():
        sae.W_dec.copy_(torch.eye(8, lm.d_in))
        sae.W_enc.copy_(sae.W_dec.T)
    sae.save_pretrained(tmp_path / "sae")
    (tmp_path / "text.txt").write_text("the red ball and a pan of water " * 40)
    words = [
        "index",
        "--sae",
        str(tmp_path / "sae"),
        "--model",
        str(tiny_llama),
        "--text",
        str(tmp_path / "text.txt"),
    ]
    assert main([*words, "--out", str(tmp_path / "index")]) == 0
    for to, file in (
        ("neuronpedia", "m/1-unbraid/features/batch-0.jsonl.gz"),
        ("saedashboard", "batch-0.json"),
        ("delphi", "layers.1.resid_post/config.json"),
    ):
        out = tmp_path / to
        words = [
            "export",
            "--index",
            str(tmp_path / "index"),
            "--to",
            to,
            "--out",
            str(out),
            "--model-id",
            "m",
        ]
        assert main(words) == 0, capsys.readouterr().err
        assert (out / file).is_file()
