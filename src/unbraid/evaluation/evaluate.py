"""Evaluate an autoencoder on a model and a text: two passes, every number with its interval."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unbraid.activations.corpus import Positions, read_corpus
from unbraid.activations.documents import Document
from unbraid.evaluation.behaviour import Behaviour, Replacement
from unbraid.evaluation.reconstruction import Reconstruction
from unbraid.manifest.errors import UserError
from unbraid.manifest.progress import Progress
from unbraid.model.load import LanguageModel
from unbraid.model.read import read_sites
from unbraid.model.sites import Site
from unbraid.sae.base import SAE
from unbraid.stats.bootstrap import Interval


@dataclass(frozen=True)
class Evaluation:
    """What was measured, and on what."""

    metrics: Mapping[str, Interval]
    """Value and 95 % interval by name; definitions in `reconstruction` and `behaviour`."""
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

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        facts = {name: value for name, value in vars(self).items() if name != "metrics"}
        return facts | {"metrics": {name: found.as_dict() for name, found in self.metrics.items()}}


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
    progress: Progress | None = None,
) -> Evaluation:
    """Measure reconstruction, sparsity and what splicing the autoencoder in costs the model.

    The autoencoder replaces the activations at `site` (its own, if None) of all tokens but BOS, EOS and
    PAD, or of assistant replies alone; the cost is taken over every prediction of an ordinary token from
    an ordinary token. Stops after `tokens` reconstructed tokens. Intervals come from drawing documents
    again.

    Raises UserError when the autoencoder belongs to another model, when sizes differ, when the site does
    not exist, or when the text leaves nothing to measure.
    """
    (found,) = evaluate_all(
        [sae], lm, documents, site=site, tokens=tokens, context=context, positions=positions, seed=seed,
        batch_tokens=batch_tokens, progress=progress,
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
    progress: Progress | None = None,
) -> list[Evaluation]:
    """Measure several autoencoders as `evaluate` does, running the bare model and its ablations once for
    all that read the same site."""
    by_site: dict[Site, list[int]] = {}
    for number, sae in enumerate(saes):
        chosen = Site.parse(site) if site is not None else sae.site
        check_fit(sae, lm, chosen)
        by_site.setdefault(chosen, []).append(number)
    for name, value in (("tokens", tokens), ("context", context), ("batch_tokens", batch_tokens)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; choose 1 or more")
    corpus = read_corpus(
        lm, documents, tokens=tokens, context=context, positions=positions, batch_tokens=batch_tokens
    )
    total, done = (1 + len(by_site)) * len(corpus.batches), 0

    seen = [Reconstruction(sae.config.d_in, sae.config.d_sae) for sae in saes]
    for batch in corpus.batches:
        read = read_sites(lm, batch.input_ids, batch.attention_mask, list(by_site))
        blocks = batch.blocks[:, None].expand(batch.chosen.shape)[batch.chosen]
        for chosen, numbers in by_site.items():
            x = read[chosen][batch.chosen.to(read[chosen].device)].float()
            for number in numbers:
                with torch.no_grad():
                    seen[number].add(x, saes[number](x), blocks)
        done += 1
        if progress is not None:
            progress(done, total, "reconstruction")

    metrics = [reconstruction.metrics(seed) for reconstruction in seen]
    for chosen, numbers in by_site.items():
        replacements = {str(number): _spliced(saes[number]) for number in numbers}
        replacements |= {"zero": torch.zeros_like, "mean": _constant(seen[numbers[0]].mean.float())}
        behaviour = Behaviour(lm, chosen, replacements)
        for batch in corpus.batches:
            behaviour.add(batch)
            done += 1
            if progress is not None:
                progress(done, total, "behaviour")
        for number in numbers:
            metrics[number] |= behaviour.metrics(str(number), seed)

    sites = {number: str(chosen) for chosen, numbers in by_site.items() for number in numbers}
    return [
        Evaluation(
            metrics=found,
            site=sites[number],
            model=lm.name,
            model_id=lm.id,
            tokens=corpus.tokens,
            documents=corpus.documents,
            positions=positions,
            context=context,
            seed=seed,
        )
        for number, found in enumerate(metrics)
    ]


def _spliced(sae: SAE) -> Replacement:
    return lambda x: sae(x.float()).x_hat


def _constant(value: Tensor) -> Replacement:
    return lambda x: value.to(x.device).expand(x.shape)


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
