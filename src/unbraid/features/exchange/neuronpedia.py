"""Neuronpedia's export: a folder {model}/{source} of JSON Lines, and batches of 1,024 features.

Ids are made from what they stand for, so that the same index gives the same bytes.  Fields of which an index
knows nothing are null or empty, or 0 where its database demands a number.  Its import gives up at an empty
file, a missing column, and an account or a type of explanation that it does not have.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unbraid.features.exchange import records
from unbraid.features.labels.label import Label
from unbraid.features.labels.rows import Row
from unbraid.features.labels.store import Labels
from unbraid.features.page import Index, LatentPage
from unbraid.manifest.errors import UserError
from unbraid.manifest.files import building, write_bytes
from unbraid.manifest.progress import Progress
from unbraid.model.sites import Site
from unbraid.sae.base import SAE

BATCH = 1024
"""Features in a file."""
STEER = 3.0
"""Default steering strength, in units of the largest activation."""
CREATOR = "clkht01d40000jv08hvalcvly"
SOURCE_SET = "unbraid"
"""What our set of sources is called where nothing else is said."""
"""The account that every Neuronpedia begins with, for what belongs to nobody else."""
OWN = "neuronpedia"
"""How labels from there are told from others: who said it, and what kind they are when nobody said."""
LONGEST_LINE = 1 << 24
"""Characters of a line that is read at most."""


@dataclass(frozen=True)
class Names:
    """What model and source are called there."""

    model: str
    """Their id of the model, such as gemma-2-2b."""
    layer: int
    """Number of the layer."""
    source_set: str
    """Name of the set of sources, such as gemmascope-res-16k; the source is {layer}-{source_set}."""
    creator: str = CREATOR
    """Id of the account that the records belong to."""

    def __post_init__(self) -> None:
        if self.layer < 0:
            raise UserError(f"layer is {self.layer}; it must be at least 0")
        for name, value in (("model", self.model), ("source_set", self.source_set)):
            if not value or "/" in value or "\\" in value or value.startswith("."):
                raise UserError(f"{name} is {value!r}, which cannot be the name of a folder; choose another")

    @property
    def source(self) -> str:
        """Id of the source, which stands in the field `layer` of each record."""
        return f"{self.layer}-{self.source_set}"


def export(
    index: Index,
    out: Path,
    names: Names,
    *,
    sae: SAE | None = None,
    labels: Labels | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write `out`/{model}/{source}; vectors need the autoencoder.  Returns that folder.

    Raises UserError when the folder exists.
    """
    folder = Path(out) / names.model / names.source
    with building(folder) as place:
        for name, record in _heads(index, names).items():
            write_bytes(place / f"{name}.jsonl", _lines([record]))
        explained = {} if labels is None else labels.current()
        for number, first in enumerate(range(0, index.d_sae, BATCH)):
            pages = [index.latent(j) for j in range(first, min(first + BATCH, index.d_sae))]
            batches = {
                "features": [feature(page, names, index, sae) for page in pages],
                "activations": [record for page in pages for record in activations(page, names)],
                "explanations": [
                    explanation(names, page.latent, explained[page.latent])
                    for page in pages
                    if page.latent in explained
                ],
            }
            for kind, found in batches.items():
                if not found:
                    continue
                path = place / kind / f"batch-{number}.jsonl.gz"
                write_bytes(path, gzip.compress(_lines(found), compresslevel=5, mtime=0))
            if progress is not None:
                progress(first + len(pages), index.d_sae, "latents")
    return folder


def feature(page: LatentPage, names: Names, index: Index, sae: SAE | None) -> dict[str, Any]:
    """A line of features/."""
    near = [n for n in page.neighbours if n.kind == "decoder" and n.sae is None]
    return {
        "modelId": names.model,
        "layer": names.source,
        "index": str(page.latent),
        "creatorId": names.creator,
        "sourceSetName": names.source_set,
        "maxActApprox": page.max,
        **records.feature(page),
        "topkCosSimIndices": [n.latent for n in near],
        "topkCosSimValues": [n.value for n in near],
        "hasVector": sae is not None,
        "vector": [] if sae is None else records.vector(sae, page.latent),
        "vectorLabel": None,
        "hookName": _hook_name(str(index.manifest.facts["site"])),
        "vectorDefaultSteerStrength": STEER * page.max if sae is not None and page.count else None,
    }


