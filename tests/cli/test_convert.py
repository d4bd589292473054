"""`unbraid convert`: an artifact that verifies, from other tools' files and back to them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from unbraid.cli import main
from unbraid.manifest.identity import sha256_file
from unbraid.manifest.lineage import verify
from unbraid.manifest.record import check_files
from unbraid.sae.base import SAE
from unbraid.sae.crosscoder import CrosscoderSAE


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """An autoencoder of sparsify's whose folder does not say the site."""
    g = torch.Generator().manual_seed(0)
    shapes = {"encoder.weight": (8, 4), "encoder.bias": (8,), "W_dec": (8, 4), "b_dec": (4,)}
    folder = tmp_path / "theirs"
    folder.mkdir()
    save_file({n: torch.randn(s, generator=g) for n, s in shapes.items()}, folder / "sae.safetensors")
    config = {"d_in": 4, "num_latents": 8, "k": 2, "expansion_factor": 2, "normalize_decoder": True}
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def test_a_converted_autoencoder_is_an_artifact(
    theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "ours"
    words = ["--site", "blocks.3.hook_resid_post", "--model-name", "tiny"]
    assert main(["convert", str(theirs), "--out", str(out), *words]) == 0
    assert "read as sparsify" in capsys.readouterr().out
    manifest = check_files(out)
    assert manifest.kind == "sae" and manifest.facts["from"] == "sparsify"
    assert manifest.inputs == {name: sha256_file(theirs / name) for name in ("sae.safetensors", "cfg.json")}
    assert main(["verify", str(out)]) == 0
    sae, x = SAE.from_pretrained(out), torch.randn(20, 4)
    assert str(sae.site) == "layers.3.resid_post" and sae.config.model_name == "tiny"
    assert torch.equal(sae(x).x_hat, SAE.from_pretrained(theirs)(x).x_hat)


def test_a_converted_crosscoder_keeps_its_sites(tmp_path: Path) -> None:
    """Of Llamascopium's, two sites of 3 dimensions and 8 latents."""
    theirs, out, hooks = (
        tmp_path / "theirs",
        tmp_path / "ours",
        [f"blocks.{i}.hook_resid_post" for i in (1, 2)],
    )
    theirs.mkdir()
    g = torch.Generator().manual_seed(0)
    shapes = {"W_E": (2, 3, 8), "b_E": (2, 8), "W_D": (2, 8, 3), "b_D": (2, 3)}
    save_file({n: torch.randn(s, generator=g) for n, s in shapes.items()}, theirs / "sae_weights.safetensors")
    config = {"sae_type": "crosscoder", "d_model": 3, "act_fn": "relu", "norm_activation": "inference"}
    (theirs / "config.json").write_text(json.dumps(config | {"hook_points": hooks}))
    assert main(["convert", str(theirs), "--out", str(out)]) == 0
    assert check_files(out).facts["architecture"] == "crosscoder"
    sae, x = SAE.from_pretrained(out), torch.randn(20, 6, generator=g)
    assert isinstance(sae, CrosscoderSAE) and sae.config.site == ",".join(hooks)
    assert sae.config.blocks == (3, 3) and sae.site_norms().shape == (2, 8)
    assert torch.equal(sae(x).x_hat, SAE.from_pretrained(theirs)(x).x_hat)


def test_there_and_back_again_keeps_the_lineage(theirs: Path, tmp_path: Path) -> None:
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert main(["convert", str(theirs), "--out", str(ours), "--site", "layers.3.resid_post"]) == 0
    assert main(["convert", str(ours), "--out", str(back), "--to", "sparsify"]) == 0
    assert sorted(p.name for p in back.iterdir()) == ["cfg.json", "manifest.json", "sae.safetensors"]
    x = torch.randn(20, 4)
    again = SAE.from_pretrained(back)
    assert torch.equal(again.encode_dense(x), SAE.from_pretrained(theirs).encode_dense(x))
    assert str(again.site) == "layers.3.resid_post"
    report = verify(back)  # follows the input to `ours`
    assert not report.problems and len(report.artifacts) == 2
    (ours / "cfg.json").write_text("{}")
    assert verify(back).problems


def test_nothing_is_overwritten_and_nothing_half_made_stays(
    theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "ours"
    out.mkdir()
    (out / "precious").write_text("kept")
    assert main(["convert", str(theirs), "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["precious"]
    new = tmp_path / "new"
    for words, said in (
        ([str(tmp_path / "nowhere"), "--out", str(new)], "nowhere"),
        ([str(theirs), "--out", str(new), "--site", "layers.x"], "layers.x"),
        ([str(theirs), "--out", str(new), "--k", "3"], "k is 2, not 3"),
    ):
        assert main(["convert", *words]) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1
        assert not new.exists() and not list(tmp_path.glob(".*"))


def test_what_a_killed_run_left_is_not_taken_for_the_result(theirs: Path, tmp_path: Path) -> None:
    left = tmp_path / ".ours.partial"
    left.mkdir()
    (left / "sae.safetensors").write_bytes(b"of another format")
    assert main(["convert", str(theirs), "--out", str(tmp_path / "ours")]) == 0
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == [
        "cfg.json",
        "manifest.json",
        "sae_weights.safetensors",
    ]
