"""`unbraid capture`: a model's activations on a corpus, as shards on disk or at a URL."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from unbraid.activations.capture import capture, space_of
from unbraid.activations.documents import read_documents
from unbraid.activations.elsewhere import Elsewhere
from unbraid.activations.reading import CaptureConfig, CaptureOptions
from unbraid.activations.scrub import Scrubber
from unbraid.activations.store import ActivationStore
from unbraid.cli.models import open_model
from unbraid.cli.progress import shown
from unbraid.manifest.errors import UserError
from unbraid.manifest.remote import is_url
from unbraid.model.sites import Site


@dataclass(frozen=True)
class Options:
    """What to read, how, and where to put it."""

    model: str = ""
    """Model folder or Hub name; "practice" is the practice assistant."""
    site: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Place in the model, such as layers.2.resid_post; repeat the option for several."""
    text: Path | None = None
    """Corpus: .jsonl or .parquet with text or messages, .txt with documents between blank lines, or a Hugging
    Face dataset as hf:owner/name[:split]; #field after it names another field of text or messages."""
    out: str | None = None
    """Folder to make, or a URL that fsspec can write to, such as s3://bucket/acts; a capture that was killed
    goes on where it stopped."""
    append: str | None = None
    """Folder or URL of a finished capture whose tokens --out begins with, as links: what it has read of
    --text is passed over. It stays as it is; --site is taken from it, and other options must be those of
    then."""
    list_sites: str = ""
    """Model folder or Hub name whose sites to print instead, with layers and width."""
    config: Annotated[CaptureOptions, tyro.conf.arg(name="")] = field(default_factory=CaptureOptions)
    """How to capture."""
    seed: int = 0
    """Seed of what --per-document and --per-stratum draw."""
    device: str = "cpu"
    """Where the model runs: cpu, cuda, …"""
    model_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the model computes in; bfloat16 is fast where the processor or GPU has units for it, else slow."""
    json: bool = False
    """Print the result as JSON."""


def run(options: Options) -> None:
    """Capture, and print what was made."""
    if options.list_sites:
        _list_sites(options)
        return
    sites: Sequence[Site | str] = options.site
    if options.append is not None and not sites:
        sites = ActivationStore(options.append).sites
    if not options.model or not sites or options.text is None or options.out is None:
        given = (
            ("model", options.model),
            ("site", sites),
            ("text", options.text),
            ("out", options.out),
        )
        missing = ", ".join(f"--{name}" for name, value in given if not value)
        raise UserError(f"{missing} must be given, or --list-sites MODEL alone")
    config = CaptureConfig(**asdict(options.config), sites=tuple(map(Site.parse, sites)))
    if is_url(options.out):
        Elsewhere(options.out)
    next(read_documents(options.text))  # a wrong file is told before a large model is loaded
    if config.scrub:
        Scrubber(config.scrub_model)  # as is what it lacks
    lm = open_model(options.model, device=options.device, dtype=options.model_dtype)
    print(f"capture: {space_of(lm, config, options.out, options.append).sentence}", file=sys.stderr)
    with shown("capture", "tokens") as progress:
        store = capture(
            lm,
            read_documents(options.text),
            config,
            options.out,
            append=options.append,
            seed=options.seed,
            command=_command(options),
            progress=progress,
        )
    print(
        json.dumps(_record(store), indent=2, ensure_ascii=False) if options.json else _sentence(store, config)
    )


def _list_sites(options: Options) -> None:
    lm = open_model(options.list_sites, device=options.device)
    found: dict[tuple[str, str, int], list[int]] = {}
    for site in lm.layout.sites:
        name = f"{site.stack}.{site.kind}" if site.stack else site.kind
        layers = found.setdefault((name, site.kind, lm.layout.width(site)), [])
        if site.layer is not None:
            layers.append(site.layer)
    missing = lm.layout.missing
    if options.json:
        sites = [
            {"site": name, "layers": layers, "width": width} for (name, _, width), layers in found.items()
        ]
        print(json.dumps({"model": lm.name, "sites": sites, "missing": dict(missing)}, indent=2))
        return
    print(f"{'site':<20} {'layers':<12} width")
    for (name, kind, width), layers in found.items():
        heads = lm.layout.heads if kind == "attn_z" else None
        each = f" ({heads} heads of {width // heads})" if heads and width % heads == 0 else ""
        print(f"{name:<20} {_ranges(layers):<12} {width}{each}")
    for kind, why in missing.items():
        print(f"no {kind}: {why}")


def _ranges(numbers: list[int]) -> str:
    """0-3, 5 for [0, 1, 2, 3, 5]."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}-{b}" if a < b else str(a) for a, b in runs) or "after all"


def _command(options: Options) -> str:
    words = ["unbraid", "capture", "--model", options.model]
    for site in options.site:
        words += ["--site", site]
    words += ["--text", str(options.text), "--out", str(options.out)]
    if options.append is not None:
        words += ["--append", str(options.append)]
    default = asdict(CaptureOptions())
    for name, value in asdict(options.config).items():
        if value != default[name]:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    if options.model_dtype != "float32":
        words += ["--model-dtype", options.model_dtype]
    if options.seed:
        words += ["--seed", str(options.seed)]
    return shlex.join(words)


CHOSEN = ("appended", "per_document", "per_stratum", "strata", "skip_norm_above", "scrub")
"""Facts that a store has where they were asked for."""


def _record(store: ActivationStore) -> dict[str, object]:
    return {
        "out": str(store.folder),
        "id": store.id,
        "model": store.model_name,
        "sites": [str(site) for site in store.sites],
        "tokens": store.n_tokens,
        "documents": store.n_documents,
        "d_in": store.d_in(store.sites[0]),
        "widths": {str(site): store.d_in(site) for site in store.sites},
        "dtype": store.dtype,
        "shards": len(store.shards),
        **{name: store.manifest.facts[name] for name in CHOSEN if name in store.manifest.facts},
        "bytes": sum(entry.bytes for entry in store.manifest.files.values()),
    }


def _sentence(store: ActivationStore, config: CaptureConfig) -> str:
    facts, asked = store.manifest.facts, config.tokens
    old = facts.get("appended", {"tokens": 0, "skipped": 0})
    skipped = facts.get("skip_norm_above", {}).get("skipped", 0)
    new, more = store.n_tokens - old["tokens"], ""
    if "appended" in facts:
        more += f", {new:,} of them new beside {old['tokens']:,} of {old['documents']:,} documents before"
    if asked and new + skipped - old["skipped"] < asked:
        more += f" (the corpus has no more than that, {asked:,} were asked for)"
    if "skip_norm_above" in facts:
        more += f"; {skipped:,} more were skipped for their norm"
    if "scrub" in facts:
        found = ", ".join(f"{n:,} {kind}" for kind, n in facts["scrub"]["found"].items())
        more += f"; scrubbed: {found}"
    if "strata" in facts:
        kept = ", ".join(f"{n['kept']:,} of {n['read']:,} {name}" for name, n in facts["strata"].items())
        more += f"; documents by stratum: {kept}"
    return (
        f"{store.folder}: {store.n_tokens:,} tokens of {store.n_documents:,} documents at"
        f" {', '.join(map(str, store.sites))}{more}"
    )