def activations(page: LatentPage, names: Names) -> Iterator[dict[str, Any]]:
    """Lines of activations/, the strongest first; binMin −1 stands for the group of the strongest."""
    for number, shown in enumerate(records.shown(page)):
        example = shown.example
        values = list(example.activations)
        yield {
            "id": _id(names, page.latent, "activation", str(number)),
            "modelId": names.model,
            "layer": names.source,
            "index": str(page.latent),
            "creatorId": names.creator,
            "dataSource": None,
            "tokens": list(example.tokens),
            "values": values,
            "maxValue": max(values),
            "minValue": min(values),
            "maxValueTokenIndex": values.index(max(values)),
            "dfaValues": [],
            "dfaMaxValue": None,
            "dfaTargetIndex": None,
            "binContains": shown.contains,
            "binMin": shown.low,
            "binMax": shown.high,
            "qualifyingTokenIndex": shown.at,
        }


def explanation(names: Names, latent: int, label: Any) -> dict[str, Any]:
    """A line of explanations/, of the label to show.

    Type and model are keys of tables of theirs, so only labels that came from there have them; those of
    others are told in the notes.
    """
    theirs = label.by.split(":")[0] == OWN
    said = f"{label.kind}, {label.model}" if label.model else label.kind
    return {
        "id": _id(names, latent, "explanation", label.id),
        "modelId": names.model,
        "layer": names.source,
        "index": str(latent),
        "authorId": names.creator,
        "description": label.text,
        "embedding": None,
        "typeName": label.kind if theirs and label.kind != OWN else None,
        "explanationModelName": label.model if theirs else None,
        "notes": f"{label.status}; by {label.by} ({said})",
        "umap_x": None,
        "umap_y": None,
        "umap_cluster": None,
        "umap_log_feature_sparsity": None,
    }


def _heads(index: Index, names: Names) -> dict[str, dict[str, Any]]:
    site, model = str(index.manifest.facts["site"]), str(index.manifest.facts["model_name"])
    described = f"{model} at {site}"
    usual = {"creatorId": names.creator, "visibility": "PUBLIC"}
    return {
        "release": {"name": names.source_set, "description": described, "creatorName": "", **usual},
        "model": {
            "id": names.model, "displayName": model, "displayNameShort": model,
            "layers": 0, "neuronsPerLayer": 0, "owner": "", **usual,
        },
        "sourceset": {
            "modelId": names.model, "name": names.source_set, "description": described,
            "creatorName": "", "releaseName": names.source_set, **usual,
        },
        "source": {
            "id": names.source, "modelId": names.model, "setName": names.source_set,
            "dataset": None, "num_prompts": index.manifest.facts.get("documents"),
            "num_tokens_in_prompt": index.manifest.facts["config"].get("context"), **usual,
        },
    }  # fmt: skip


def _hook_name(site: str) -> str | None:
    """TransformerLens's name of a site, which is theirs too; null where it has none."""
    try:
        return Site.parse(site).transformer_lens
    except UserError:
        return None


