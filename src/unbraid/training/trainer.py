"""Train autoencoders on captured activations, one or many on the same stream, killable at any moment."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from unbraid.activations.follow import Stalled
from unbraid.activations.inorder import InOrder
from unbraid.activations.store import ActivationStore
from unbraid.activations.stream import ahead
from unbraid.manifest.files import building
from unbraid.manifest.progress import Progress
from unbraid.sae.base import SAE
from unbraid.sae.registry import architecture
from unbraid.training.config import TrainConfig
from unbraid.training.memory import available, check_memory
from unbraid.training.run import Run, sae_config
from unbraid.training.sources import Activations, Names, Source, Sources, choose_sources, stream


def train(
    store: Activations | Sequence[Activations],
    site: Names,
    config: TrainConfig,
    out: Path | str,
    *,
    target_site: Names = None,
    command: str = "",
    progress: Progress | None = None,
    on_log: OnLog | None = None,
) -> SAE:
    """Train an autoencoder on the activations of `site` (the only one captured, if None) into the folder
    `out`; `on_log` is handed every line of its log.

    A store gives them fully shuffled; `follow.Following` and `live.Live` in the order of capture, shuffled
    within a buffer, from a capture that is still being written or from the model itself.

    Transcoders predict `target_site` from it. Crosscoders take several sites, or several captures of the
    same tokens. Killed and run again with the same arguments it goes on from its last checkpoint, and the
    files are the same, bit for bit, as an undisturbed run's. Returns the autoencoder as it was saved.
    Raises UserError for settings that cannot be trained with, an `out` that exists, and a partial run with
    other settings.
    """
    config.check()
    reads = architecture(config.architecture).reads
    stores = [store] if isinstance(store, ActivationStore | InOrder) else list(store)
    sources = choose_sources(stores, site, target_site, reads, config.architecture)
    job = Job(sources, config, Path(out))
    (sae,) = train_together([job], command=command, progress=progress, on_log=on_log)
    return sae


OnLog = Callable[[str, Mapping[str, Any]], None]
"""Told the name of a run's folder and a new line of its log."""


@dataclass(frozen=True)
class Job:
    """One autoencoder to train."""

    sources: Sources
    """What it reads."""
    config: TrainConfig
    """What it is and how it is trained; checked already."""
    out: Path
    """Folder to make."""


def train_together(
    jobs: Sequence[Job],
    *,
    command: str = "",
    progress: Progress | None = None,
    on_log: OnLog | None = None,
) -> list[SAE]:
    """Train several autoencoders on one stream, each batch read once for all of them.

    Each is what `train` makes of it alone, bit for bit, and goes on from its own last checkpoint when all
    were killed. `progress` counts the steps of the stream. Raises ValueError for jobs that differ in seed,
    batch size or steps, so that no stream serves them all, and UserError as `train` does.
    """
    config = jobs[0].config
    if any(_stream_of(job.config) != _stream_of(config) for job in jobs):
        raise ValueError("jobs of one stream must have the same seed, batch_size and steps")
    here = [job for job in jobs if job.config.device == "cpu"]
    check_memory((sae_config(job.sources, job.config) for job in here), config.batch_size, available())
    before = torch.get_num_threads()
    with ExitStack() as folders:
        try:
            begun: list[tuple[Run, ExitStack]] = []
            for job in jobs:
                own = folders.enter_context(ExitStack())
                folder = own.enter_context(building(job.out))
                run = Run.begin(job.sources, job.config, folder)
                if on_log is not None:
                    run.on_log = partial(on_log, job.out.name)
                begun.append((run, own))
                torch.set_num_threads(before)
            advance([run for run, _ in begun], progress)
            finished: list[SAE] = []
            for run, own in begun:
                finished.append(run.finish(command))
                own.close()  # what is finished has its name before the next one is
        finally:
            torch.set_num_threads(before)
    return finished


def _stream_of(config: TrainConfig) -> tuple[int, int, int]:
    return config.seed, config.batch_size, config.steps


def advance(runs: Sequence[Run], progress: Progress | None) -> None:
    """Take all runs to the last step; those that had come further when they were killed wait for the rest."""
    config, first = runs[0].config, min(run.step for run in runs)
    wanted = dict.fromkeys(source for run in runs for source in run.sources.parts)
    for run in runs:
        run.cut_log()
    started = monotonic()
    if progress is not None:
        progress(first, config.steps, f"kernels: {', '.join(dict.fromkeys(r.stepper.name for r in runs))}")
    with closing(_fetched(wanted, config, first)) as batches:
        for step in range(first, config.steps):
            try:
                found = next(batches)
            except Stalled:
                for run in runs:
                    run.checkpoint()
                raise
            for run in runs:
                if run.step == step:
                    run.learn(found)
            if progress is not None:
                speed = (step + 1 - first) * config.batch_size * len(runs) / max(monotonic() - started, 1e-9)
                what = runs[0].note if len(runs) == 1 else f"{len(runs)} autoencoders"
                progress(step + 1, config.steps, f"{what}  {speed:,.0f} tokens/s".strip())


def _fetched(
    wanted: Collection[Source], config: TrainConfig, first: int
) -> Generator[Mapping[Source, Tensor], None, None]:
    """The stream from step `first` on, made ahead where its source may be."""
    batches = stream(wanted, config.batch_size, seed=config.seed, steps=config.steps, start=first)
    stores = [source.store for source in wanted]
    live = [store for store in stores if isinstance(store, InOrder)]
    if not all(store.ahead for store in live):
        return batches

    def cancel() -> None:
        for store in live:
            store.cancel()

    return ahead(batches, cancel=cancel)
