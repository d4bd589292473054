"""A capture at a URL is the local one byte for byte, whatever the store does on the way."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from unbraid.activations import cache as caching
from unbraid.activations.cache import Cache, Fetched
from unbraid.activations.capture import capture, space_of
from unbraid.activations.documents import Document
from unbraid.activations.elsewhere import Elsewhere
from unbraid.activations.follow import Following
from unbraid.activations.reading import CaptureConfig
from unbraid.activations.store import ActivationStore
from unbraid.activations.stream import batches
from unbraid.manifest import remote
from unbraid.manifest.errors import IntegrityError, UserError
from unbraid.manifest.files import building
from unbraid.manifest.lineage import verify
from unbraid.manifest.record import check_files
from unbraid.manifest.remote import Remote
from unbraid.model.load import LanguageModel
from unbraid.model.sites import Site
from unbraid.training.config import TrainConfig
from unbraid.training.trainer import train

Make = Callable[..., Iterator[Document]]
SITE = Site(1, "resid_post")
CONFIG = CaptureConfig(sites=(SITE,), context=64, batch_tokens=256, shard_tokens=100)
URL = "flaky://acts"


class Flaky(MemoryFileSystem):
    """A store of its own whose calls fail as they are told: `trouble` sees the call's name, path and bytes
    and returns those bytes, others, or raises."""

    protocol = "flaky"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    trouble: Callable[[str, str, bytes], bytes | None] = staticmethod(lambda call, path, data: data)
    calls: ClassVar[list[tuple[str, str]]] = []
    lock = threading.Lock()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("flaky://").strip("/")

    def told(self, call: str, path: str, data: bytes = b"") -> bytes | None:
        with self.lock:
            self.calls.append((call, path.rsplit("/", 1)[-1]))
            return type(self).trouble(call, path, data)

    def put_file(self, lpath: Any, rpath: Any, *args: Any, **more: Any) -> None:
        data = self.told("put", rpath, Path(lpath).read_bytes())
        if data is not None:
            self.pipe_file(rpath, data)

    def get_file(self, rpath: Any, lpath: Any = None, *args: Any, **more: Any) -> None:
        path = self._strip_protocol(rpath)
        if path not in self.store:
            raise FileNotFoundError(rpath)
        Path(lpath).write_bytes(self.told("get", rpath, self.store[path].getvalue()) or b"")

    def cat_file(self, path: Any, *args: Any, **more: Any) -> Any:
        self.told("cat", path)
        return super().cat_file(path, *args, **more)

    def info(self, path: Any, **more: Any) -> Any:
        self.told("info", path)
        return super().info(path, **more)

    def find(self, path: Any, *args: Any, **more: Any) -> Any:
        self.told("find", path)
        return super().find(path, *args, **more)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.store.clear()
    Flaky.calls.clear()
    monkeypatch.setattr(Flaky, "trouble", staticmethod(lambda call, path, data: data))
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0, 0.0, 0.0))
    monkeypatch.setenv(caching.FOLDER, str(tmp_path / "cache"))


def files_at(url: str) -> dict[str, bytes]:
    return {name: Remote(url).read(name) or b"" for name in Remote(url).sizes()}


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def troubled(monkeypatch: pytest.MonkeyPatch, trouble: Callable[[str, str, bytes], bytes | None]) -> None:
    monkeypatch.setattr(Flaky, "trouble", staticmethod(trouble))


@pytest.fixture()
def whole(lm: LanguageModel, texts: Make, tmp_path: Path) -> ActivationStore:
    return capture(lm, texts(40), CONFIG, tmp_path / "whole")


# --- writing ---


@pytest.mark.parametrize("url", [URL, "memory://room/acts", "file://{}/acts"])
def test_a_capture_at_a_url_is_the_local_one(
    lm: LanguageModel, texts: Make, tmp_path: Path, whole: ActivationStore, url: str
) -> None:
    url = url.format(tmp_path)
    store = capture(lm, texts(40), CONFIG, url)
    assert files_at(url) == files_in(Path(whole.folder)) and len(whole.shards) > 5
    assert store.id == whole.id and store.folder == str(store) == url
    assert not list((tmp_path / "cache" / "sending").iterdir())  # nothing stays here
    assert [*store.documents()] == [*whole.documents()]
    assert verify(url).problems == ()
    with pytest.raises(UserError, match=r"exists already"):
        capture(lm, texts(40), CONFIG, url)


def test_no_more_than_two_shards_lie_here(
    lm: LanguageModel, texts: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def look(call: str, path: str, data: bytes) -> bytes:
        seen.append(len(list((tmp_path / "cache" / "sending").glob("*/*shard-*"))))
        return data

    troubled(monkeypatch, look)
    store = capture(lm, texts(40), replace(CONFIG, skip_norm_above=1.5), URL)
    assert 1 <= max(seen) <= 2 < len(store.shards)


@pytest.mark.parametrize("seed", range(3))
def test_a_store_that_fails_one_call_in_fifty_is_asked_again(
    lm: LanguageModel,
    texts: Make,
    whole: ActivationStore,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    chance, failed = random.Random(seed), []

    def trouble(call: str, path: str, data: bytes) -> bytes:
        if chance.random() < 1 / 50:
            failed.append(call)
            if call == "put" and chance.random() < 0.5:
                return data[: len(data) // 2]  # what arrives is cut, and nobody says so
            raise chance.choice([OSError("reset"), TimeoutError("slow"), RuntimeError("503")])
        return data

    troubled(monkeypatch, trouble)
    store = capture(lm, texts(40), CONFIG, URL)
    read = list(batches(store, SITE, 32, seed=1, epochs=1))
    assert failed
    assert all(map(torch.equal, read, batches(whole, SITE, 32, seed=1, epochs=1)))
    troubled(monkeypatch, lambda call, path, data: data)
    assert files_at(URL) == files_in(Path(whole.folder))


@pytest.mark.parametrize("call", ["put", "info"])
@pytest.mark.parametrize("more", [{}, {"skip_norm_above": 1.5}], ids=str)
def test_a_store_that_is_gone_is_named_and_the_same_command_goes_on(
    lm: LanguageModel, texts: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: Any, call: str
) -> None:
    config = replace(CONFIG, **more)
    whole = capture(lm, texts(40), config, tmp_path / "local")

    def gone(now: str, path: str, data: bytes) -> bytes:
        if now == call and path.endswith("shard-00004.safetensors"):
            raise ConnectionError("no route")
        return data

    troubled(monkeypatch, gone)
    with pytest.raises(OSError, match=r"cannot be written .no route., tried 5 times; run the same") as caught:
        capture(lm, texts(40), config, URL)
    assert caught.value.filename == f"{URL}/shard-00004.safetensors"
    with pytest.raises(UserError, match=r"flaky://acts is not .* it has no manifest.json"):
        ActivationStore(URL)
    troubled(monkeypatch, lambda call, path, data: data)
    Flaky.calls.clear()
    capture(lm, texts(40), config, URL)
    again = {name for call, name in Flaky.calls if call == "put" and name.startswith("shard-")}
    assert again == {path.name for path in whole.shards[4:]}  # and nothing that was there
    assert files_at(URL) == files_in(tmp_path / "local")


@pytest.mark.parametrize("lost", [None, "shard-00001.safetensors", "settings.json", "shards.jsonl"])
def test_another_machine_goes_on_and_what_vanished_is_made_again(
    lm: LanguageModel, texts: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str | None
) -> None:
    config = replace(CONFIG, skip_norm_above=1.5)
    capture(lm, texts(40), config, tmp_path / "local")

    def gone(call: str, path: str, data: bytes) -> bytes:
        if "shard-00004" in path:
            raise ConnectionError("no route")
        return data

    troubled(monkeypatch, gone)
    with pytest.raises(OSError, match=r"no route"):
        capture(lm, texts(40), config, URL)
    troubled(monkeypatch, lambda call, path, data: data)
    monkeypatch.setenv(caching.FOLDER, str(tmp_path / "other"))
    if lost is not None:
        Remote(URL).remove(lost)
    if lost == "settings.json":  # then nobody knows whose files these are
        with pytest.raises(UserError, match=r"holds other files, such as"):
            capture(lm, texts(40), config, URL)
        return
    Flaky.calls.clear()
    capture(lm, texts(40), config, URL)
    first = min(name for call, name in Flaky.calls if call == "put" and name.startswith("shard-0"))
    assert first == {None: "shard-00004.safetensors", "shards.jsonl": "shard-00000.safetensors"}.get(
        lost, lost
    )
    assert files_at(URL) == files_in(tmp_path / "local")


def test_a_shard_that_vanishes_before_the_end_is_made_again(
    lm: LanguageModel, texts: Make, whole: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def vanishing(call: str, path: str, data: bytes) -> bytes:
        if call == "put" and path.endswith("documents.jsonl"):
            del Flaky.store["/acts/shard-00002.safetensors"]
        return data

    troubled(monkeypatch, vanishing)
    with pytest.raises(IntegrityError, match=r"has lost what was sent .*shard-00002.*run the same command"):
        capture(lm, texts(40), CONFIG, URL)
    assert "manifest.json" not in files_at(URL)
    troubled(monkeypatch, lambda call, path, data: data)
    capture(lm, texts(40), CONFIG, URL)
    assert files_at(URL) == files_in(Path(whole.folder))


def test_other_settings_and_other_files_are_refused(
    lm: LanguageModel, texts: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(call: str, path: str, data: bytes) -> bytes:
        if "shard-00002" in path:
            raise PermissionError("denied")
        return data

    troubled(monkeypatch, gone)
    with pytest.raises(
        UserError, match=r"shard-00002.safetensors may not be written .denied.; check the rights"
    ):
        capture(lm, texts(40), CONFIG, URL)
    troubled(monkeypatch, lambda call, path, data: data)
    with pytest.raises(UserError, match=r"flaky://acts was begun with other settings .dtype."):
        capture(lm, texts(40), replace(CONFIG, dtype="float32"), URL)
    assert len([name for name in files_at(URL) if name.startswith("shard-")]) == 2
    Flaky.store.clear()
    fsspec.filesystem("flaky").pipe_file("/acts/notes.txt", b"mine")
    with pytest.raises(UserError, match=r"holds other files, such as notes.txt"):
        capture(lm, texts(40), CONFIG, URL)


def test_a_wrong_option_leaves_nothing_at_the_url(lm: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no token of an assistant"):
        capture(lm, [Document.of_text("red ball")], replace(CONFIG, positions="reply"), URL)
    assert not files_at(URL) and not list((tmp_path / "cache" / "sending").iterdir())


KILLED = """
import os, signal, sys
from unbraid.activations import elsewhere
from unbraid.activations.capture import capture
from unbraid.activations.reading import CaptureConfig
from unbraid.activations.documents import Document
from unbraid.model.load import load_model

