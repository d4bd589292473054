"""Evaluate autoencoders on a model and a text: read once, measure each, every number with its interval."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from unbraid.activations.corpus import Positions, read_corpus
from unbraid.activations.documents import Document
from unbraid.evaluation import behaviour, geometry, latents, proxies, reconstruction
from unbraid.evaluation.behaviour import Behaviour
from unbraid.evaluation.definitions import Definition, Undefined
from unbraid.evaluation.latents import Latents
from unbraid.evaluation.proxies import Contexts
from unbraid.evaluation.reading import Place, Reading, run_of, scored
from unbraid.evaluation.reconstruction import Reconstruction
from unbraid.evaluation.references import (
    Reconstruct,
    Reference,
    coordinates,
    projection,
    random_basis,
    untrained,
)
from unbraid.evaluation.scoring import States, score
from unbraid.manifest.errors import UserError
from unbraid.manifest.progress import Progress
from unbraid.model.load import LanguageModel
from unbraid.model.pages import give_back
from unbraid.model.sites import Site
from unbraid.sae.base import SAE
from unbraid.stats.bootstrap import Interval

DEFINITIONS: Mapping[str, Definition] = {
    **reconstruction.DEFINITIONS,
    **latents.DEFINITIONS,
    **behaviour.DEFINITIONS,
    **geometry.DEFINITIONS,
    **proxies.DEFINITIONS,
}
"""Every metric that `evaluate` measures."""
Metrics = dict[str, "Interval | Undefined"]
GIVE_BACK_EVERY = 8
"""Batches after which freed memory goes back to the system, so that memory does not grow with the text."""


@dataclass(frozen=True, eq=False)
class Details:
    """What is known of every latent, each (d_sae,), and of all activations of latents."""

    latents: Latents
    """Counts."""
    geometry: Mapping[str, Tensor]
    """Norms and cosines by the names of `geometry.DEFINITIONS`."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured, and on what."""

    metrics: Mapping[str, Interval]
    """Value and 95 % interval by name; `DEFINITIONS` says what they are."""
    undefined: Mapping[str, str]
    """Metrics that have no value here, with the reason."""
    definitions: Mapping[str, str]
    """Id of each metric's definition, by name."""
    references: Mapping[str, Mapping[str, Interval]]
    """The same metrics, as far as they apply, of what took no training: see `references`."""
    site: str
    """Where the autoencoder was spliced in."""
    model: str
    """Name of the model."""
    model_id: str
    """SHA-256 of its weights."""
    tokens: int
    """Tokens reconstructed; `dead` means never fired over these."""
    documents: int
    """Documents they came from."""
    positions: str
    """Which tokens were reconstructed: all or reply."""
    context: int
    """Tokens the model read at once."""
    seed: int
    """Seed of the intervals."""
    details: Details = field(compare=False, repr=False)
    """Latent by latent; not among the JSON values."""

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON values, but the details."""
        facts = {
            name: value
            for name, value in vars(self).items()
            if name not in ("metrics", "references", "details")
        }
        return facts | {
            "metrics": {name: found.as_dict() for name, found in self.metrics.items()},
            "references": {
                reference: {name: found.as_dict() for name, found in metrics.items()}
                for reference, metrics in self.references.items()
            },
        }


def evaluate(
    sae: SAE,
    lm: LanguageModel,
    documents: Iterable[Document],
    *,
    site: Site | str | None = None,
    tokens: int | None = None,
    context: int = 256,
    positions: Positions = "all",
    seed: int = 0,
    batch_tokens: int = 2048,
    references: Sequence[Reference] = (),
    progress: Progress | None = None,
) -> Evaluation:
    """Measure reconstruction, sparsity, weights and what splicing the autoencoder in costs the model.

    The autoencoder replaces the activations at `site` (its own, if None) of all tokens but BOS, EOS and
    PAD, or of assistant replies alone; the cost is taken over every prediction of an ordinary token from
    an ordinary token. Stops after `tokens` reconstructed tokens. Intervals come from drawing documents
    again. `references` are measured beside it.

    Raises UserError when the autoencoder belongs to another model, when sizes differ, when the site does
    not exist, when the text leaves nothing to measure, or when anything is NaN or infinite.
    """
    (found,) = evaluate_all(
        [sae], lm, documents, site=site, tokens=tokens, context=context, positions=positions, seed=seed,
        batch_tokens=batch_tokens, references=references, progress=progress,
    )  # fmt: skip
    return found


def evaluate_all(
    saes: Sequence[SAE],
    lm: LanguageModel,
    documents: Iterable[Document],
    *,
    site: Site | str | None = None,
    tokens: int | None = None,
    context: int = 256,
    positions: Positions = "all",
    seed: int = 0,
    batch_tokens: int = 2048,
    references: Sequence[Reference] = (),
    names: Sequence[str] = (),
    progress: Progress | None = None,
) -> list[Evaluation]:
    """Measure several autoencoders as `evaluate` does, running the bare model up to their sites, and what
    does not depend on them after it, once for all. `names` are what messages call them."""
    names = names or [f"autoencoder {number + 1}" for number in range(len(saes))]
    by_site: dict[Site, list[int]] = {}
    for number, sae in enumerate(saes):
        chosen = Site.parse(site) if site is not None else sae.site
        check_fit(sae, lm, chosen)
        check_finite(sae, names[number])
        by_site.setdefault(chosen, []).append(number)
    for name, value in (("tokens", tokens), ("context", context), ("batch_tokens", batch_tokens)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; choose 1 or more")
    corpus = read_corpus(
        lm, documents, tokens=tokens, context=context, positions=positions, batch_tokens=batch_tokens,
        by_length=True,
    )  # fmt: skip
    part = len(corpus.batches)
    every = part * (1 + len(by_site) * (1 + bool(references)))
    before = 0

    def step(done: int, total: int, note: str = "") -> None:
        if progress is not None:
            progress(before + done, every, note)

    found: dict[int, _Measured] = {}
    beside: dict[int, dict[str, _Measured]] = {number: {} for number in range(len(saes))}
    with Reading(lm, corpus, list(by_site), step) as reading:
        before += part
        for place, numbers in zip(reading.places.values(), by_site.values(), strict=True):
            subjects = [_Subject(names[n], saes[n], saes[n]) for n in numbers]
            found |= zip(numbers, _measure(reading, place, subjects, seed, step), strict=True)
            before += part
            if references:
                pairs = [
                    (n, reference, _reference(reference, names[n], saes[n], place, found[n].metrics, seed))
                    for n in numbers
                    for reference in references
                ]
                measured = _measure(reading, place, [subject for _, _, subject in pairs], seed, step)
                for (n, reference, _), its in zip(pairs, measured, strict=True):
                    beside[n][reference] = its
                before += part
    sites = {number: str(chosen) for chosen, numbers in by_site.items() for number in numbers}
    return [
        Evaluation(
            metrics=defined(found[n].metrics),
            undefined={name: m.why for name, m in found[n].metrics.items() if isinstance(m, Undefined)},
            definitions={name: DEFINITIONS[name].id for name in found[n].metrics},
            references={name: defined(its.metrics) for name, its in beside[n].items()},
            site=sites[n],
            model=lm.name,
            model_id=lm.id,
            tokens=corpus.tokens,
            documents=corpus.documents,
            positions=positions,
            context=context,
            seed=seed,
            details=found[n].details,
        )
        for n in range(len(saes))
    ]


def defined(metrics: Metrics) -> dict[str, Interval]:
    """Those that have a value."""
    return {name: value for name, value in metrics.items() if isinstance(value, Interval)}


@dataclass(frozen=True, eq=False)
class _Subject:
    """Something that reconstructs."""

    name: str
    reconstruct: Reconstruct
    sae: SAE | None
    """The autoencoder that it is, if it is one."""
    constant: bool = False
    """Whether it says E x everywhere, so that the model after it is that of the mean ablation."""


@dataclass(frozen=True, eq=False)
class _Measured:
    metrics: Metrics
    details: Details


def _reference(kind: Reference, name: str, sae: SAE, place: Place, metrics: Metrics, seed: int) -> _Subject:
    """A reference for an autoencoder, of its own L0 rounded."""
    l0, mean = metrics["l0"], place.mean.float()
    assert isinstance(l0, Interval)
    k = min(round(l0.value), sae.config.d_in)
    name, device = f"{kind} beside {name}", place.lm.device
    if kind == "untrained":
        fresh = untrained(sae, torch.cat(place.sample), seed).to(device)
        return _Subject(name, fresh, fresh)
    if kind == "neurons":
        return _Subject(name, coordinates(mean.to(device), k), None)
    k = 0 if kind == "mean" else k
    basis = place.components(k) if kind == "pca" else random_basis(len(mean), k, seed)
    return _Subject(name, projection(mean.to(device), basis.to(device)), None, constant=kind == "mean")


def _measure(
    reading: Reading, place: Place, subjects: Sequence[_Subject], seed: int, progress: Callable[..., None]
) -> list[_Measured]:
    """Everything about some subjects at one place, in one pass over what was read."""
    lm, batches = reading.lm, reading.corpus.batches
    width = lm.layout.width(place.site)
    sums = [Reconstruction(width) for _ in subjects]
    counts = [Latents(s.sae.config.d_sae if s.sae else width) for s in subjects]
    contexts = [
        Contexts(proxies.drawn(s.sae.config.d_sae, seed), s.sae.config.d_sae) if s.sae else None
        for s in subjects
    ]
    ablations = {"zero": torch.zeros(width), "mean": place.mean.float()}
    behaved = Behaviour([*ablations, *map(str, range(len(subjects)))])
    for number, batch in reading.batches():
        states, x, stream = place.clean(number, batch)
        runs, rows = run_of(batch), batch.chosen.nonzero()[:, 0]
        spread = place.spread(x, runs)
        others: dict[str, States] = {}
        at = tuple(index.to(states.device) for index in scored(batch))
        for name, value in ablations.items():
            others[name] = place.ablated(name, value.to(x.device), batch, stream)
        for i, subject in enumerate(subjects):
            with torch.no_grad():
                output = subject.reconstruct(x)
            if not bool(output.x_hat.isfinite().all()) or not bool(output.codes.values.isfinite().all()):
                raise UserError(f"{subject.name} reconstructs NaN or infinite numbers, so fvu has no value")
            sums[i].add(x, output, batch.blocks[rows], spread)
            counts[i].add(output.codes, rows)
            if (found := contexts[i]) is not None:
                found.add(number, batch, output.codes)
            if subject.constant:
                others[str(i)] = others["mean"]
            else:
                others[str(i)] = States.each(place.spliced(batch, stream, output.x_hat)[at])
        if batch.scored.any():
            values = score(place.tail, states[at], batch.input_ids[:, 1:].T[batch.scored.T], others)
            _check_scores(values, lm, subjects)
            behaved.add(values, batch.blocks[scored(batch)[0]])
        if number % GIVE_BACK_EVERY == 0:
            give_back()
        progress(number + 1, len(batches), "measuring")
    result: list[_Measured] = []
    for i, subject in enumerate(subjects):
        metrics = sums[i].metrics(seed)
        weights: Mapping[str, Tensor] = {}
        if subject.sae is not None and (its := contexts[i]) is not None:
            weights = geometry.geometry(subject.sae)
            metrics |= counts[i].metrics(seed) | geometry.metrics(weights)
            metrics |= proxies.metrics(its, subject.sae, lm, batches, seed)
        metrics |= behaved.metrics(str(i), seed)
        result.append(_Measured(metrics, Details(counts[i], weights)))
    return result


def _check_scores(values: Mapping[str, Tensor], lm: LanguageModel, subjects: Sequence[_Subject]) -> None:
    for name, value in values.items():
        if not bool(value.isfinite().all()):
            metric, _, what = name.partition("_")
            where = f" with {subjects[int(what)].name} in place" if what.isdigit() else f" ({what})"
            raise UserError(
                f"{metric} of model {lm.name}{where} is NaN or infinite at some token, so nothing was "
                "reported; load the model with --dtype float32 or leave the autoencoder out"
            )


def check_fit(sae: SAE, lm: LanguageModel, site: Site) -> None:
    """Raise UserError when an autoencoder was trained on other weights or for activations of another size."""
    if sae.config.d_in != (width := lm.layout.width(site)):
        raise UserError(
            f"the autoencoder reads {sae.config.d_in} dimensions but model {lm.name} has {width} at {site}; "
            "name the model that it was trained on"
        )
    if sae.config.model_id and sae.config.model_id != lm.id:
        raise UserError(
            f"the autoencoder was trained on {sae.config.model_name}, weights {sae.config.model_id[:12]}… "
            f"but model {lm.name} has {lm.id[:12]}…; name the model that it was trained on"
        )


def check_finite(sae: SAE, name: str) -> None:
    """Raise UserError, naming the weights, when an autoencoder has NaN or infinity among them."""
    for weights, tensor in sae.state_dict().items():
        # A latent that never fires may have a threshold of +∞.
        wrong = tensor.isnan() if weights == "threshold" else ~tensor.isfinite()
        if tensor.is_floating_point() and bool(wrong.any()):
            raise UserError(
                f"{weights} of {name} has NaN or infinite numbers, so no metric would have a value; "
                "train it again or restore its file"
            )
