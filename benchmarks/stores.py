"""What `capture.py` measures of the store: against the Arrow cache, int8's error, memory over a long run."""

from __future__ import annotations

import gc
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from subjects import BATCH_TOKENS, CONTEXT, real, stories, tiny
from turns import Result, timed, turns

from training import synthetic
from unbraid.activations import shardfile
from unbraid.activations.capture import capture
from unbraid.activations.documents import Document
from unbraid.activations.reading import CaptureConfig
from unbraid.activations.rows import Stored
from unbraid.activations.shards import ShardWriter
from unbraid.activations.store import KIND, ActivationStore
from unbraid.activations.stream import batches
from unbraid.manifest.files import building
from unbraid.manifest.record import write_manifest
from unbraid.model.sites import Site

D, SHARD = 512, 32_768
"""Of the store's rows: their width, and how many in a file."""
READ = 4096
"""Rows in a shuffled batch."""


def rows_to_store(rows: int, seed: int = 0) -> torch.Tensor:
    """Rows (rows, D) in float32, as a model gives them."""
    return torch.from_numpy(synthetic(rows, D, 4 * D, seed))


def write_store(folder: Path, x: torch.Tensor, dtype: Stored = "float16") -> None:
    """Write rows as `capture` does, to the manifest and the disk."""
    settings = {"shard_tokens": SHARD, "dtype": dtype}
    with building(folder) as partial:
        writer = ShardWriter(partial, settings, widths={"layers.0.resid_post": D})
        zeros = torch.zeros(BATCH_TOKENS, dtype=torch.int32)
        columns = {"tokens": zeros, "documents": zeros, "positions": zeros}
        for part in x.split(BATCH_TOKENS):
            writer.add({"layers.0.resid_post": part}, columns, "")
        writer.close()
        facts = {
            "model": "none", "sites": ["layers.0.resid_post"], "d_in": D, "tokens": len(x), "documents": 1,
            "context": CONTEXT, "positions": "all", "dtype": dtype, "shard_tokens": SHARD,
        }  # fmt: skip
        inputs = {"model": "", "tokenizer": "", "corpus": ""}
        known = writer.files()
        write_manifest(partial, kind=KIND, command="", seed=0, inputs=inputs, facts=facts, known=known)


def in_cache(write: Callable[[], None]) -> None:
    """Write without waiting for the disk, which is all that Arrow's writer does: ours waits by itself."""
    with patch.object(os, "fsync"), patch.object(shardfile, "_ASK", None):
        write()


def to_disk(write: Callable[[], None], folder: Path) -> None:
    """Write and wait until the disk has it, as ours does by itself."""
    write()
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)


def forget(folder: Path) -> int:
    """Ask the system to drop a folder's files from its cache; how many bytes they have."""
    gc.collect()  # what is still mapped cannot be dropped
    size = 0
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            size += os.fstat(handle).st_size
            os.close(handle)
    return size


