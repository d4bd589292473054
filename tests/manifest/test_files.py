"""Atomic files and resumable folders."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from unbraid.manifest.errors import UserError
from unbraid.manifest.files import building, write_bytes, write_json, write_text, writing


def test_writers_write_and_leave_nothing_beside(tmp_path: Path) -> None:
    write_bytes(tmp_path / "new" / "a.bin", b"\x00\xff")
    write_text(tmp_path / "new" / "b.txt", "ø\r\n")
    write_json(tmp_path / "new" / "c.json", {"b": 1, "a": [2]})
    assert (tmp_path / "new" / "a.bin").read_bytes() == b"\x00\xff"
    assert (tmp_path / "new" / "b.txt").read_bytes() == "ø\r\n".encode()
    assert json.loads((tmp_path / "new" / "c.json").read_text()) == {"a": [2], "b": 1}
    assert len(list((tmp_path / "new").iterdir())) == 3


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_the_umask_says_who_may_read_a_file_whoever_writes_it(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with building(tmp_path / "out") as folder:
            write_bytes(folder / "bytes", b"x")
            write_text(folder / "text", "x")
            write_json(folder / "json", "x")
            with writing(folder / "tensors") as temporary:
                save_file({"x": np.zeros(2)}, temporary)
            with writing(folder / "table") as temporary:
                pq.write_table(pa.table({"x": [1]}), temporary)
    finally:
        os.umask(before)
    found = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert found == dict.fromkeys(("bytes", "text", "json", "tensors", "table"), 0o666 & ~umask)


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    write_json(tmp_path / "a", {"x": 1, "y": 2})
    write_json(tmp_path / "b", {"y": 2, "x": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "f", "old")
    with pytest.raises(RuntimeError), writing(tmp_path / "f") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("f", "old")]


@pytest.mark.parametrize("refusal", [OSError(errno.ENOSPC, "full"), RuntimeError("No space left on device")])
def test_a_full_disk_is_named_with_the_file(tmp_path: Path, refusal: Exception) -> None:
    with pytest.raises(OSError, match="the disk is full") as caught, writing(tmp_path / "shard"):
        raise refusal
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "shard")
    with pytest.raises(OSError, match="the disk is full") as caught, building(tmp_path / "out"):
        raise refusal
    assert ".out.partial" in str(caught.value.filename)


def test_a_file_that_may_not_be_so_large_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="too large") as caught, writing(tmp_path / "shard"):
        raise OSError(errno.EFBIG, "File too large")
    assert caught.value.filename == str(tmp_path / "shard") and not list(tmp_path.iterdir())


def test_a_failing_disk_is_named_with_what_to_do(tmp_path: Path) -> None:
    says = "output error; run the same command again, what was finished is kept"
    for place in (None, str(tmp_path / ".out.partial" / "shard")):
        with pytest.raises(OSError, match=says) as caught, building(tmp_path / "out"):
            raise OSError(errno.EIO, "Input/output error", place)
        assert caught.value.filename == (place or str(tmp_path / ".out.partial"))
    with pytest.raises(FileNotFoundError) as caught, building(tmp_path / "out"):
        (tmp_path / "elsewhere").read_bytes()
    assert caught.value.strerror == "No such file or directory"  # not of what is built


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_a_really_full_device_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="the disk is full"), writing(tmp_path / "shard") as temporary:
        temporary.symlink_to("/dev/full")
        temporary.write_bytes(b"x")
    assert list(tmp_path.iterdir()) == []


def test_building_appears_whole(tmp_path: Path) -> None:
    with building(tmp_path / "deep" / "out") as folder:
        assert folder == tmp_path / "deep" / ".out.partial"
        write_text(folder / "sub" / "f", "x")
        assert not (tmp_path / "deep" / "out").exists()
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]
    assert (tmp_path / "deep" / "out" / "sub" / "f").read_text() == "x"


def test_building_resumes_and_clears_half_files(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), building(out) as folder:
        write_text(folder / "first", "done")
        (folder / ".second.123.writing").write_text("half")
        (folder / ".tmpAb3xQ").write_text("half of what safetensors writes beside its file")
        raise KeyboardInterrupt
    assert not out.exists()
    with building(out) as folder:
        assert (folder / "first").read_text() == "done"
        assert [path.name for path in folder.iterdir()] == ["first"]
    assert (out / "first").read_text() == "done"


def test_building_refuses_what_exists_and_leaves_no_trace_of_a_refusal(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with (
        pytest.raises(UserError, match="exists already; choose another --out or delete it"),
        building(tmp_path / "out"),
    ):
        pass
    with pytest.raises(UserError, match="bad option"), building(tmp_path / "other"):
        raise UserError("bad option")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_is_no_file_to_write(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder; name a file in it"):
        write_text(tmp_path, "x")


def test_building_names_an_impossible_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another --out"), building(tmp_path / "file" / "out"):
        pass


@pytest.mark.skipif(os.name == "nt", reason="Windows has no advisory locks on folders")
def test_two_runs_cannot_build_the_same_folder(tmp_path: Path) -> None:
    with building(tmp_path / "out") as folder:
        write_text(folder / "f", "mine")
        with pytest.raises(UserError, match="another run"), building(tmp_path / "out"):
            pass
        assert (folder / "f").read_text() == "mine"


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is POSIX")
def test_a_killed_run_can_go_on(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from unbraid.manifest.files import building, write_text, writing\n"
        "with building(Path(sys.argv[1])) as folder:\n"
        "    write_text(folder / 'first', 'done')\n"
        "    with writing(folder / 'second') as temporary:\n"
        "        temporary.write_text('half')\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=False)
    assert killed.returncode == -9
    with building(tmp_path / "out") as folder:
        assert [p.name for p in folder.iterdir()] == ["first"]
