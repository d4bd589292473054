"""Scorers that ask the model itself and no judge: surprisal and intervention.

Both read a label as text that the model has to make sense of, so they say little with a model that has never
read descriptions; what they give for unrelated words is their chance level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unbraid.features.labels.contexts import Evidence
from unbraid.features.labels.passages import padded
from unbraid.features.labels.scorers import Labelled
from unbraid.features.labels.scores import Score, not_measured
from unbraid.model.apply import applied
from unbraid.model.edits import Edit
from unbraid.model.generate import generate
from unbraid.model.load import LanguageModel
from unbraid.model.sites import Site
from unbraid.sae.base import SAE
from unbraid.stats.bootstrap import bootstrap_mean
from unbraid.stats.jackknife import auroc_by_document

UNRELATED = "various unrelated sentences"
"""What is said of a window instead of its label."""
PROMPTS = 10
"""Silent test windows that are continued under an intervention."""
DIVERGENCE = 0.5
"""Mean KL(clean‖steered) of the next token, in nats, that the strength is set for."""
NEW_TOKENS = 24
"""Length of a continuation."""
STEPS = 14
"""Halvings of the interval in which the strength lies."""
BATCH = 32
Matrix = NDArray[np.float64]


def surprisal(lm: LanguageModel, labelled: Sequence[Labelled]) -> list[Score]:
    """Does the label prepare the model for the text?  AUROC, positives against negatives, of how much a
    window's loss falls when the label is said before it instead of "various unrelated sentences"."""
    scores: list[Score] = []
    plain: dict[int, Matrix] = {}  # by the evidence, which may come with many labels
    for label, evidence in labelled:
        windows = (*evidence.positives, *evidence.negatives)
        truth = np.arange(len(windows)) < len(evidence.positives)
        prefixes = [_tokens(lm, f"These texts have in common: {what}.\n\n") for what in (UNRELATED, label)]
        longest = max((len(w.tokens) for w in windows), default=0) + max(map(len, prefixes))
        why = ""
        if lm.layout.unembed is None:
            why = f"{lm.name} gives no probabilities"
        elif truth.all() or not truth.any():
            why = "it needs windows of both kinds"
        elif lm.context is not None and longest > lm.context:
            why = f"the label and a window have {longest} tokens, more than the model's context {lm.context}"
        if why:
            scores.append(not_measured("surprisal", lm.name, 0.5, why, evidence))
            continue
        texts = [w.tokens for w in windows]
        if id(evidence) not in plain:
            plain[id(evidence)] = mean_log_p(lm, [prefixes[0]] * len(windows), texts)
        gained = mean_log_p(lm, [prefixes[1]] * len(windows), texts) - plain[id(evidence)]
        value = auroc_by_document(gained, truth, [w.document for w in windows])
        blank = not_measured("surprisal", lm.name, 0.5, "", evidence)
        scores.append(Score("surprisal", lm.name, value, 0.5, blank.positives, blank.negatives, blank.hard))
    return scores


def intervention(
    lm: LanguageModel, sae: SAE, site: Site, labelled: Sequence[Labelled], seed: int = 0
) -> list[Score]:
    """Does the model speak of the label when the latent is switched on?  Mean over continuations of
    log p(label | steered) − log p(label | clean), nats a token of the label, by the model itself.

    The latent's decoder row is added at every token, so far that KL(clean‖steered) is 0.5 nats on average;
    both continuations of a prompt draw the same noise.  Steered text makes the model expect other words
    whatever they mean, so chance is not 0: it is measured, as the score of "various unrelated sentences".
    """
    scores: list[Score] = []
    steered: dict[int, _Steered] = {}  # by the evidence, which may come with many labels
    for label, evidence in labelled:
        if id(evidence) not in steered:
            steered[id(evidence)] = _steered(lm, sae, site, evidence)
        found = steered[id(evidence)]
        if found.why_not:
            scores.append(not_measured("intervention", lm.name, 0.0, found.why_not, evidence))
            continue
        value = bootstrap_mean(found.gain(lm, label), found.documents, seed)
        details = {"strength": found.strength, "prompts": len(found.documents)}
        blank = not_measured("intervention", lm.name, 0.0, "", evidence)
        scores.append(
            Score(
                "intervention",
                lm.name,
                value,
                found.chance,
                blank.positives,
                blank.negatives,
                blank.hard,
                details=details,
            )
        )
    return scores


