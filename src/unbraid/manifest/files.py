"""Writing that survives being killed: beside, to the disk, then renamed; readers see all of it or nothing."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unbraid.manifest.errors import UserError

PARTIAL = ".partial"
WRITING = ".writing"
KEPT = "run the same command again, what was finished is kept"


@contextmanager
def writing(path: Path) -> Generator[Path, None, None]:
    """Yield a temporary path beside `path`; on a clean exit flush it to disk and rename it to `path`.

    For libraries that write a file themselves (Parquet, safetensors); its folder is made if it is missing.
    Whoever writes it, the umask says who may read it.  On an error the temporary file is removed and whatever
    stood at `path` stays. Raises OSError, naming `path`, when the disk is full or the system refuses
    otherwise, and UserError where `path` is a folder.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file in it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    with becoming(temporary, path):
        temporary.touch()
        usual = temporary.stat().st_mode
        temporary.unlink()
        yield temporary
        if temporary.stat().st_mode != usual:  # safetensors leaves it to its owner alone
            temporary.chmod(usual)
        settle(temporary, path)


def temporary_beside(path: Path) -> Path:
    """Where a file is written before it is `path`."""
    return path.parent / f".{path.name}.{os.getpid()}{WRITING}"


def settle(temporary: Path, path: Path) -> None:
    """Flush a file to disk and rename it to `path`."""
    _flush(temporary)
    os.replace(temporary, path)
    _flush(path.parent)


@contextmanager
def becoming(temporary: Path, path: Path) -> Generator[None, None, None]:
    """While a file is written that is to be `path`: an error removes it, and names `path` as in `writing`."""
    try:
        yield
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if _disk_is_full(error):
            raise _named(error, path) from error
        # Larger than files may be, and the like, which the system says without a name.
        if isinstance(error, OSError) and error.errno and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file's whole content atomically (see `writing`)."""
    with writing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically, with its newlines as they are."""
    write_bytes(path, text.encode())


def write_json(path: Path, obj: Any) -> None:
    """Write `obj` as indented JSON with sorted keys, so that equal content gives equal bytes; refuses NaN."""
    text = json.dumps(obj, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def partial_of(out: Path) -> Path:
    """The folder in which `out` is being built."""
    return out.parent / f".{out.name}{PARTIAL}"


def is_held(out: Path) -> bool:
    """Whether a run is building `out` now; False also where the system has no locks to tell by (Windows)."""
    try:
        import fcntl

        handle = os.open(partial_of(out), os.O_RDONLY)
    except (ImportError, FileNotFoundError):
        return False
    try:
        # Shared and let go at once: a run that begins at this very moment would be refused, and says so.
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return True
        raise
    finally:
        os.close(handle)
    return False


def require_new(out: Path) -> None:
    """Raise UserError where something exists that is to be made; before long work, as `building` asks too."""
    if out.exists():
        raise UserError(f"{out} exists already; choose another --out or delete it")


@contextmanager
def building(out: Path) -> Generator[Path, None, None]:
    """Yield the folder `.<name>.partial` beside `out`; flush it and rename it to `out` on a clean exit.

    A partial folder left by a killed run is kept and yielded again, so that the caller can go on where it
    stopped. One run at a time may hold it. Raises UserError when `out` exists already, cannot be made, or is
    being built by another run, and OSError, naming the folder or the file in it and saying that the same
    command goes on, when the disk is full or fails.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:[/\\]", str(out)):  # a Path has made one slash of a URL's two
        raise UserError(f"{out} is a URL, where only `unbraid capture` can write; choose a folder for --out")
    out = Path(os.path.abspath(out))
    require_new(out)
    partial = partial_of(out)
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{partial} cannot be made ({error.strerror}); choose another --out") from error
    with held(partial, out):
        # Half a file from a killed run, ours or a library's own (safetensors: .tmp…), is no part of it.
        for stray in partial.rglob(".*"):
            if stray.is_file():
                stray.unlink()
        try:
            yield partial
            _flush_tree(partial)
            os.rename(partial, out)
            _flush(out.parent)
        except BaseException as error:
            if partial.is_dir() and not any(partial.iterdir()):
                shutil.rmtree(partial)  # nothing was done yet: leave no trace of a mistyped option
            place = getattr(error, "filename", None) or partial
            full = _disk_is_full(error)
            if full or (isinstance(error, OSError) and error.errno and str(place).startswith(str(partial))):
                raise _named(error, place) from error
            raise


@contextmanager
def held(folder: Path, out: Path | str) -> Generator[None, None, None]:
    """Hold an advisory lock on a folder where the system has them; it goes when the process dies."""
    try:
        import fcntl
    except ImportError:  # Windows: two runs on one folder are not kept apart there
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(
                    f"{out} is being written by another run; wait for it or choose another --out"
                ) from error
        yield
    finally:
        os.close(handle)


def _flush(path: Path) -> None:
    """Ask the system to put a file, or a folder's list of names, on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open a folder
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _flush_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _flush(path)
    _flush(folder)


def _disk_is_full(error: BaseException) -> bool:
    # safetensors and pyarrow report the system's refusal in errors of their own, so its words count too.
    number = getattr(error, "errno", None)
    return number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)


def _named(error: BaseException, path: Path | str) -> OSError:
    number = getattr(error, "errno", None) or errno.ENOSPC
    advice = str(getattr(error, "strerror", None) or "")
    if _disk_is_full(error):
        advice = f"the disk is full; free some space and {KEPT}"
    elif not advice.endswith(KEPT):
        advice += f"; {KEPT}"
    return OSError(number, advice, str(path))
