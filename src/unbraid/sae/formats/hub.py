"""Autoencoders on the Hugging Face Hub: fetched through huggingface_hub's own cache, sent when asked to."""

from __future__ import annotations

import re
from glob import escape
from pathlib import Path

from unbraid.manifest.errors import UserError
from unbraid.manifest.record import MANIFEST, check_files
from unbraid.sae.formats.detect import detect


def is_repository(name: str) -> bool:
    """Whether a name that is no local path could be owner/name on the Hub."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith(".")


def fetch(repository: str, subfolder: str = "", revision: str | None = None) -> Path:
    """The local folder (or file) `subfolder` of a repository, downloaded unless the cache has it.

    Without a subfolder it is the files at the repository's top. HF_HUB_CACHE and HF_HUB_OFFLINE=1 work as
    everywhere. Raises UserError when there is no such repository or folder, or it cannot be reached.
    """
    from huggingface_hub import snapshot_download

    # A repository may hold hundreds of autoencoders: never more than was asked for, which may be one file.
    allowed = [subfolder, f"{subfolder}/*"] if subfolder else None
    ignored = None if subfolder else ["*/*"]
    try:
        snapshot = Path(
            snapshot_download(repository, revision=revision, allow_patterns=allowed, ignore_patterns=ignored)
        )
    except Exception as error:
        raise UserError(
            f"{repository} is neither a local folder nor a repository that can be reached or is cached "
            f"({_reason(error)}); check the name, the network and HF_HUB_OFFLINE"
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
    _check_inside(subfolder, source)
    if path.exists() or not is_repository(str(source)):
        return path / subfolder if subfolder else path
    return fetch(str(source), subfolder, revision)


def push(folder: Path, repository: str, subfolder: str = "", *, public: bool = False) -> str:
    """Send an autoencoder's folder to `repository`, into `subfolder` of it, and return where it is now.

    Of an artifact everything that its manifest lists goes, and the manifest, whose command may name local
    paths; of another tool's folder the files that make up the autoencoder. A repository that does not exist
    is made, a private one unless `public`. Files of the same names are replaced, others stay.

    Raises what `detect` and `check_files` do, and UserError, before anything is sent, when there is no token
    or the repository is public though `public` was not given, and when the Hub refuses or is out of reach.
    """
    from huggingface_hub import HfApi, get_token

    if not is_repository(repository):
        raise UserError(f"{repository!r} is no repository of the Hub; write owner/name")
    _check_inside(subfolder, repository)
    names = [path.relative_to(folder).as_posix() for path in detect(folder).files]
    if (folder / MANIFEST).is_file():
        names = [*check_files(folder).files, MANIFEST]
    if get_token() is None:
        raise UserError(
            f"nothing was sent to {repository}: there is no token of the Hub; run `hf auth login` or set "
            "HF_TOKEN"
        )
    api = HfApi()
    try:
        url = api.create_repo(repository, private=not public, exist_ok=True)
        if not public and not api.repo_info(repository).private:
            raise UserError(
                f"nothing was sent to {repository}, which is public; allow that (--public) or name another"
            )
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            path_in_repo=subfolder or None,
            allow_patterns=[escape(name) for name in names],
            commit_message=f"Add {subfolder or 'an autoencoder'}",
        )
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{repository} could not be written ({_reason(error)}); check the name, what the token may do, "
            "the network and HF_HUB_OFFLINE"
        ) from error
    return f"{url}/tree/main/{subfolder}" if subfolder else str(url)


def _reason(error: Exception) -> str:
    """What went wrong, in a line; of which kinds that can be depends on huggingface_hub's HTTP client."""
    return ": ".join([type(error).__name__, *str(error).strip().split("\n")[:1]])


def _check_inside(subfolder: str, source: Path | str) -> None:
    if ".." in Path(subfolder).parts or Path(subfolder).is_absolute():
        raise UserError(f"subfolder {subfolder!r} leads out of {source}; name a folder inside it")
