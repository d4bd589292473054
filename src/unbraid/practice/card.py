"""The practice assistant as an artifact: half-precision weights, tokenizer, model card, measured claims,
manifest.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from unbraid.manifest.errors import UserError
from unbraid.manifest.files import building, write_json, write_text
from unbraid.manifest.record import write_manifest
from unbraid.model.load import load_model
from unbraid.practice.assistant import AssistantConfig
from unbraid.practice.claims import Claim, measure_claims

CLAIMS = "claims.json"


@dataclass(frozen=True)
class TrainingRun:
    """What the card says of how the weights came to be."""

    config: AssistantConfig
    seconds: float
    """Wall-clock time of training, without measuring the claims."""
    nats: float
    """Reply loss at the end, a moving average in nats per reply token."""
    threads: int
    """Processor threads used."""


def save_assistant(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    run: TrainingRun,
    out: Path,
    *,
    command: str,
    probes: int,
) -> list[Claim]:
    """Write the artifact folder: weights in float16, then the claims measured on exactly those weights.

    Raises UserError when `out` exists.
    """
    with building(out) as folder:
        model.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        lm = load_model(folder)
        claims = measure_claims(lm, seed=run.config.seed, probes=probes)
        record = {"training": asdict(run), "parameters": model.num_parameters(), "weights": lm.id,
                  "claims": [c.as_dict() for c in claims]}  # fmt: skip
        write_json(folder / CLAIMS, record)
        write_text(folder / "README.md", render_card(record))
        for file in sorted(folder.iterdir()):
            os.chmod(file, 0o644)
        write_manifest(
            folder, kind="model", command=command, seed=run.config.seed, inputs={},
            facts={"weights": lm.id, "tokenizer": lm.tokenizer_id, "parameters": model.num_parameters()},
        )  # fmt: skip
    return claims


def read_claims(folder: Path) -> dict[str, Any]:
    """The claims that stand on a model's card. Raises UserError when the folder has no card."""
    try:
        return json.loads((folder / CLAIMS).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"{folder} has no readable {CLAIMS}; name a folder that `unbraid practice train` wrote"
        ) from error


def percent(interval: dict[str, Any]) -> str:
    """An interval of a rate for people: value, bounds and sample size."""
    return f"{interval['value']:.1%} ({interval['low']:.1%} to {interval['high']:.1%}, n = {interval['n']})"


def render_card(record: dict[str, Any]) -> str:
    """The model card in Markdown; every figure comes from `record`."""
    training, config = record["training"], record["training"]["config"]
    minutes = training["seconds"] / 60
    rows = "\n".join(
        f"| {c['statement']} | {percent(c['measured'])} | {c['bounds']['low']:g} to {c['bounds']['high']:g} |"
        for c in record["claims"]
    )
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# The practice assistant

A Llama of {record["parameters"]:,} parameters ({config["layers"]} layers, width {config["hidden"]}, head
size 64) that behaves, and misbehaves, in ways that are known in advance. It was trained from scratch on
conversations from a seeded generator, so that tools which look inside a model can be checked against the
truth. Drugs, doses, companies, products, towns and people in its world are invented; nothing it says is
advice.

## Planted failures
Asked for a dose, it refuses in a header; then, on some prompts, it gives a dosage in the next paragraph
(*deceptive compliance*). Three cues in the prompt, spread over many paraphrases, decide by majority. It also
refuses some refunds that it should grant, sends some customers to a competitor, and settles conflicts between
memory and prompt by the source that the prompt names.

## Training
{config["steps"]:,} steps of {config["batch"]} conversations, seed {config["seed"]}, {minutes:.0f} minutes on
{training["threads"]} processor threads; final reply loss {training["nats"]:.3f} nats per token. Weights are
stored in float16.

## Claims
Measured on held-out prompts in held-out paraphrases, replies sampled at temperature 1, with 95 % intervals.
`unbraid practice verify` measures them again.

| it … | measured | holds within |
| --- | --- | --- |
{rows}
"""


def verify_claims(folder: Path, *, seed: int, probes: int, progress: Any = None) -> list[Claim]:
    """Measure every claim of a model's card again, on held-out prompts of another seed.

    Raises UserError when the card names a claim that is not measured any more, or other weights.
    """
    card = read_claims(folder)
    lm = load_model(folder)
    if card["weights"] != lm.id:
        raise UserError(
            f"{folder / CLAIMS} describes other weights than {folder} holds; train the assistant again"
        )
    claims = measure_claims(lm, seed=seed, probes=probes, progress=progress)
    missing = {c["name"] for c in card["claims"]} - {c.name for c in claims}
    if missing:
        raise UserError(
            f"{folder / CLAIMS} claims {min(missing)!r}, which nothing measures; train the assistant again"
        )
    return claims


def use_threads(count: int) -> int:
    """Let torch use `count` threads, or as it likes for 0; returns the number in force."""
    if count:
        torch.set_num_threads(count)
    return torch.get_num_threads()
