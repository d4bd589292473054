"""Disk space is asked for before anything is read, and a disk that fills nonetheless loses nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from unbraid.activations import space
from unbraid.activations.capture import capture, space_of
from unbraid.activations.reading import CaptureConfig
from unbraid.activations.space import Space, parse_size, show_size
from unbraid.activations.text import Document
from unbraid.manifest.errors import UserError
from unbraid.model.load import LanguageModel

from ..small_disk import SmallDisk

Make = Callable[..., Iterator[Document]]
SITES = ("layers.1.resid_post", "layers.0.attn_z")
SMALL = CaptureConfig(sites=SITES, context=64, batch_tokens=256, shard_tokens=200)  # type: ignore[arg-type]
ROW = 2 * 48 * 2 + 12
"""Bytes of a row of two sites of 48 float16 and three int32 columns."""


@pytest.mark.parametrize(
    ("text", "size"),
    [("20GB", 20 * 10**9), ("1.5 kb", 1500), ("512MiB", 2**29), ("7", 7), (" 2TiB ", 2**41)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text, "--disk-budget") == size


@pytest.mark.parametrize("text", ["", "GB", "20 gigs", "-3GB", "0", "0.1", "1e9", "nan", "3B"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--disk-budget .* is no size; give one such as 20GB"):
        CaptureConfig(sites=SITES, disk_budget=text)  # type: ignore[arg-type]


def test_sizes_are_shown() -> None:
    shown = [show_size(n) for n in (999, 1000, 2_345_678, 10**12)]
    assert shown == ["999 bytes", "1.0 kB", "2.3 MB", "1.0 TB"]


def free(monkeypatch: pytest.MonkeyPatch, *answers: int) -> list[int]:
    """Let the disk have so much space, the last answer from then on; the list says what is left of them."""
    left = list(answers)
    asked = lambda _: SimpleNamespace(free=left.pop(0) if len(left) > 1 else left[0])  # noqa: E731
    monkeypatch.setattr(space.shutil, "disk_usage", asked)
    return left


def test_what_is_expected_is_what_is_written(lm: LanguageModel, texts: Make, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, tokens=1500, shard_tokens=500)
    expected = space_of(lm, config, tmp_path / "out")
    assert (expected.row_bytes, expected.rows, expected.copied) == (ROW, 1500, 0)
    size = f"{1500 * ROW / 1000:.1f} kB"
    assert expected.sentence.startswith(f"up to {size} will be written to {tmp_path / 'out'};")
    store = capture(lm, texts(100), config, tmp_path / "out")
    written = sum(shard.stat().st_size for shard in store.shards)
    assert 1500 * ROW < written < 1.01 * 1500 * ROW + 3 * 1000  # and the headers of three shards
    # Links take no space, copies do; what a last shorter shard holds is written again.
    more = dataclasses.replace(config, tokens=700, shard_tokens=500)
    assert space_of(lm, more, tmp_path / "more", store.folder).rows == 700
    assert space_of(lm, dataclasses.replace(config, tokens=None), tmp_path / "more").rows is None


def test_shards_that_cannot_be_linked_count(
    lm: LanguageModel, texts: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = capture(lm, texts(60), dataclasses.replace(SMALL, tokens=450), tmp_path / "old")
    monkeypatch.setattr("unbraid.activations.capture.same_disk", lambda *_: False)
    found = space_of(lm, dataclasses.replace(SMALL, tokens=100), tmp_path / "new", old.folder)
    assert found.rows == 150 and found.copied == sum(shard.stat().st_size for shard in old.shards[:2])
    free(monkeypatch, 150 * ROW + found.copied - 1)
    with pytest.raises(UserError, match=r"new needs [\d.]+ kB for 150 more rows"):
        found.check()
    free(monkeypatch, 150 * ROW + found.copied)
    found.check()


@pytest.mark.parametrize("tokens", [900, None])
def test_no_room_is_told_before_anything_is_read(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int | None
) -> None:
    def unread() -> Iterator[Document]:
        raise AssertionError("the text was read")
        yield

    config = dataclasses.replace(SMALL, tokens=tokens)
    rows = tokens or 200
    free(monkeypatch, rows * ROW - 1)
    says = f"out needs {rows * ROW / 1000:.1f} kB for {rows} more rows, but .* kB are free there; choose"
    with pytest.raises(UserError, match=says) as caught:
        capture(lm, unread(), config, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert ("fewer --tokens" if tokens else "a smaller --shard-tokens") in str(caught.value)
    free(monkeypatch, 10**12)
    config = dataclasses.replace(config, disk_budget=f"{rows * ROW - 1}")
    with pytest.raises(UserError, match=rf"out needs .* for {rows} rows, more than the --disk-budget of"):
        capture(lm, unread(), config, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_of_an_unknown_corpus_every_shard_is_asked_for(
    lm: LanguageModel, texts: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = capture(lm, texts(60), SMALL, tmp_path / "whole")
    assert len(whole.shards) > 5
    tight = dataclasses.replace(SMALL, disk_budget=f"{3 * 200 * ROW}")
    with pytest.raises(UserError, match=r"disk-budget of .*; give a larger one and run the same .* is kept"):
        capture(lm, texts(60), tight, tmp_path / "out")
    partial = tmp_path / ".out.partial"
    kept = len(list(partial.glob("shard-*")))
    assert kept == 3
    with monkeypatch.context() as patch:
        free(patch, 200 * ROW, 200 * ROW, 200 * ROW - 1)
        with pytest.raises(UserError, match="free there; free some space and run the same command again"):
            capture(lm, texts(60), SMALL, tmp_path / "out")
    assert len(list(partial.glob("shard-*"))) == kept + 2
    capture(lm, texts(60), SMALL, tmp_path / "out")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_a_continued_capture_asks_for_the_rest_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    planned = Space(tmp_path / "out", row_bytes=10, shard_rows=5, rows=20, budget=200)
    free(monkeypatch, 50)
    planned.check(15)
    with pytest.raises(UserError, match="needs 60 bytes for 6 more rows, but 50 bytes are free"):
        planned.check(14)


# A disk of its own needs no rights where a process may have its own view of the file systems.
FULL = """
import os, sys
from pathlib import Path
from unbraid.activations.capture import capture
from unbraid.activations.reading import CaptureConfig
from unbraid.activations.documents import Document
from unbraid.activations.space import Space
from unbraid.model.load import load_model

