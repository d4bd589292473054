"""Intent gates: a linear classifier on the last prompt token that decides whether a request is guarded.

Trained as a standardised, L2-regularised logistic regression; the standardisation is folded into weight and
bias, so that at run time a gate is one dot product (`model.edits.Gate`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_tensors
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from unbraid.manifest.errors import IntegrityError, UserError
from unbraid.manifest.files import building, write_bytes
from unbraid.manifest.progress import Progress
from unbraid.manifest.record import Manifest, check_files, write_manifest
from unbraid.model.edits import Gate
from unbraid.model.load import LanguageModel, Message
from unbraid.model.read import read_sites
from unbraid.model.sites import Site
from unbraid.stats.bootstrap import rate

GATE_FILE = "gate.safetensors"
Conversation = Sequence[Message]
Floats = NDArray[np.float64]


def last_prompt_activations(
    lm: LanguageModel,
    prompts: Sequence[Conversation],
    site: Site,
    *,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> NDArray[np.float32]:
    """Activations (n, d) at `site` on the last token of each prompt, generation prompt included.

    Prompts are encoded exactly as `model.generate` encodes them, so that a gate sees in service what it saw
    in training.
    """
    encoded = [lm.encode_prompt(prompt) for prompt in prompts]
    out = np.empty((len(encoded), lm.layout.width(site)), dtype=np.float32)
    # Prompts of like length share a batch, which keeps padding small.
    order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i]), i))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        width = max(len(encoded[i]) for i in rows)
        ids = torch.full((len(rows), width), lm.pad_id, dtype=torch.long)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for r, i in enumerate(rows):
            ids[r, width - len(encoded[i]) :] = torch.tensor(encoded[i])
            mask[r, width - len(encoded[i]) :] = 1
        activations = read_sites(lm, ids, mask, [site])[site]  # (rows, width, d)
        out[rows] = activations[:, -1].float().cpu().numpy()
        if progress is not None:
            progress(start + len(rows), len(order), "prompts")
    return out


def train_gate(
    lm: LanguageModel,
    site: Site,
    positive_prompts: Sequence[Conversation],
    negative_prompts: Sequence[Conversation],
    *,
    held_out_positive: Sequence[Conversation],
    held_out_negative: Sequence[Conversation],
    recall: float = 0.99,
    margin: float = 0.25,
    strength: float = 1.0,
    seed: int = 0,
    name: str = "intent",
    progress: Progress | None = None,
) -> tuple[Gate, dict[str, Any]]:
    """Train a gate that opens for positive prompts; returns it with what was measured on the held-out ones.

    The threshold is the highest that keeps the held-out recall at `recall` or above, lowered by `margin`
    standard deviations of the held-out positive scores, so that a slightly weaker request still opens the
    gate. `strength` is scikit-learn's C. Since the threshold was set on the held-out prompts, their rates
    flatter it a little: measure with `gate_rates` on prompts of a third split before you publish them.

    Raises UserError when a set of prompts is empty or `recall` is not in (0, 1].
    """
    sets = {
        "positive prompts": positive_prompts,
        "negative prompts": negative_prompts,
        "held-out positive prompts": held_out_positive,
        "held-out negative prompts": held_out_negative,
    }
    for what, group in sets.items():
        if not group:
            raise UserError(f"the gate has no {what}; give it at least one")
    if not 0 < recall <= 1:
        raise UserError(f"recall is {recall:g}; give a share above 0 and at most 1")
    x = last_prompt_activations(
        lm, [p for prompts in sets.values() for p in prompts], site, progress=progress
    )
    train, positive, negative = _cut(x, len(positive_prompts) + len(negative_prompts), len(held_out_positive))
    labels = np.arange(len(train)) < len(positive_prompts)
    weight, bias = _fit(train, labels, strength=strength, seed=seed)
    scores = positive @ weight + bias
    threshold = choose_threshold(scores, recall=recall, margin=margin)
    gate = Gate(site=site, weight=weight.astype(np.float32), bias=bias, threshold=threshold, name=name)
    facts: dict[str, Any] = {
        "site": str(site),
        "name": name,
        "trained_on": {"positive": len(positive_prompts), "negative": len(negative_prompts)},
        "stated_recall": recall,
        "margin": margin,
        "strength": strength,
        "selection": _rates(gate, positive, negative),
    }
    return gate, facts


def gate_rates(
    lm: LanguageModel, gate: Gate, positive: Sequence[Conversation], negative: Sequence[Conversation]
) -> dict[str, Any]:
    """Recall on positive prompts and false-open rate on negative ones, each with its Wilson interval."""
    x = last_prompt_activations(lm, [*positive, *negative], gate.site)
    return _rates(gate, x[: len(positive)].astype(np.float64), x[len(positive) :].astype(np.float64))


def choose_threshold(positive_scores: Floats, *, recall: float, margin: float) -> float:
    """The threshold t for which `score > t` holds for `recall` of the scores, less `margin` deviations."""
    ordered = np.sort(positive_scores)
    missed = math.floor((1 - recall) * len(ordered) + 1e-9)
    spread = float(ordered.std()) or max(1e-6, abs(float(ordered[0])) * 1e-6)
    lowest = float(ordered[min(missed, len(ordered) - 1)])
    # Strictly below the lowest score that must pass, also when no margin is asked for.
    return min(lowest - margin * spread, float(np.nextafter(lowest, -math.inf)) - 1e-6 * spread)


def save_gate(
    gate: Gate,
    folder: Path,
    *,
    model_id: str,
    tokenizer_id: str = "",
    facts: Mapping[str, Any],
    command: str = "",
    seed: int = 0,
    inputs: Mapping[str, str] | None = None,
) -> Manifest:
    """Write a gate as an artifact: `gate.safetensors` and its manifest, whose inputs name the model.

    `inputs` adds ids of the prompt sets it was trained on. Raises UserError when `folder` exists.
    """
    tensors = {
        "weight": np.ascontiguousarray(gate.weight),
        "bias": np.array([gate.bias], dtype=np.float64),
        "threshold": np.array([gate.threshold], dtype=np.float64),
    }
    data = save_tensors(tensors, metadata={"site": str(gate.site), "name": gate.name})
    named = {"model": model_id, **({"tokenizer": tokenizer_id} if tokenizer_id else {}), **(inputs or {})}
    with building(folder) as partial:
        write_bytes(partial / GATE_FILE, data)
        return write_manifest(partial, kind="gate", command=command, seed=seed, inputs=named, facts=facts)


def load_gate(folder: Path) -> tuple[Gate, Manifest]:
    """Read a gate back after hashing its files again.

    Raises UserError when the folder is not a gate and IntegrityError when it does not match its manifest.
    """
    manifest = check_files(folder)
    path = folder / GATE_FILE
    if manifest.kind != "gate" or GATE_FILE not in manifest.files:
        raise UserError(
            f"{folder} is of kind {manifest.kind}, not gate; name a folder that a gate was saved to"
        )
    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            weight, bias, threshold = (file.get_tensor(key) for key in ("weight", "bias", "threshold"))
        gate = Gate(
            site=Site.parse(about["site"]),
            weight=weight,
            bias=float(bias[0]),
            threshold=float(threshold[0]),
            name=about.get("name", ""),
        )
    except (SafetensorError, KeyError, ValueError, IndexError) as error:
        raise IntegrityError(f"{path} does not hold a gate ({error}); train it again") from error
    return gate, manifest


def _cut(x: NDArray[np.float32], n_train: int, n_positive: int) -> tuple[Floats, Floats, Floats]:
    train, positive, negative = np.split(x.astype(np.float64), [n_train, n_train + n_positive])
    return train, positive, negative


def _fit(x: Floats, labels: NDArray[np.bool_], *, strength: float, seed: int) -> tuple[Floats, float]:
    """Weight (d,) and bias of a logistic regression on x (n, d), standardisation folded in."""
    scaler = StandardScaler().fit(x)
    mean, scale = np.asarray(scaler.mean_), np.asarray(scaler.scale_)
    model = LogisticRegression(C=strength, class_weight="balanced", max_iter=2000, random_state=seed)
    model.fit((x - mean) / scale, labels)
    weight = np.ravel(model.coef_).astype(np.float64) / scale
    return weight, float(np.ravel(model.intercept_)[0]) - float(weight @ mean)


def _rates(gate: Gate, positive: Floats, negative: Floats) -> dict[str, Any]:
    opens = [x @ gate.weight.astype(np.float64) + gate.bias > gate.threshold for x in (positive, negative)]
    return {"recall": rate(opens[0]).as_dict(), "false_open": rate(opens[1]).as_dict()}