class Dying(elsewhere.Elsewhere):
    def __init__(self, *args):
        super().__init__(*args)
        put, left = self.remote._fs.put_file, [kill]
        def dying(lpath, rpath):
            left[0] -= 1
            if left[0]:
                return put(lpath, rpath)
            open(rpath, "wb").write(open(lpath, "rb").read()[:-7])  # in the middle of writing it
            os.kill(os.getpid(), signal.SIGKILL)
        self.remote._fs.put_file = dying

import unbraid.activations.capture as room
room.Elsewhere = Dying
config = CaptureConfig(sites=("layers.1.resid_post",), context=64, batch_tokens=256, shard_tokens=100,
                       skip_norm_above=1.5)
texts = [Document.of_text(f"{n} wait " + "red ball " * (n % 40)) for n in range(40)]
lm = load_model(sys.argv[1])
for kill in map(int, sys.argv[3:]):
    if child := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(code, os.path.exists(sys.argv[2][7:] + "/manifest.json"), flush=True)
        continue
    capture(lm, texts, config, sys.argv[2])
    os._exit(0)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_while_it_sends_a_capture_goes_on(tiny_llama: Path, lm: LanguageModel, tmp_path: Path) -> None:
    config = replace(CONFIG, skip_norm_above=1.5)
    documents = [Document.of_text(f"{n} wait " + "red ball " * (n % 40)) for n in range(40)]
    local = capture(lm, documents, config, tmp_path / "local")
    url = f"file://{tmp_path}/acts"
    assert 1 + 3 * len(local.shards) > 10
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    # Sent are the settings, and of each shard itself, its skipped tokens and its record.
    command = [sys.executable, "-c", KILLED, str(tiny_llama), url, "1", "8", "9", "10"]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert run.stdout.split() == [str(-signal.SIGKILL), "False"] * 4, run.stderr[-2000:]
    capture(lm, documents, config, url)
    assert files_in(tmp_path / "acts") == files_in(tmp_path / "local")


