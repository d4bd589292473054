"""Autoencoders by repository name, from huggingface_hub's own cache layout, with the network switched off."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from unbraid.manifest.errors import UserError
from unbraid.sae.base import SAE
from unbraid.sae.formats.hub import is_repository, locate

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; huggingface_hub reads its settings once, so they are changed where it keeps them."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def _publish(cache: Path, repository: str, folder: Path, subfolder: str) -> None:
    """Put a folder into the cache as a download would: blobs, and a snapshot of links to them."""
    root = cache / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT / subfolder
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(sorted(folder.iterdir())):
        blob = root / "blobs" / f"{number:040x}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(blob)


def test_a_folder_of_a_repository_is_loaded_offline(
    cache: Path, random_sae: Callable[..., SAE], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = random_sae("topk")
    sae.save_pretrained(tmp_path / "local")
    _publish(cache, "owner/saes", tmp_path / "local", "layers.1")
    monkeypatch.chdir(tmp_path)
    for revision in (None, "main", COMMIT):
        again = SAE.from_pretrained("owner/saes", "layers.1", revision=revision)
        assert torch.equal(again.W_enc, sae.W_enc) and again.config == sae.config
    with pytest.raises(UserError, match=r"no folder 'layers.2' here; it has 'layers.1'"):
        SAE.from_pretrained("owner/saes", "layers.2")
    for subfolder in ("../../..", "/etc"):
        with pytest.raises(UserError, match="leads out"):
            SAE.from_pretrained("owner/saes", subfolder)
    with pytest.raises(UserError, match="owner/other is neither a local folder nor a repository"):
        SAE.from_pretrained("owner/other", "layers.1")


def test_a_local_path_comes_before_a_repository(
    cache: Path, random_sae: Callable[..., SAE], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_sae("topk", seed=1).save_pretrained(tmp_path / "remote")
    _publish(cache, "owner/saes", tmp_path / "remote", "layers.1")
    local = random_sae("topk", seed=2)
    local.save_pretrained(tmp_path / "owner" / "saes" / "layers.1")
    monkeypatch.chdir(tmp_path)
    assert torch.equal(SAE.from_pretrained("owner/saes", "layers.1").W_enc, local.W_enc)
    assert torch.equal(SAE.from_pretrained(Path("owner/saes/layers.1")).W_enc, local.W_enc)


def test_the_environment_alone_is_enough(
    cache: Path, random_sae: Callable[..., SAE], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fresh process with HF_HUB_CACHE and HF_HUB_OFFLINE=1, as a user has it."""
    random_sae("relu").save_pretrained(tmp_path / "local")
    _publish(cache, "owner/saes", tmp_path / "local", "layers.1")
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code = "from unbraid.sae.formats.hub import locate; print(locate('owner/saes', 'layers.1'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (Path(done.stdout.strip()) / "cfg.json").is_file()


def test_what_is_a_repository() -> None:
    assert is_repository("google/gemma-scope-2b-pt-res")
    for name in ("folder", "a/b/c", "./a/b", "/a/b", "../a", "a\\b", "a/b c"):
        assert not is_repository(name)
    with pytest.raises(UserError, match="leads out"):
        locate("anywhere", "../else")
