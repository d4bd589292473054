"""Make one index of several workers' shares: the same tables, byte for byte, as one worker's alone."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from unbraid.features.build import Build, Origin, Reached, load, take_passages
from unbraid.features.index import IndexConfig
from unbraid.features.page import Index
from unbraid.features.state import State
from unbraid.manifest.errors import UserError
from unbraid.manifest.files import building
from unbraid.manifest.progress import Progress


def merge_indexes(
    shares: Sequence[Index],
    out: Path,
    *,
    paths: Mapping[str, Path] | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> Index:
    """The index of all shares of a corpus, at `out`; neither model nor autoencoder is needed.

    Memory is twice that of a build.  Raises UserError when `out` exists, when a share is missing or given
    twice, and when they were not made of the same and with the same settings.
    """
    shares = sorted(shares, key=lambda share: share.manifest.facts["share"])
    _require_whole(shares)
    facts = shares[0].manifest.facts
    config = IndexConfig(**facts["config"])
    names = ("sae", "model", "tokenizer")
    origin = Origin(
        inputs={name: shares[0].manifest.inputs[name] for name in names},
        facts={name: facts[name] for name in ("site", "model_name", "d_sae", "beside", "config")},
    )
    with building(Path(out)) as folder:
        words = {token: text for share in shares for token, (text, _) in share.vocabulary.items()}
        build = Build(folder, origin, config.sizes, words.__getitem__)
        if not build.at.tables:
            build.clear()  # a merge takes little time, and begins again
            for number, share in enumerate(shares, start=1):
                more = State(build.state.d_sae, config.sizes, folder)
                load(share, more)
                build.state.merge(more)
                for part in share.passages.numbers:
                    take_passages(share, part, folder)
                if progress is not None:
                    progress(number, len(shares), "shares")
            for table in ("weights", "neighbours"):
                shutil.copyfile(shares[0].folder / f"{table}.parquet", folder / f"{table}.parquet")
            build.at = Reached(documents=facts["read"], ids=facts["ids"], first=facts["first_document"])
            build.finish(config.coactive)
        made_of = {f"share {n}": share.manifest.id for n, share in enumerate(shares, start=1)}
        where = {f"share {n}": share.folder for n, share in enumerate(shares, start=1)}
        build.sign(config.seed, command, {**(paths or {}), **where}, made_of)
    return Index(out)


def _require_whole(shares: Sequence[Index]) -> None:
    if not shares:
        raise UserError("there is nothing to merge; name the shares' folders")
    first = shares[0].manifest
    of = first.facts["share"][1]
    for share in shares:
        for name in ("site", "d_sae", "beside", "config", "ids", "first_document"):
            if share.manifest.facts[name] != first.facts[name]:
                raise UserError(
                    f"{share.folder} and {shares[0].folder} differ in {'text' if name == 'ids' else name}; "
                    "merge shares of one corpus with the same settings"
                )
        for name in ("sae", "model", "tokenizer"):
            if share.manifest.inputs[name] != first.inputs[name]:
                raise UserError(
                    f"{share.folder} and {shares[0].folder} were made with another {name}; index again"
                )
    numbers = [share.manifest.facts["share"] for share in shares]
    wanted = [[number, of] for number in range(1, of + 1)]
    if numbers != wanted:
        given = ", ".join(f"{number}/{of}" for number, of in numbers)
        raise UserError(f"the shares given are {given}; an index needs each of 1/{of} … {of}/{of} once")