def test_a_torn_manifest_is_no_capture(
    lm: LanguageModel, texts: Make, tmp_path: Path, whole: ActivationStore
) -> None:
    url = f"file://{tmp_path}/acts"
    capture(lm, texts(40), CONFIG, url)
    manifest = tmp_path / "acts" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:100])
    with pytest.raises(UserError, match=r"is not JSON"):
        ActivationStore(url)
    capture(lm, texts(40), CONFIG, url)
    assert files_in(tmp_path / "acts") == files_in(Path(whole.folder))


@pytest.mark.parametrize(("old", "new"), [("here", "url"), ("url", "here"), ("url", "url")])
def test_appending_from_and_to_a_url(
    lm: LanguageModel, texts: Make, tmp_path: Path, old: str, new: str
) -> None:
    first = replace(CONFIG, tokens=450)
    local = capture(lm, texts(40), first, tmp_path / "first")
    expected = capture(lm, texts(40), replace(CONFIG, tokens=300), tmp_path / "both", append=local.folder)
    before = local.folder if old == "here" else capture(lm, texts(40), first, URL).folder
    out = tmp_path / "out" if new == "here" else "flaky://more"
    found = capture(lm, texts(40), replace(CONFIG, tokens=300), out, append=before)
    assert found.id == expected.id
    made = files_in(tmp_path / "out") if new == "here" else files_at("flaky://more")
    differ = {name for name, data in files_in(tmp_path / "both").items() if made[name] != data}
    assert differ <= {"manifest.json"}  # which says where the old one lies
    paths = {"url": URL, "here": None}[old]
    assert (found.manifest.paths or {}).get("appended") == paths


