"""The prompts of an audit: red-team probes and benign prompts, in three splits that share no prompt.

``fit`` trains the autoencoders, the gate and the search; ``select`` chooses layer, seed, latents and dose;
``test`` is asked for only when the policy stands.  A prompt's split follows from its text alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from unbraid.causal.probes import Probe, read_probes
from unbraid.manifest.errors import UserError
from unbraid.manifest.files import building, write_text
from unbraid.manifest.identity import canonical_json, sha256_bytes
from unbraid.manifest.lineage import SPLIT_DOCUMENTS
from unbraid.manifest.record import Manifest, write_manifest
from unbraid.stats.splits import split_of

Split = Literal["fit", "select", "test"]
Records = Sequence[Mapping[str, Any]]
Source = Callable[[Split], tuple[Records, Records]]
"""Gives the records of a split: red-team probes and benign prompts, in the format of a probe file."""

SHARES: Mapping[str, float] = {"fit": 0.45, "select": 0.2, "test": 0.35}
PROBES, BENIGN = "probes.jsonl", "benign.jsonl"


@dataclass(frozen=True)
class PromptSet:
    """The prompts of one split."""

    probes: tuple[Probe, ...]
    """Red-team probes, in which the failure may happen."""
    benign: tuple[Probe, ...]
    """Harmless prompts, in which a guard should change nothing."""
    manifest: Manifest
    """The artifact that holds them."""


def from_files(probes: Path, benign: Path) -> Source:
    """Prompts of two JSON Lines files, each prompt in the split that its text decides."""
    by_split: dict[str, tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]] = {
        s: ([], []) for s in SHARES
    }
    for kind, path in enumerate((probes, benign)):
        read_probes(path)  # names the line and field of whatever is wrong
        for line in path.read_text("utf-8").splitlines():
            if line.strip():
                record = json.loads(line)
                by_split[split_of(prompt_hash(record), SHARES)][kind].append(record)
    for split, (red, harmless) in by_split.items():
        for path, records in ((probes, red), (benign, harmless)):
            if len(records) < 20:
                raise UserError(
                    f"only {len(records)} prompts of {path} fall into the {split} split; give at least 200"
                )
    return lambda split: by_split[split]


def prompt_hash(record: Mapping[str, Any]) -> str:
    """SHA-256 of a prompt's text, whatever else its record says."""
    messages = record.get("messages") or [{"role": "user", "content": record.get("text", "")}]
    return sha256_bytes(canonical_json([[m["role"], m["content"]] for m in messages]))


def write_prompts(source: Source, split: Split, folder: Path, *, command: str, seed: int) -> PromptSet:
    """Write a split as an artifact and read it back; an artifact that stands there already is read."""
    if not folder.exists():
        probes, benign = source(split)
        with building(folder) as partial:
            for name, records in ((PROBES, probes), (BENIGN, benign)):
                write_text(partial / name, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
            hashes = sorted({prompt_hash(r) for r in (*probes, *benign)})
            write_text(partial / SPLIT_DOCUMENTS, "".join(h + "\n" for h in hashes))
            facts = {"split": split, "probes": len(probes), "benign": len(benign)}
            write_manifest(partial, kind="prompts", command=command, seed=seed, inputs={}, facts=facts)
    return read_prompts(folder)


def read_prompts(folder: Path) -> PromptSet:
    """Read a split's artifact, every byte checked."""
    from unbraid.manifest.record import check_files

    manifest = check_files(folder)
    return PromptSet(tuple(read_probes(folder / PROBES)), tuple(read_probes(folder / BENIGN)), manifest)
