"""Targeted removal: take a concept out of the activations, and see what else goes with it.

For each task the latents that TPP would choose are ablated at every token, their contribution subtracted
and the error kept, and the model goes on from there. What is measured is the loss of the concept, on its own
documents (cross-entropy, and the accuracy of a probe), against the loss on the others. How many latents,
or how far along the difference of means, is decided on `fit`: the strongest dose that costs the other
documents at most `COST` nats a token. So all rows are compared at the same price, and every number comes
from `test`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unbraid.activations.documents import Document
from unbraid.activations.plan import Plan
from unbraid.evaluation.definitions import Definition
from unbraid.evaluation.labelled import (
    Matrix,
    Pooled,
    Reading,
    Rows,
    SuiteResult,
    Task,
    detectable,
    split_documents,
    tasks,
)
from unbraid.evaluation.probing import direction
from unbraid.evaluation.tpp import NONE, Basis, Probe, ablated, effects, fit_probe, strongest, unlearned
from unbraid.manifest.errors import UserError
from unbraid.manifest.progress import Progress
from unbraid.model.load import LanguageModel
from unbraid.model.read import logits_and_sites
from unbraid.model.replace import replaced
from unbraid.sae.base import SAE
from unbraid.sae.codes import SparseCodes, decode
from unbraid.stats.bootstrap import Interval, bootstrap_ratio

COST = 0.02
"""Nats a token that a dose may cost the documents without the concept, on `fit`."""
COUNTS = (1, 2, 5, 10, 20)
"""Doses of autoencoders: latents ablated; of directions that took no training: how many of them."""
STEPS = (0.25, 0.5, 1.0, 1.5, 2.0)
"""Doses of the difference of means and of the probe's direction: shares of a token's distance to the
negatives' mean that it is moved."""
NEAR = 10
"""A random latent is drawn among so many whose frequency is nearest."""
MOST_DOCUMENTS = 40
"""Documents of either class that the model reads under every dose."""
MOST_TASKS = 6
"""Concepts that are removed, one after the other; of more, the first by name."""
Change = Callable[[Tensor], Tensor]

_HOW = (
    "at the strongest of the doses (1, 2, 5, 10, 20 latents, or unit directions about the mean, by TPP's"
    " effect on select; .25 to 2 of the way along DiffMean or the probe to the negatives' mean) whose ΔCE on"
    " fit's documents without the concept is at"
    " most 0.02 nats, none where there is no such dose; at all read tokens, error kept; mean over tasks"
    " (at most 6), at most 40 test documents of either class, 35:30:35 by hash of content and seed;"
    " interval over documents"
)
DEFINITIONS: dict[str, Definition] = {
    "removal_target_ce": Definition(
        "what the concept's own documents lose, in nats a token",
        f"CE under the edit − CE on documents with the concept, {_HOW}",
        "higher",
    ),
    "removal_other_ce": Definition(
        "what other documents lose, in nats a token",
        f"CE under the edit − CE on documents without the concept, {_HOW}",
        "lower",
    ),
    "removal_target_probe": Definition(
        "drop in accuracy of the concept's probe",
        f"accuracy of a logistic regression fitted on fit's mean activations, before − after, {_HOW}",
        "higher",
    ),
    "removal_other_probe": Definition(
        "drop in accuracy of the other concepts' probes",
        f"the same for the probes of all other tasks, {_HOW}",
        "lower",
    ),
}


@dataclass(frozen=True, eq=False)
class Dose:
    """One way of removing a concept, from weak to strong along a list of them."""

    change: Change
    """What becomes of activations (n, d_in)."""
    means: Callable[[Rows], Matrix]
    """The same for the means of documents (rows,), (rows, d_in); exact, as the change is linear in codes."""
    name: str
    """What is done, for the details."""