def fetched() -> int:
    """Bytes that this process has had fetched from storage."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))


Stream = Callable[[], Iterator[torch.Tensor]]
"""Begins an endless stream of shuffled batches."""


def draw(stream: Iterator[torch.Tensor], rows: int) -> float:
    """Seconds that the next rows take in batches, of each of which a number is looked at."""
    return timed(lambda: [float(batch[0, 0]) for batch in islice(stream, rows // READ)])


def cold(begin: Stream, rows: int, folder: Path) -> Callable[[], float]:
    """A job that draws from a new stream over files that are in no cache of this system."""

    def job() -> float:
        size, before = forget(folder), fetched()
        seconds = draw(begin(), rows)
        if fetched() - before < 0.8 * size:
            raise SystemExit(f"{folder}: only {fetched() - before:,} of {size:,} bytes came from storage")
        return seconds

    return job


def against_arrow(found: Result, rounds: int, rows: int, folder: Path) -> None:
    """Writing and reading the same rows."""
    import saelens_store as peer

    x, hook, sequences = rows_to_store(rows), "blocks.0.hook_resid_post", SHARD // CONTEXT
    ours, small, theirs = folder / "ours", folder / "small", folder / "theirs"

    def fresh(path: Path, write: Callable[[], None]) -> Callable[[], float]:
        def job() -> float:
            shutil.rmtree(path, ignore_errors=True)
            os.sync()
            return timed(write)

        return job

    def arrow() -> None:
        peer.write_cache(theirs, x, hook, CONTEXT, sequences)

    taken = turns(
        {
            "unbraid_write": fresh(ours, lambda: in_cache(lambda: write_store(ours, x))),
            "unbraid_int8_write": fresh(small, lambda: in_cache(lambda: write_store(small, x, "int8"))),
            "arrow_write": fresh(theirs, arrow),
            "unbraid_write_to_disk": fresh(ours, lambda: write_store(ours, x)),
            "unbraid_int8_write_to_disk": fresh(small, lambda: write_store(small, x, "int8")),
            "arrow_write_to_disk": fresh(theirs, lambda: to_disk(arrow, theirs)),
        },
        rounds,
    )
    found.rates("store", rows, taken)
    for where in ("", "_to_disk"):
        for kind in ("", "_int8"):
            name = f"store{kind}_write{where}_vs_arrow"
            found.ratio(name, taken[f"arrow_write{where}"], taken[f"unbraid{kind}_write{where}"])
    store, rounded = ActivationStore(ours), ActivationStore(small)
    for name, path in (("unbraid", ours), ("arrow", theirs)):
        size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
        found.row(f"{name}_bytes_a_token", size / rows, "bytes")

    # Its default mixes 20 contexts; 512 are as many rows as our buffer has.
    begin: dict[str, Stream] = {
        "unbraid": lambda: batches(store, "layers.0.resid_post", READ, seed=0, steps=10**9),
        "unbraid_int8": lambda: batches(rounded, "layers.0.resid_post", READ, seed=0, steps=10**9),
        "arrow": lambda: peer.read_cache(theirs, hook, D, CONTEXT, 20),
        "arrow_512": lambda: peer.read_cache(theirs, hook, D, CONTEXT, 512),
    }
    streams = {name: stream() for name, stream in begin.items()}
    warm = {f"{name}_read_warm": lambda s=stream: draw(s, rows) for name, stream in streams.items()}
    taken = turns(warm, rounds)
    found.rates("store", rows, taken)
    found.ratio("store_read_warm_vs_arrow", taken["arrow_read_warm"], taken["unbraid_read_warm"])
    found.ratio(
        "store_read_warm_vs_arrow_mixed_as_ours", taken["arrow_512_read_warm"], taken["unbraid_read_warm"]
    )
    warm.clear()
    streams.clear()
    folders = {"unbraid": ours, "unbraid_int8": small, "arrow": theirs}
    taken = turns(
        {f"{name}_read_cold": cold(begin[name], rows, path) for name, path in folders.items()}, rounds
    )
    found.rates("store", rows, taken)
    found.ratio("store_read_cold_vs_arrow", taken["arrow_read_cold"], taken["unbraid_read_cold"])
    found.ratio("store_int8_read_cold_vs_arrow", taken["arrow_read_cold"], taken["unbraid_int8_read_cold"])
    int8_error(found, folder)


def int8_error(found: Result, folder: Path) -> None:
    """Bytes and error of int8 rows on a real model's activations."""
    lm, documents, site = real(), stories(), Site.parse("layers.4.resid_post")
    made: dict[str, ActivationStore] = {}
    stored: tuple[Stored, ...] = ("float32", "float16", "int8")
    for dtype in stored:
        config = CaptureConfig(tokens=100_000, dtype=dtype, sites=(site,))
        made[dtype] = capture(lm, documents, config, folder / dtype)
    exact = all_rows(made["float32"], site)
    spread = float((exact - exact.mean(dim=0)).square().sum())
    for dtype in ("float16", "int8"):
        size = sum(shard.stat().st_size for shard in made[dtype].shards)
        found.row(f"{dtype}_bytes_a_token", size / len(exact), "bytes")
        error = float((all_rows(made[dtype], site) - exact).square().sum())
        found.row(f"{dtype}_error_share", error / spread, "share of the variance")


def all_rows(store: ActivationStore, site: Site) -> torch.Tensor:
    """All rows in float32, in an order that depends on the seed alone."""
    return torch.cat(list(batches(store, site, READ, seed=0, epochs=1)))


def memory(found: Result, folder: Path, tokens: int) -> None:
    """Resident memory while a tiny model's activations are captured, then read in shuffled batches."""
    lm = tiny()
    texts = [document.text or "" for document in stories("train")]

    def endless() -> Iterator[Document]:
        number = 0
        while True:
            for text in texts:
                yield Document.of_text(text, id=f"{number:x}")
                number += 1

    watch = Watch()
    config = CaptureConfig(tokens=tokens, context=CONTEXT, sites=(Site.parse("layers.0.resid_post"),))
    with watch:
        store = capture(lm, endless(), config, folder / "out", progress=lambda done, *_: watch.at(done))
    watch.report(found, "memory_capture", tokens)
    watch = Watch()
    with watch:
        for number, _ in enumerate(batches(store, store.sites[0], READ, seed=0, epochs=1), 1):
            watch.at(number * READ)
    watch.report(found, "memory_read", tokens)


class Watch:
    """Samples this process's resident memory, twice a second, beside how many tokens are done."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []
        self.done, self.stop = 0, threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def at(self, done: int) -> None:
        """Say how far it is."""
        self.done = done

    def __enter__(self) -> Watch:
        self.began = time.perf_counter()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self.began
        self.stop.set()
        self.thread.join()

    def _run(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        while not self.stop.wait(0.5):
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
            self.seen.append((self.done, resident / 2**20))

    def report(self, found: Result, name: str, tokens: int) -> None:
        """Memory in ten stretches of the work, and how far it strays after the first twentieth."""
        found.row(f"{name}_rate", tokens / self.seconds, "tokens/s")
        for tenth in range(10):
            here = [mb for done, mb in self.seen if tenth * tokens <= 10 * done < (tenth + 1) * tokens]
            if here:
                found.row(f"{name}_{tenth + 1}0_percent", median(here), "MB", min(here), max(here))
        late = [mb for done, mb in self.seen if 20 * done >= tokens]
        found.row(f"{name}_median", median(late), "MB", min(late), max(late))
        found.row(
            f"{name}_strays_by", max(max(late) / median(late), 2 - min(late) / median(late)) - 1, "share"
        )