def test_the_space_here_is_that_of_the_shards_on_their_way(lm: LanguageModel, tmp_path: Path) -> None:
    large = replace(CONFIG, tokens=10**12)
    space = space_of(lm, large, URL)
    space.check()
    assert space.by == Elsewhere(URL).staging and f"by way of {space.by}" in space.sentence
    with pytest.raises(
        UserError, match=r"flaky://acts needs .* at a time in .* more than the --disk-budget of"
    ):
        space_of(lm, replace(large, disk_budget="10kB"), URL).check()


# --- reading ---


@pytest.fixture()
def store(whole: ActivationStore) -> Iterator[ActivationStore]:
    for name, data in files_in(Path(whole.folder)).items():
        fsspec.filesystem("flaky").pipe_file(f"/acts/{name}", data)
    yield ActivationStore(URL)


def test_the_stream_is_that_of_the_local_copy_and_each_shard_comes_once(
    store: ActivationStore, whole: ActivationStore
) -> None:
    mine = list(batches(store, SITE, 32, seed=1, epochs=2, buffer_shards=2))
    local = list(batches(whole, SITE, 32, seed=1, epochs=2, buffer_shards=2))
    assert len(mine) == len(local) and all(map(torch.equal, mine, local))
    came = [name for call, name in Flaky.calls if call == "get"]
    assert sorted(came) == [path.name for path in whole.shards]
    assert store.columns(1).tokens.equal(whole.columns(1).tokens)


