"""`unbraid push`: send an autoencoder's folder to the Hugging Face Hub; nothing else sends one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from unbraid.sae.formats.hub import push


@dataclass(frozen=True)
class Options:
    """What to send, and where to."""

    folder: tyro.conf.Positional[Path]
    """Folder of an autoencoder, as `train` and `convert` write it."""
    repository: tyro.conf.Positional[str]
    """owner/name on the Hugging Face Hub; made if there is none."""
    subfolder: str = ""
    """Folder in the repository, such as the site; its top if left out."""
    public: bool = False
    """Make a new repository public, or send to one that is; without it only to a private one."""


def run(options: Options) -> None:
    """Send, and print where it is."""
    url = push(options.folder, options.repository, options.subfolder, public=options.public)
    print(f"{options.folder}: sent to {url}")
