"""Files that want to run code, or are damaged: one sentence with the file's name, and nothing is run."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unbraid.cli import main
from unbraid.manifest.errors import IntegrityError, UserError
from unbraid.sae.base import SAE


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


class Shell:
    """Unpickling it asks a shell to create a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return (os.system, (f"touch '{self.target}'",))


def _config(folder: Path) -> None:
    trainer = {"dict_class": "AutoEncoderTopK", "activation_dim": 4, "dict_size": 8, "k": 2}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer}))


@pytest.mark.parametrize("bomb", [Bomb, Shell])
@pytest.mark.parametrize("name", ["ae.pt", "model.pt", "layer0.sae.pt", "model.pth"])
@pytest.mark.parametrize("old", [True, False])
def test_a_pickle_that_wants_to_run_code_is_refused(
    bomb: type, name: str, old: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, path = tmp_path / "was-run", tmp_path / name
    content = {"encoder.weight": torch.zeros(8, 4), "pre_bias": bomb(target)}
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    torch.load(path, weights_only=False)
    assert target.exists()  # the file is what it is meant to be: an ordinary load runs it
    target.unlink()
    if name == "ae.pt":
        _config(tmp_path)
    with pytest.raises(UserError, match="wants to run code") as caught:
        SAE.from_pretrained(tmp_path)
    assert not target.exists()
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert main(["convert", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert not target.exists() and not (tmp_path / "out").exists()
    assert capsys.readouterr().err.count("\n") == 1


def test_a_bare_pickle_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "was-run"
    (tmp_path / "model.pt").write_bytes(pickle.dumps({"encoder.weight": Bomb(target)}))
    with pytest.raises((UserError, IntegrityError), match=r"model\.pt"):
        SAE.from_pretrained(tmp_path)
    assert not target.exists()


def test_python_objects_in_an_npz_are_refused(tmp_path: Path) -> None:
    target = tmp_path / "was-run"
    np.savez(tmp_path / "params.npz", W_enc=np.array([Bomb(target)], dtype=object))
    with pytest.raises(UserError, match=r"params\.npz.*nothing was read"):
        SAE.from_pretrained(tmp_path)
    (tmp_path / "params.npz").write_bytes(pickle.dumps(Bomb(target)))
    with pytest.raises((UserError, IntegrityError), match=r"params\.npz"):
        SAE.from_pretrained(tmp_path)
    assert not target.exists()


@pytest.mark.parametrize("name", ["ae.pt", "params.npz"])
def test_a_file_cut_off_anywhere_is_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    tensors = {"encoder.weight": torch.randn(8, 4), "b_dec": torch.randn(4)}
    if name == "ae.pt":
        _config(tmp_path)
        torch.save(tensors, path)
    else:
        np.savez(path, **{n: t.numpy() for n, t in tensors.items()})
    whole = path.read_bytes()
    for length in (0, 1, 10, len(whole) // 3, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(IntegrityError, match="damaged") as caught:
            SAE.from_pretrained(tmp_path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_not_a_dictionary_of_tensors_is_said(tmp_path: Path) -> None:
    torch.save([torch.zeros(3)], tmp_path / "model.pt")
    with pytest.raises(UserError, match="not a dictionary"):
        SAE.from_pretrained(tmp_path)
    torch.save({"something": torch.zeros(3)}, tmp_path / "model.pt")
    with pytest.raises(UserError, match="no autoencoder in a known format"):
        SAE.from_pretrained(tmp_path)
    with zipfile.ZipFile(tmp_path / "params.npz", "w") as archive:
        archive.writestr("W_enc.npy", b"not an array")
    (tmp_path / "model.pt").unlink()
    with pytest.raises(IntegrityError, match="damaged"):
        SAE.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["topk", "lista", "gated", "jumprelu_skip_transcoder"])
@pytest.mark.parametrize("width", [3, 4 * 10**12, 10**30])
def test_a_wrong_width_asks_for_no_memory(
    random_sae: Callable[..., SAE], name: str, width: int, tmp_path: Path
) -> None:
    """Ten terabytes or more, or fewer latents than fire: the file's name, and no word of an allocator."""
    random_sae(name).save_pretrained(tmp_path)
    path = tmp_path / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"d_sae": width}))
    with pytest.raises((UserError, IntegrityError), match=re.escape(str(tmp_path))):
        SAE.from_pretrained(tmp_path)