Space.check = lambda *_: None  # the disk fills after it was asked, at the worst moment
lm, disk, tokens = load_model(sys.argv[1]), Path(sys.argv[2]), 8000
config = CaptureConfig(
    sites=("layers.1.resid_post",), tokens=tokens, context=64, batch_tokens=256, shard_tokens=1000
)

def documents():
    for n in range(2000):
        yield Document.of_text("wait red ball " * (1 + n % 20), id=str(n))

ballast = disk / "ballast"

def filling(left):
    def fill(done, total, note=""):
        if done % 1000 > 300 and done > 2000 and not ballast.exists():  # in the middle of a shard
            room = os.statvfs(disk)
            ballast.write_bytes(bytes(room.f_bavail * room.f_frsize - left))
    return fill

for left in (50_000, 8192, 0):
    try:
        capture(lm, documents(), config, disk / "out", progress=filling(left))
    except OSError as error:
        print(f"{error.strerror}: {error.filename}")
    else:
        print("finished")
    print(len(list((disk / ".out.partial").glob("shard-*"))))
    ballast.unlink()
for out in (disk / "out", disk.parent / "whole"):
    capture(lm, documents(), config, out)
"""


def test_a_disk_that_fills_loses_nothing(tiny_llama: Path, small_disk: SmallDisk) -> None:
    said = small_disk.run("-c", FULL, str(tiny_llama), str(small_disk.folder))
    assert len(said) == 6
    shards = [int(line) for line in said[1::2]]
    assert all(
        0 < n < 8 for n in shards
    )  # the second may still have been on its way when the disk was filled
    for sentence in said[::2]:
        assert sentence.startswith("the disk is full; free some space and run the same command again, what")
        assert str(small_disk.folder / ".out.partial") in sentence
    assert bytes_of(small_disk.kept / "out") == bytes_of(small_disk.folder.parent / "whole")