@dataclass(frozen=True)
class _Steered:
    """The model's continuations with and without a latent, each followed by the question what it is about."""

    steered: Sequence[Sequence[int]] = ()
    clean: Sequence[Sequence[int]] = ()
    documents: Sequence[str] = ()
    strength: float = 0.0
    chance: float = 0.0
    why_not: str = ""

    def gain(self, lm: LanguageModel, label: str) -> Matrix:
        """log p(label | steered) − log p(label | clean), nats a token, of each prompt (n,)."""
        tail = _tokens(lm, f" {label}", begin=False)
        with_, without = (mean_log_p(lm, asked, [tail] * len(asked)) for asked in (self.steered, self.clean))
        return with_ - without


def _steered(lm: LanguageModel, sae: SAE, site: Site, evidence: Evidence) -> _Steered:
    chosen = list({w.document: w for w in reversed(evidence.negatives)}.values())[:PROMPTS]
    if not chosen:
        return _Steered(why_not="it needs test windows on which the latent is silent")
    if not lm.generates or lm.layout.unembed is None:
        return _Steered(why_not=f"{lm.name} cannot continue a text")
    if sae.W_dec.shape[1] != lm.layout.width(site):
        return _Steered(why_not=f"the decoder does not write at {site}")
    strength = strength_for(lm, sae, site, evidence)
    if not strength:
        return _Steered(why_not=f"no strength changes the model by {DIVERGENCE} nats")
    prompts = [({"role": "user", "content": w.text},) for w in chosen]
    asked: list[list[list[int]]] = []
    for edits in ((adding(sae, site, evidence.latent, strength),), ()):
        replies = generate(lm, prompts, max_new_tokens=NEW_TOKENS, edits=edits, seeds=range(len(prompts)))
        asked.append([_tokens(lm, f"{reply.text}\n\nThis text is about:") for reply in replies])
    found = _Steered(asked[0], asked[1], [w.document for w in chosen], strength)
    return replace(found, chance=float(found.gain(lm, UNRELATED).mean()))


def adding(sae: SAE, site: Site, latent: int, strength: float) -> Edit:
    """Adds `strength` times a latent's decoder row at every token."""
    write = sae.W_dec[latent].detach().float().cpu().numpy()
    name = f"add latent {latent}"
    none = np.zeros((1, len(write)), dtype=np.float32)
    bias, threshold = np.zeros(1, dtype=np.float32), np.array([-np.inf], dtype=np.float32)
    return Edit(site, "add", strength, none, bias, threshold, write[None], "all", name=name)


def strength_for(lm: LanguageModel, sae: SAE, site: Site, evidence: Evidence) -> float:
    """How much of a latent has to be added for KL(clean‖steered) to be 0.5 nats a token on silent windows; 0
    where even a thousand times its activation is not enough."""
    texts = [window.tokens for window in evidence.negatives[:PROMPTS]]
    ids, mask = padded(texts)
    clean = _log_p(lm, ids, mask)[mask]
    largest = max((w.max for w in (*evidence.train, *evidence.positives)), default=1.0)

    def divergence(strength: float) -> float:
        with applied(lm, [adding(sae, site, evidence.latent, strength)]):
            steered = _log_p(lm, ids, mask)[mask]
        return float(torch.where(clean.isfinite(), clean.exp() * (clean - steered), 0.0).sum(dim=1).mean())

    high = largest
    while divergence(high) < DIVERGENCE:
        high *= 4
        if high > 1000 * largest:
            return 0.0
    low = 0.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if divergence(middle) < DIVERGENCE else (low, middle)
    return high


@torch.no_grad()
def mean_log_p(
    lm: LanguageModel, prefixes: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]
) -> Matrix:
    """Mean log-probability, in nats a token, of each text after its prefix (n,)."""
    found = np.zeros(len(texts))
    for start in range(0, len(texts), BATCH):
        part = range(start, min(start + BATCH, len(texts)))
        ids, mask = padded([(*prefixes[i], *texts[i]) for i in part])
        log_p = _log_p(lm, ids, mask)
        for row, i in enumerate(part):
            at = len(prefixes[i])
            targets = torch.tensor(list(texts[i]))
            chosen = log_p[row, at - 1 : at - 1 + len(targets)].gather(1, targets[:, None])
            found[i] = float(chosen.mean())
    return found


@torch.no_grad()
def _log_p(lm: LanguageModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Log-probabilities of the next token (B, T, vocabulary), on the processor."""
    inputs = lm.inputs(ids.to(lm.device), mask.long().to(lm.device))
    return lm.model(**inputs, use_cache=False).logits.float().log_softmax(dim=-1).cpu()


def _tokens(lm: LanguageModel, text: str, *, begin: bool = True) -> list[int]:
    """Tokens of a text, after a BOS token (any other where there is none) if it begins a sequence."""
    ids = list(lm.tokenizer(text, add_special_tokens=False)["input_ids"])
    first = lm.tokenizer.bos_token_id
    return [lm.pad_id if first is None else first, *ids] if begin else ids
