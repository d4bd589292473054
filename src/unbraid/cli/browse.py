"""`unbraid browse DIR`: look at what an index and its neighbours hold, in a browser, offline."""

from __future__ import annotations

import os
import webbrowser
from dataclasses import dataclass
from pathlib import Path

import tyro

from unbraid.cli.models import name_of, open_model
from unbraid.cli.saes import open_sae
from unbraid.manifest.errors import UserError
from unbraid.model.load import LanguageModel
from unbraid.sae.base import SAE
from unbraid.ui.security import Access
from unbraid.ui.serve import serve
from unbraid.ui.shelf import Shelf, Source
from unbraid.ui.workbench import Limits, Workbench

TOKEN = "UNBRAID_TOKEN"


@dataclass(frozen=True)
class Options:
    """What to browse, and who may."""

    dir: tyro.conf.Positional[Path]
    """An index, or a folder in which indexes, autoencoders and findings lie."""
    model: str = ""
    """Model folder or Hub name for trying text and steering; where the index was made when left out."""
    device: str = "cpu"
    """Where the model runs: cpu, cuda, …"""
    host: str = "127.0.0.1"
    """Address to listen on; any but this machine's own needs a token."""
    port: int = 8400
    """Port to listen on; 0 takes a free one."""
    token: str = ""
    """What whoever comes has to know; UNBRAID_TOKEN when left out, which other users cannot see."""
    allow_host: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Another name by which the server is reached, such as that of a proxy; repeatable."""
    open: bool = False
    """Open the browser of the desktop."""


def run(options: Options) -> None:
    """Serve until interrupted."""
    shelf = Shelf.open(options.dir)
    limits = Limits()
    token = options.token or os.environ.get(TOKEN, "")
    access = Access.on(options.host, token, options.allow_host, limits.body)
    models = _Models(options)
    bench = Workbench(models.model, models.sae, limits)

    def ready(url: str) -> None:
        names = ", ".join(source.name for source in shelf.sources[:5])
        print(f"{len(shelf.sources)} index{'es' * (len(shelf.sources) > 1)} ({names}): {url}", flush=True)
        if options.open:
            webbrowser.open(url)

    serve(shelf, bench, access, host=options.host, port=options.port, ready=ready)


class _Models:
    """Opens what an index was made with, and refuses what is something else."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def model(self, source: Source) -> LanguageModel:
        """The model of an index: the one that was named, else where the index says it was."""
        manifest = source.index.manifest
        lm = open_model(name_of(source.index, self.options.model), device=self.options.device)
        if lm.id != manifest.inputs["model"]:
            raise UserError(
                f"model {lm.name} has weights {lm.id[:12]}… but {source.name} was made with "
                f"{manifest.inputs['model'][:12]}…; name that one with --model"
            )
        return lm

    def sae(self, source: Source) -> SAE:
        """The autoencoder of an index, its files checked."""
        assert source.sae_folder is not None
        sae, identity = open_sae(source.sae_folder, None)
        if identity != source.sae_id:
            raise UserError(
                f"the autoencoder in {source.sae_folder} is {identity[:12]}… but {source.name} was made with "
                f"{source.sae_id[:12]}…; put that one below the folder that is browsed"
            )
        return sae.to(self.options.device)
