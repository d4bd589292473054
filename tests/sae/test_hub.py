"""Autoencoders by repository name: from huggingface_hub's own cache layout, with the network switched off,
and sent to a stand-in for the Hub on this machine, with huggingface_hub's own client.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import torch

from unbraid.cli import main
from unbraid.manifest.errors import IntegrityError, UserError
from unbraid.manifest.record import write_manifest
from unbraid.sae.base import SAE
from unbraid.sae.formats.hub import is_repository, locate, push

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_standin"


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


class StandIn(ThreadingHTTPServer):
    """As much of the Hub's interface as one push and one fetch use."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories: dict[str, dict[str, bytes]] = {}
        """Files by path, by repository."""
        self.visibility: dict[str, str] = {}
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    """One request."""

    server: StandIn

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append(f"POST {self.path}")
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self._send({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            known = name in self.server.repositories
            self.server.repositories.setdefault(name, {})
            self.server.visibility.setdefault(name, asked["visibility"])
            return self._send({"url": f"{self.server.url}/{name}"}, 409 if known else 200)
        _, _, _, owner, name, what, _ = self.path.split("/")
        if what == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            plain = {"uploadMode": "regular", "shouldIgnore": False}
            return self._send({"files": [{"path": path, **plain} for path in paths]})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.server.repositories[f"{owner}/{name}"][line["value"]["path"]] = content
        return self._send(
            {
                "success": True,
                "commitOid": COMMIT,
                "commitUrl": f"{self.server.url}/{owner}/{name}/commit/{COMMIT}",
            }
        )

    def do_GET(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        parts = unquote(self.path).split("?")[0].strip("/").split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        files = self.server.repositories.get(name)
        private = self.server.visibility.get(name) == "private"
        if files is None or (private and self.headers["Authorization"] != f"Bearer {TOKEN}"):
            return self._send({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        if parts[0] == "api" and parts[4:5] == ["tree"]:
            tree = [{"type": "file", "path": p, "size": len(c), "oid": _oid(c)} for p, c in files.items()]
            return self._send(tree)
        if parts[0] == "api":
            return self._send({"id": name, "private": private, "sha": COMMIT})
        path = "/".join(parts[4:])
        if path not in files:
            return self._send({"error": "no entry"}, 404, {"X-Error-Code": "EntryNotFound"})
        content = files[path]
        return self._send(content, 200, {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def _send(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """The stand-in, an empty cache, and a token; huggingface_hub takes its endpoint from its constants."""
    from huggingface_hub import constants

    server = StandIn()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_what_is_pushed_is_fetched_again(
    hub: StandIn, random_sae: Callable[..., SAE], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An artifact with everything that its manifest lists, into a private repository that the push makes."""
    folder, sae = tmp_path / "sae", random_sae("topk")
    sae.save_pretrained(folder)
    (folder / "log[1].jsonl").write_text("{}\n")
    write_manifest(folder, kind="sae", command="unbraid train", seed=0, inputs={}, facts={})
    assert main(["push", str(folder), "owner/saes", "--subfolder", "layers.1"]) == 0
    assert capsys.readouterr().out == f"{folder}: sent to {hub.url}/owner/saes/tree/main/layers.1\n"
    assert hub.visibility == {"owner/saes": "private"}
    here = {f"layers.1/{file.name}": file.read_bytes() for file in folder.iterdir()}
    assert hub.repositories == {"owner/saes": here} and len(here) == 4
    again = SAE.from_pretrained("owner/saes", "layers.1")
    assert again.config == sae.config and torch.equal(again.W_enc, sae.W_enc)
    (folder / "cfg.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"cfg\.json"):
        push(folder, "owner/other")
    assert list(hub.repositories) == ["owner/saes"]


def test_nothing_but_the_autoencoder_is_sent(
    hub: StandIn, random_sae: Callable[..., SAE], tmp_path: Path
) -> None:
    random_sae("relu").save_pretrained(tmp_path / "sae")
    (tmp_path / "sae" / "notes.txt").write_text("private")
    push(tmp_path / "sae", "owner/saes")
    assert sorted(hub.repositories["owner/saes"]) == ["cfg.json", "sae_weights.safetensors"]
    url = random_sae("relu").push_to_hub("owner/open", public=True)
    assert url == f"{hub.url}/owner/open" and hub.visibility["owner/open"] == "public"
    assert sorted(hub.repositories["owner/open"]) == ["cfg.json", "sae_weights.safetensors"]


def test_a_public_repository_is_sent_to_only_when_that_is_said(
    hub: StandIn, random_sae: Callable[..., SAE]
) -> None:
    hub.repositories["owner/open"], hub.visibility["owner/open"] = {}, "public"
    with pytest.raises(UserError, match="nothing was sent to owner/open, which is public"):
        random_sae("relu").push_to_hub("owner/open")
    assert not hub.repositories["owner/open"]
    assert not any("commit" in request or "preupload" in request for request in hub.requests)
    random_sae("relu").push_to_hub("owner/open", public=True)
    assert hub.repositories["owner/open"]


def test_without_token_rights_or_network_there_is_one_sentence(
    hub: StandIn,
    random_sae: Callable[..., SAE],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from huggingface_hub import constants

    random_sae("relu").save_pretrained(tmp_path / "sae")

    def said(*words: str) -> str:
        assert main(["push", str(tmp_path / "sae"), *words]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        return err

    assert "write owner/name" in said("saes")
    assert "leads out" in said("owner/saes", "--subfolder", "../else")
    monkeypatch.delenv("HF_TOKEN")
    assert "no token of the Hub; run `hf auth login`" in said("owner/saes")
    assert not hub.requests
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    assert "401" in said("owner/saes")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert "owner/saes could not be written (ConnectError" in said("owner/saes")
    assert not hub.repositories