def _lines(found: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(
        json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in found
    ).encode()


def _id(*what: object) -> str:
    """25 characters, as theirs have."""
    return "c" + hashlib.sha256("\0".join(map(str, what)).encode()).hexdigest()[:24]


def layer_of(site: str) -> int | None:
    """The number of the layer that a site names; none where it names none, as the embedding does."""
    return next((int(part) for part in site.split(".") if part.isdecimal()), None)


def import_labels(path: Path, labels: Labels, index: Index, *, source: str = "") -> int:
    """Propose every explanation of an export that is not here yet, all of them or none.

    `path` is an export, its {model}/{source}, the explanations/ in that, or one of the files there.  Of
    several sources `source`, such as 20-res-16k, names the one that is meant.  The labels are hypotheses like
    any other, by "neuronpedia" with their author's id; returns how many are new.  Raises UserError, naming
    file and line, where one cannot be read, and where they are of several sources or of another layer than
    the index, unless `source` says that they are meant: nothing else in a file tells whose latents it
    explains.
    """
    places = [path / "explanations"] if (path / "explanations").is_dir() else []
    places = places or sorted(path.glob("*/*/explanations")) or [path]
    found_in = [
        [*place.glob("*.jsonl.gz"), *place.glob("*.jsonl")] if place.is_dir() else [place] for place in places
    ]
    files = sorted(file for some in found_in for file in some)
    if not files or not all(file.is_file() for file in files):
        raise UserError(
            f"{path} holds no explanations: explanations/batch-0.jsonl.gz and so on are expected in it; "
            "check the path"
        )
    found: dict[tuple[str, str], list[tuple[str, Any]]] = {}
    for file in files:
        for number, record in _read(file):
            where = f"{file}, line {number}"
            found.setdefault(_source(record, where), []).append((where, record))
    chosen = _one_of(path, found, source, index)
    known = {(row["latent"], row["text"], row["by"]) for row in labels.ask("SELECT * FROM labels")}
    drafts: dict[tuple[int, str, str], Label] = {}
    for where, record in found[chosen]:
        label = _draft(record, labels, index.d_sae, where)
        drafts.setdefault((label.latent, label.text, label.by), label)
    return labels.add([Row.of_label(label) for key, label in drafts.items() if key not in known])


def _one_of(path: Path, sources: Iterable[tuple[str, str]], source: str, index: Index) -> tuple[str, str]:
    """The one source that is meant; raises UserError where that is not clear, or is of another layer."""
    chosen = [found for found in sources if source in ("", found[1])]
    if len(chosen) != 1:
        names = ", ".join(f"{layer} of {model or 'no model'}" for model, layer in sorted(sources)[:5])
        raise UserError(
            f"{path} holds explanations of {names or 'nothing'}; give those of one source, or name it with"
            " --source"
        )
    theirs, site = chosen[0][1], str(index.manifest.facts["site"])
    if not source and theirs.partition("-")[0] != str(layer_of(site)):
        raise UserError(
            f"{path} explains the source {theirs}, but {index.folder} is of {site}; where they are the same"
            f" autoencoder's, say so with --source {theirs}"
        )
    return chosen[0]


def _read(file: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        with (
            gzip.open(file, "rt", encoding="utf-8")
            if file.suffix == ".gz"
            else file.open(encoding="utf-8") as lines
        ):
            while line := lines.readline(LONGEST_LINE):
                number += 1
                if line.strip():
                    yield number, json.loads(line)
    except (OSError, EOFError, ValueError, RecursionError) as error:
        raise UserError(
            f"{file} is no file of JSON Lines, or is damaged, at line {max(number, 1)} ({error}); fetch it"
            " again"
        ) from error


def _source(record: Any, where: str) -> tuple[str, str]:
    """Model and source that an explanation is of."""
    found = [record.get(name) for name in ("modelId", "layer")] if isinstance(record, dict) else []
    model, layer = (value if isinstance(value, str) else "" for value in found or ("", ""))
    if not layer:
        raise UserError(f"{where} is no explanation: the field layer has to name the source, as 20-res-16k")
    return model, layer


def _draft(record: Any, labels: Labels, d_sae: int, where: str) -> Label:
    try:
        latent, text = int(record["index"]), record["description"]
        author, model = record.get("authorId"), record.get("explanationModelName")
        kind = record.get("typeName") or OWN
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where} is no explanation ({error!r}); index and description are needed") from error
    if not all(isinstance(value, str | None) for value in (author, model, kind)) or not isinstance(text, str):
        raise UserError(f"{where}: description, authorId, typeName and explanationModelName have to be text")
    if not 0 <= latent < d_sae:
        raise UserError(
            f"{where} is of latent {latent}, but there are latents 0 to {d_sae - 1}; check the source"
        )
    by = f"{OWN}:{author}" if author else OWN
    try:
        return labels.draft(latent, text, by=by, kind=kind, model=model or None)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