def removal(
    pooled: Pooled,
    saes: Mapping[str, SAE],
    baselines: Sequence[str],
    lm: LanguageModel,
    documents: Sequence[Document],
    reading: Reading,
    seed: int,
    *,
    cost: float = COST,
    resamples: int = 2000,
    progress: Progress | None = None,
) -> SuiteResult:
    """Remove each task's concept by every autoencoder, those named in `baselines` among them.

    Further baselines: random latents of each that fire as often, raw neurons, principal components, as many
    random directions as the widest autoencoder has latents, the difference of means, the direction of the
    concept's own probe (the ceiling), and doing nothing. Raises UserError when no label divides the
    documents.
    """
    if not lm.generates:
        raise UserError(
            f"model {lm.name} says no next token, so removal cannot be measured; leave that suite out"
        )
    asked = tasks(documents, split_documents(documents, seed), seed)
    removed = asked[:MOST_TASKS]
    probes = [fit_probe(pooled.raw, task) for task in asked]
    totals: dict[str, dict[str, list[tuple[Matrix, Matrix, Rows]]]] = {}
    chosen: dict[str, dict[str, str]] = {}
    for number, (task, probe) in enumerate(zip(removed, probes, strict=False)):
        ways = _ways(pooled, saes, task, probe, seed)
        others = _few(task, "fit", False)
        losses = cross_entropies(
            lm,
            documents,
            others,
            reading,
            {f"{w}/{i}": d.change for w, ds in ways.items() for i, d in enumerate(ds)},
        )
        taken: dict[str, Dose] = {}
        for way, doses in ways.items():
            prices = [_price(losses, f"{way}/{i}") for i in range(len(doses))]
            allowed = [i for i, price in enumerate(prices) if price <= cost]
            if allowed:
                taken[way] = doses[allowed[-1]]
            chosen.setdefault(way, {})[task.name] = (
                doses[allowed[-1]].name if allowed else "no dose is cheap enough"
            )
        changes = {way: dose.change for way, dose in taken.items()}
        for metric, positive in (("removal_target_ce", True), ("removal_other_ce", False)):
            rows = _few(task, "test", positive)
            found = cross_entropies(lm, documents, rows, reading, changes)
            for way in ways:
                difference = found[way] - found[""] if way in found else np.zeros(len(rows))
                weight = found["tokens"] / found["tokens"].sum()
                part = (difference / found["tokens"].sum(), weight, rows)
                totals.setdefault(way, {}).setdefault(metric, []).append(part)
        for way in ways:
            for other, reader in zip(asked, probes, strict=True):
                metric = "removal_target_probe" if other is task else "removal_other_probe"
                rows, positive = other.rows["test"], other.positive["test"]
                before = reader.correct(pooled.raw[rows], positive)
                after = reader.correct(taken[way].means(rows), positive) if way in taken else before
                weight = np.full(len(rows), 1 / len(rows))
                part = ((before.astype(np.float64) - after) * weight, weight, rows)
                totals[way].setdefault(metric, []).append(part)
        if progress is not None:
            progress(number + 1, len(removed), "removing")
    rows = {
        way: {metric: _joined(parts, seed, resamples) for metric, parts in row.items()}
        for way, row in totals.items()
    }
    named = set(saes) - set(baselines)
    left = [task.name for task in asked[MOST_TASKS:]]
    notes = (f"not removed, as {MOST_TASKS} came first: {', '.join(left)}",) if left else ()
    return SuiteResult(
        "removal", rows, tuple(w for w in rows if w not in named), detectable(rows), {"doses": chosen}, notes
    )


def _ways(
    pooled: Pooled, saes: Mapping[str, SAE], task: Task, probe: Probe, seed: int
) -> dict[str, list[Dose]]:
    found: dict[str, list[Dose]] = {}
    for name, sae in saes.items():
        basis = Basis(pooled.latents[name], sae.W_dec.detach().double().cpu().numpy(), False)
        order = strongest(effects(basis, task, probe), max(COUNTS))
        alike = matched(order, pooled.fired[name], seed)
        for way, latents in ((name, order), (f"{name}: random latents", alike)):
            doses = [_ablation(pooled, sae, basis, latents[:n]) for n in COUNTS if n <= len(latents)]
            if doses:
                found[way] = doses
    raw, select = pooled.raw, task.rows["select"]
    centre = raw[select].mean(axis=0)
    for name, columns in unlearned(raw[select], saes, seed).items():
        basis = Basis((raw - centre) @ columns, columns.T, True)
        order = strongest(effects(basis, task, probe), max(COUNTS))
        found[name] = [_flattened(raw, centre, columns[:, order[:n]]) for n in COUNTS if n <= len(order)]
    own = probe.weight / max(float(np.linalg.norm(probe.weight)), 1e-300)
    negatives = select[~task.positive["select"]]
    for name, unit in (("DiffMean", direction(raw, task)), ("probe direction", own)):
        bar = float((raw[negatives] @ unit).mean())
        found[name] = [_shift(raw, unit, bar, step) for step in STEPS]
    found[NONE] = [Dose(lambda x: x, lambda rows: raw[rows], "nothing")]
    return found


def matched(latents: Rows, fired: Matrix, seed: int) -> Rows:
    """For each latent another one, none twice, drawn among the NEAR that fire about as often."""
    generator = np.random.default_rng(seed)
    free = np.setdiff1d(np.flatnonzero(fired > 0), latents)
    found: list[int] = []
    for latent in latents:
        if not len(free):
            break
        distance = np.abs(np.log(fired[free]) - np.log(max(fired[latent], 1)))
        near = free[np.argsort(distance, kind="stable")[:NEAR]]
        found.append(int(generator.choice(near)))
        free = free[free != found[-1]]
    return np.array(found, dtype=np.int64)


