"""`unbraid convert`: another tool's autoencoder as an artifact of ours, or ours in another tool's format."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from unbraid.cli.saes import this_command
from unbraid.manifest.files import building
from unbraid.manifest.identity import sha256_file
from unbraid.manifest.record import MANIFEST, check_files, list_files, read_manifest, write_manifest
from unbraid.model.sites import Site
from unbraid.sae.formats import saelens, sparsify
from unbraid.sae.formats.detect import Source, detect
from unbraid.sae.formats.hub import locate

WRITERS = {"saelens": saelens.save, "sparsify": sparsify.save}


@dataclass(frozen=True)
class Options:
    """What to convert, and into what."""

    src: tyro.conf.Positional[str]
    """Folder, weights file, or owner/name on the Hugging Face Hub; the format is found out."""
    out: Path
    """Folder to write the autoencoder into; it must not exist."""
    to: Literal["saelens", "sparsify"] = "saelens"
    """Format to write."""
    subfolder: str = ""
    """Folder or file of the repository."""
    revision: str | None = None
    """Branch, tag or commit of the repository."""
    site: str | None = None
    """Site that it reads, where its files do not say or are wrong."""
    model_name: str | None = None
    """Name of the model that it belongs to, likewise."""
    k: int | None = None
    """Latents that fire, where a TopK's files do not say."""


def run(options: Options) -> None:
    """Convert, write the manifest, and say what was found."""
    with building(options.out) as folder:
        for stray in (*list_files(folder), MANIFEST):  # what a killed run left, perhaps in another format
            (folder / stray).unlink(missing_ok=True)
        source = detect(locate(options.src, options.subfolder, options.revision))
        sae = source.load(options.k)
        site = str(Site.parse(options.site)) if options.site else sae.config.site
        model_name = options.model_name or sae.config.model_name
        sae.config = replace(sae.config, site=site, model_name=model_name)
        WRITERS[options.to](sae, folder)
        inputs, paths = _inputs(source)
        made = read_manifest(paths["sae"]).facts if paths else {}
        write_manifest(
            folder,
            kind="sae",
            command=this_command(),
            seed=None,
            inputs=inputs,
            facts={
                "architecture": sae.config.architecture,
                "site": sae.config.site,
                "model": sae.config.model_name,
                "model_id": sae.config.model_id,
                **({"tokenizer_id": made["tokenizer_id"]} if "tokenizer_id" in made else {}),
                "from": source.format,
                "to": options.to,
            },
            paths=paths,
        )
    unknown = "" if sae.config.site else " (unknown; give --site)"
    what = f"{sae.config.architecture}, {sae.config.d_in} × {sae.config.d_sae}"
    Console().print(
        f"{options.out}: {what}, read as {source.format}, site {sae.config.site!r}{unknown}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _inputs(source: Source) -> tuple[dict[str, str], dict[str, Path]]:
    """The source as an artifact where it is one, or else the hash of each file that was read."""
    folder = source.weights.parent
    if (folder / MANIFEST).is_file():
        return {"sae": check_files(folder).id}, {"sae": folder}
    return {path.name: sha256_file(path) for path in source.files}, {}
