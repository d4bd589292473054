"""Autoencoders of the Hugging Face Hub, by repository and folder, through huggingface_hub's own cache."""

from __future__ import annotations

import re
from pathlib import Path

from unbraid.manifest.errors import UserError


def is_repository(name: str) -> bool:
    """Whether a name that is no local path could be owner/name on the Hub."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith(".")


def fetch(repository: str, subfolder: str = "", revision: str | None = None) -> Path:
    """The local folder (or file) `subfolder` of a repository, downloaded unless the cache has it.

    Without a subfolder it is the files at the repository's top. HF_HUB_CACHE and HF_HUB_OFFLINE=1 work as
    everywhere. Raises UserError when there is no such repository or folder, or it cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    # A repository may hold hundreds of autoencoders: never more than was asked for, which may be one file.
    allowed = [subfolder, f"{subfolder}/*"] if subfolder else None
    ignored = None if subfolder else ["*/*"]
    try:
        snapshot = Path(
            snapshot_download(repository, revision=revision, allow_patterns=allowed, ignore_patterns=ignored)
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{repository} is neither a local folder nor a repository that can be reached or is cached "
            f"({type(error).__name__}); check the name, the network and HF_HUB_OFFLINE"
        ) from error
    place = snapshot / subfolder
    if not place.exists():
        folders = sorted(
            {file.parent.relative_to(snapshot).as_posix() for file in snapshot.rglob("*")} - {"."}
        )
        some = f"; it has {', '.join(map(repr, folders[:4]))}" if folders else ""
        raise UserError(
            f"{repository} has no folder {subfolder!r} here{some}; choose one that holds an autoencoder"
        )
    return place


def locate(source: Path | str, subfolder: str = "", revision: str | None = None) -> Path:
    """The local path of an autoencoder named by path or repository (a path that exists wins)."""
    path = Path(source)
    if ".." in Path(subfolder).parts or Path(subfolder).is_absolute():
        raise UserError(f"subfolder {subfolder!r} leads out of {source}; name a folder inside it")
    if path.exists() or not is_repository(str(source)):
        return path / subfolder if subfolder else path
    return fetch(str(source), subfolder, revision)