def _ablation(pooled: Pooled, sae: SAE, basis: Basis, latents: Rows) -> Dose:
    chosen = torch.zeros(sae.config.d_sae, dtype=torch.bool)
    chosen[torch.from_numpy(latents)] = True

    @torch.no_grad()
    def change(x: Tensor) -> Tensor:
        codes = sae.encode(x.float())
        kept = codes.values * chosen.to(codes.indices.device)[codes.indices]
        return x - decode(SparseCodes(codes.indices, kept), sae.W_dec).to(x.dtype)

    return Dose(change, lambda rows: ablated(pooled.raw, basis, rows, latents), f"{len(latents)} latents")


def _flattened(raw: Matrix, centre: Matrix, columns: Matrix) -> Dose:
    """What is along each of some directions (d_in, n), about the centre (d_in,), taken away."""
    along, middle = torch.from_numpy(columns).float(), torch.from_numpy(centre).float()

    def change(x: Tensor) -> Tensor:
        values = (x.float() - middle.to(x.device)) @ along.to(x.device)
        return x - (values @ along.to(x.device).T).to(x.dtype)

    return Dose(
        change,
        lambda rows: raw[rows] - (raw[rows] - centre) @ columns @ columns.T,
        f"{columns.shape[1]} directions",
    )


def _shift(raw: Matrix, unit: Matrix, bar: float, step: float) -> Dose:
    along = torch.from_numpy(unit).float()

    def change(x: Tensor) -> Tensor:
        u = along.to(x.device)
        return x - step * (x.float() @ u - bar)[:, None] * u

    return Dose(
        change, lambda rows: raw[rows] - step * np.outer(raw[rows] @ unit - bar, unit), f"{step:g} of the way"
    )


def _few(task: Task, split: str, positive: bool) -> Rows:
    return task.rows[split][task.positive[split] == positive][:MOST_DOCUMENTS]


def _price(losses: Mapping[str, Matrix], way: str) -> float:
    return float((losses[way] - losses[""]).sum() / losses["tokens"].sum())


def _joined(parts: Sequence[tuple[Matrix, Matrix, Rows]], seed: int, resamples: int) -> Interval:
    """Mean over tasks; a document that several tasks share is drawn for all of them."""
    above, below, rows = (np.concatenate(each) for each in zip(*parts, strict=True))
    return bootstrap_ratio(above, below, rows, seed, resamples)


@torch.no_grad()
def cross_entropies(
    lm: LanguageModel,
    documents: Sequence[Document],
    rows: Rows,
    reading: Reading,
    changes: Mapping[str, Change],
) -> dict[str, Matrix]:
    """Sums over the tokens of each document (rows,) of −log p of the next token, in nats: under each
    change, by its name, under none, as "", and how many tokens, as "tokens".

    A token counts when neither it nor the next is special. Raises UserError when no token counts.
    """
    sums = {name: np.zeros(len(rows)) for name in ("", "tokens", *changes)}
    few = [documents[row] for row in rows]
    for group in Plan(lm, few, reading.context, reading.batch_tokens, reading.positions, None):
        for pieces in group.batches:
            width = max(len(piece.window.input_ids) for piece in pieces)
            ids = torch.full((len(pieces), width), lm.pad_id, dtype=torch.long)
            real, keep, plain = (torch.zeros(ids.shape, dtype=torch.bool) for _ in range(3))
            for row, piece in enumerate(pieces):
                end = len(piece.window.input_ids)
                ids[row, :end] = torch.tensor(piece.window.input_ids)
                real[row, :end] = True
                keep[row, :end] = torch.from_numpy(piece.keep)
                plain[row, :end] = ~torch.tensor(piece.window.special_mask)
            scored = plain[:, :-1] & plain[:, 1:]
            document = torch.tensor([piece.document for piece in pieces])[:, None].expand(scored.shape)[
                scored
            ]
            targets = ids[:, 1:][scored]

            def add(name: str, values: Tensor, document: Tensor = document) -> None:
                np.add.at(sums[name], document.numpy(), values.double().cpu().numpy())

            def losses(
                ids: Tensor = ids, real: Tensor = real, scored: Tensor = scored, targets: Tensor = targets
            ) -> Tensor:
                logits, _ = logits_and_sites(lm, ids.to(lm.device), real.long().to(lm.device))
                said = logits[:, :-1][scored.to(logits.device)].float().log_softmax(dim=-1)
                return -said.gather(1, targets.to(said.device)[:, None]).squeeze(1)

            add("tokens", torch.ones(len(targets)))
            add("", losses())
            for name, change in changes.items():
                with replaced(lm, reading.site, change, keep):
                    add(name, losses())
    if not sums["tokens"].sum():
        raise UserError("the labelled documents have no two ordinary tokens in a row; give longer ones")
    return sums