def test_autoencoders_of_either_are_the_same_bytes(
    store: ActivationStore, whole: ActivationStore, tmp_path: Path
) -> None:
    config = TrainConfig(
        architecture="topk", d_sae=64, k=4, steps=12, batch_size=64, calibration_tokens=128, threads=1
    )
    for name, source in (("remote", store), ("local", whole)):
        train([source], "layers.1.resid_post", config, tmp_path / name)
    made, expected = (files_in(tmp_path / name) for name in ("remote", "local"))
    assert {name for name in expected if made[name] != expected[name]} <= {"manifest.json", "log.jsonl"}
    assert check_files(tmp_path / "remote").id == check_files(tmp_path / "local").id
    assert (check_files(tmp_path / "remote").paths or {})["activations"] == URL
    assert verify(tmp_path / "remote").problems == ()


def test_a_cache_that_cannot_hold_all_reads_in_order_and_refuses_to_shuffle(
    store: ActivationStore, whole: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 8 * whole.shards[0].stat().st_size
    assert sum(path.stat().st_size for path in whole.shards) > size
    monkeypatch.setenv(caching.SIZE, str(size))
    with pytest.raises(
        UserError, match=r"more than the cache of .* set UNBRAID_CACHE_SIZE higher, or read in"
    ):
        next(batches(ActivationStore(URL), SITE, 32, seed=0, epochs=1))
    largest: list[int] = []

    def look(call: str, path: str, data: bytes) -> bytes:
        folder = tmp_path / "cache" / "shards"
        largest.append(sum(size for _, _, size in caching._files(folder)) if folder.exists() else 0)
        return data

    troubled(monkeypatch, look)
    mine = Following(URL, buffer_tokens=150).batches([SITE], 32, seed=0, steps=80)
    local = Following(whole.folder, buffer_tokens=150).batches([SITE], 32, seed=0, steps=80)
    for one, other in zip(mine, local, strict=True):
        assert torch.equal(one[SITE], other[SITE])
    assert 0 < max(largest) <= size
    monkeypatch.setenv(caching.SIZE, "10kB")
    with pytest.raises(UserError, match=r"too small; set UNBRAID_CACHE_SIZE to"):
        ActivationStore(URL)


def test_what_was_not_used_for_longest_goes_first(store: ActivationStore, tmp_path: Path) -> None:
    size = store.manifest.files["shard-00000.safetensors"].bytes
    cache = Cache(tmp_path / "lru", 8 * size + 100)
    fetched = Fetched(Remote(URL), "activations", cache, check=False)
    names = [f"shard-{i:05d}.safetensors" for i in range(8)]
    for moment, name in enumerate(names):
        os.utime(fetched.path(name), (moment, moment))
    fetched.open(names[0]).close()  # used just now
    fetched.open("shard-00008.safetensors").close()
    there = {name for name in names if fetched.home(name).exists()}
    assert there == set(names) - {names[1]}


def test_truncated_and_changed_downloads_are_noticed(
    store: ActivationStore, whole: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad: list[str] = []

    def once(call: str, path: str, data: bytes) -> bytes:
        if call == "get" and path.endswith("shard-00001.safetensors") and not bad:
            bad.append(path)
            return data[:-9]
        return data

    troubled(monkeypatch, once)
    assert store.read(SITE, 1).equal(whole.read(SITE, 1)) and bad  # one bad copy on the way costs another

    troubled(
        monkeypatch, lambda call, path, data: data[:-1] + bytes([data[-1] ^ 1]) if call == "get" else data
    )
    with pytest.raises(IntegrityError, match=r"flaky://acts/shard-00002.safetensors was changed: its blake3"):
        store.read(SITE, 2)
    with pytest.raises(OSError, match=r"cannot be read"):
        troubled(monkeypatch, lambda call, path, data: (_ for _ in ()).throw(OSError("reset")))
        store.read(SITE, 3)
    troubled(monkeypatch, lambda call, path, data: data)
    assert store.read(SITE, 2).equal(whole.read(SITE, 2)) and store.read(SITE, 3).equal(whole.read(SITE, 3))


@pytest.mark.parametrize("over_at_once", [False, True])
def test_a_full_disk_here_is_not_the_stores_fault(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch, over_at_once: bool
) -> None:
    if over_at_once:  # a file's coming has ended, badly, before anybody waits for it

        class Thread(threading.Thread):
            def start(self) -> None:
                super().start()
                self.join()

        monkeypatch.setattr(threading, "Thread", Thread)

    def full(call: str, path: str, data: bytes) -> bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    troubled(monkeypatch, full)
    with pytest.raises(OSError, match=r"the disk is full; free some space"):
        store.read(SITE, 0)
    # Tried ahead, and by who needs it where that failed before anybody waited: not as the store's fault is.
    assert [call for call, _ in Flaky.calls].count("get") in ([2] if over_at_once else [1, 2])


def test_damage_at_the_url_is_named_when_it_is_opened(store: ActivationStore) -> None:
    shard = "/acts/shard-00003.safetensors"
    data = Flaky.store[shard].getvalue()
    files = fsspec.filesystem("flaky")
    files.pipe_file(shard, data[:-1])
    with pytest.raises(IntegrityError, match=r"flaky://acts/shard-00003.safetensors has \d+ bytes where"):
        ActivationStore(URL)
    files.pipe_file(shard, data[:-1] + bytes([data[-1] ^ 1]))
    ActivationStore(URL)
    for check in (lambda: ActivationStore(URL, check=True), lambda: store.file("shard-00003.safetensors")):
        with pytest.raises(IntegrityError, match=r"shard-00003.safetensors was changed: its blake3 is"):
            check()
    assert "shard-00003.safetensors was changed" in verify(URL).problems[0]
    files.rm_file(shard)
    with pytest.raises(IntegrityError, match=r"flaky://acts/shard-00003.safetensors is missing"):
        ActivationStore(URL)
    files.pipe_file(shard, data)
    files.pipe_file("/acts/extra", b"1")
    assert "extra is not listed" in verify(URL).problems[0]


def test_a_file_that_lost_its_bytes_in_the_cache_comes_again(
    store: ActivationStore, whole: ActivationStore
) -> None:
    store.file("shard-00000.safetensors").write_bytes(b"")
    assert store.read(SITE, 0).equal(whole.read(SITE, 0))


# --- URLs ---


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nowhere://bucket/acts", "cannot be opened .*nowhere.* a protocol that fsspec knows"),
        ("s3://", "names no folder"),
        ("ftp://me:secret@host/acts", "^the ftp URL holds a password"),
        ("https://host/acts?signature=1", "give it without ?"),
        ("simplecache::s3://bucket/acts", "give it without ::"),
    ],
)
def test_wrong_urls_are_told_in_a_sentence(url: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        ActivationStore(url)
    assert "secret" not in str(caught.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(
        UserError, match=r"s3://bucket/acts needs a package that is not installed: Install s3fs"
    ):
        Elsewhere("s3://bucket/acts")


def test_a_url_where_a_folder_is_meant_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"only `unbraid capture` can write"),
        building(Path("s3://bucket/sae")),
    ):
        pass


def test_nothing_of_it_is_imported_for_folders() -> None:
    code = (
        "import sys, importlib.abc\n"
        "class No(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name in ('s3fs', 'gcsfs'): raise SystemExit(name)\n"
        "sys.meta_path.insert(0, No())\n"
        "import unbraid.manifest.remote, unbraid.manifest.lineage\n"
        "print('fsspec' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
