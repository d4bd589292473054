"""Fine-tune an autoencoder end to end: towards what the model says with the reconstruction in its place.

    loss = FVU + α · KL(clean ‖ spliced),   α = FVU / KL as a constant

FVU is the fraction of a batch's variance unexplained, KL the mean divergence of the next-token distributions
at scored tokens, with the reconstruction spliced in at the site; α makes both count alike whatever their
units (Karvonen 2025, "Revisiting end-to-end sparse autoencoder training: a short finetune is all you need",
arXiv 2503.17272). The model's weights stay as they are. What fires, and how many, is decided as before.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unbraid.activations.corpus import Batch, Positions, read_corpus
from unbraid.activations.documents import Document
from unbraid.manifest.errors import UserError
from unbraid.manifest.files import building, write_text
from unbraid.manifest.progress import Progress
from unbraid.manifest.record import write_manifest
from unbraid.model.load import LanguageModel
from unbraid.model.read import read_sites
from unbraid.model.replace import replaced
from unbraid.model.sites import Site
from unbraid.sae.base import SAE, SAEOutput
from unbraid.sae.formats.saelens import save as save_sae
from unbraid.training.adam import Adam
from unbraid.training.checkpoint import FILE, Checkpoint
from unbraid.training.run import KIND, LOG
from unbraid.training.schedule import rate

CALIBRATED = 32
"""Batches that thresholds are measured on again."""


@dataclass(frozen=True)
class FinetuneOptions:
    """How to fine-tune."""

    steps: int = 300
    """Number of batches; a text that has fewer is read again in another order."""
    batch_tokens: int = 2048
    """Tokens in a batch, padding included."""
    context: int = 256
    """Tokens the model reads at once."""
    positions: Positions = "all"
    """Which tokens are spliced: all, or those of assistant replies."""
    lr: float = 1e-4
    """Adam's learning rate at its highest."""
    warmup_share: float = 0.05
    """Share of the steps over which the learning rate rises from zero."""
    decay_share: float = 0.5
    """Share of the steps, the last ones, over which it falls to zero."""
    seed: int = 0
    """Seed of the order of the batches."""
    checkpoint_every: int = 50
    """Steps between checkpoints."""
    log_every: int = 10
    """Steps summed up in one line of log.jsonl."""

    def check(self) -> None:
        """Raise UserError, naming the option, for values that cannot be trained with."""
        for name in ("steps", "batch_tokens", "context", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; choose 1 or more")
        if not 0 < self.lr < float("inf"):
            raise UserError(f"lr is {self.lr}; choose a number above 0")
        if not 0 <= self.warmup_share <= 1 or not 0 <= self.decay_share <= 1:
            raise UserError("warmup_share and decay_share must lie between 0 and 1")


def finetune(
    sae: SAE,
    lm: LanguageModel,
    documents: Iterable[Document],
    options: FinetuneOptions,
    out: Path | str,
    *,
    parent: str,
    parent_folder: Path | None = None,
    site: Site | str | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> SAE:
    """Fine-tune `sae` (content id `parent`), spliced into `lm` at `site` (its own, if None), into the folder
    `out`. Killed and run again with the same arguments it goes on from its last checkpoint.

    Raises UserError for options that cannot be trained with, an autoencoder that reconstructs something else
    than it reads or is not of the model's size, an `out` that exists and a partial run with other settings.
    """
    options.check()
    chosen = Site.parse(site) if site is not None else sae.site
    lm.layout.require(chosen)
    if sae.config.d_out or sae.config.d_in != lm.d_in:
        raise UserError(
            f"the autoencoder reads {sae.config.d_in} dimensions and writes "
            f"{sae.config.d_out or sae.config.d_in}, but model {lm.name} has {lm.d_in} at {chosen}; name one "
            "that reconstructs what it reads there"
        )
    with building(Path(out)) as folder:
        corpus = read_corpus(
            lm, documents, tokens=options.steps * options.batch_tokens, context=options.context,
            positions=options.positions, batch_tokens=options.batch_tokens,
        )  # fmt: skip
        settings = {"options": asdict(options), "site": str(chosen), "sae": parent, "model": lm.id}
        run = _Run(sae.to(lm.device).requires_grad_(), lm, chosen, options, folder, settings)
        run.restore()
        for batch in _order(corpus.batches, options, run.step):
            run.learn(batch)
            if progress is not None:
                progress(run.step, options.steps, run.note)
        return run.finish(corpus.batches, parent, parent_folder, command, corpus.tokens)


def _order(batches: tuple[Batch, ...], options: FinetuneOptions, start: int) -> Iterable[Batch]:
    """Batches from step `start` on: all of them in a random order, then again in another one."""
    for step in range(start, options.steps):
        epoch, place = divmod(step, len(batches))
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + epoch)
        yield batches[int(torch.randperm(len(batches), generator=generator)[place])]


class _Run:
    """A fine-tuning on its way."""

    def __init__(
        self, sae: SAE, lm: LanguageModel, site: Site, options: FinetuneOptions, folder: Path,
        settings: dict[str, Any],
    ) -> None:  # fmt: skip
        self.sae, self.lm, self.site, self.options, self.folder = sae, lm, site, options, folder
        self.adam = Adam(sae)
        self.settings = settings | {"beta2": self.adam.beta2}
        self.step, self.rows, self.note = 0, list[dict[str, float]](), ""
        self.sums = torch.zeros(4, dtype=torch.float64)
        """KL, FVU, L0 and batches since the last line of the log."""

    def restore(self) -> None:
        """Go back to the folder's checkpoint, if it has one."""
        found = Checkpoint.read(self.folder)
        if found is None:
            return
        found.require(self.settings, self.folder)
        self.sae.load_state_dict({name: found.tensors[name] for name in self.sae.state_dict()})
        self.adam.restore(found.tensors)
        self.sums.copy_(found.tensors["sums"])
        self.step, self.rows = found.facts["step"], list(found.facts["rows"])

    def learn(self, batch: Batch) -> None:
        """One step on a batch of text."""
        options, targets = self.options, batch.scored.to(self.lm.device)
        clean = _log_probabilities(self.lm, batch, targets).detach()
        seen: list[tuple[Tensor, SAEOutput]] = []

        def spliced(x: Tensor) -> Tensor:
            seen.append((x.float(), self.sae(x.float())))
            return seen[-1][1].x_hat

        with replaced(self.lm, self.site, spliced, batch.chosen, gradient=True):
            new = _log_probabilities(self.lm, batch, targets)
        ((x, output),) = seen
        fvu = (x - output.x_hat).square().sum() / (x - x.mean(dim=0)).square().sum().clamp(min=1e-12)
        divergence = (clean.exp() * (clean - new)).sum(dim=1).mean()
        self.adam.zero_grad()
        alpha = (fvu / divergence.clamp(min=1e-12)).detach()
        torch.autograd.backward(fvu + alpha * divergence)
        self.sae.constrain_gradient()
        lr = options.lr * rate(self.step, options.steps, options.warmup_share, options.decay_share)
        self.adam.step(self.step + 1, lr)
        self.sae.constrain()
        self.step += 1
        l0 = output.codes.l0().double().mean()
        self.sums += torch.stack([v.detach().double().cpu() for v in (divergence, fvu, l0, torch.ones(()))])
        if self.step % options.log_every == 0 or self.step == options.steps:
            self._log()
        if self.step % options.checkpoint_every == 0 and self.step < options.steps:
            self._checkpoint()

    def _log(self) -> None:
        if not self.sums.isfinite().all():
            raise UserError(f"by step {self.step} the loss was no number any more; choose a smaller --lr")
        kl, fvu, l0, _ = (self.sums / self.sums[3]).tolist()
        self.sums.zero_()
        self.rows.append({"step": self.step, "kl": kl, "fvu": fvu, "l0": l0})
        self.note = f"kl {kl:.4f}  fvu {fvu:.4f}  l0 {l0:.1f}"

    def _checkpoint(self) -> None:
        tensors = self.sae.state_dict() | self.adam.tensors() | {"sums": self.sums}
        facts = {"step": self.step, "rows": self.rows, "settings": self.settings}
        Checkpoint(tensors, facts).write(self.folder)

    def finish(
        self, batches: tuple[Batch, ...], parent: str, parent_folder: Path | None, command: str, tokens: int
    ) -> SAE:
        """Measure thresholds again where the architecture has measured ones, and write the artifact."""
        lm, site = self.lm, self.site
        rows: list[Tensor] = []
        for batch in batches[:CALIBRATED]:
            x = read_sites(lm, batch.input_ids, batch.attention_mask, [site])[site]
            rows.append(x[batch.chosen.to(x.device)].float())
        with torch.no_grad():
            sae = self.sae.calibrated(rows).requires_grad_(False).cpu()
        save_sae(sae, self.folder)
        write_text(self.folder / LOG, "".join(json.dumps(row) + "\n" for row in self.rows))
        write_manifest(
            self.folder,
            kind=KIND,
            command=command,
            seed=self.options.seed,
            inputs={"sae": parent, "model": lm.id},
            facts={
                "architecture": sae.config.architecture,
                "site": str(site),
                "model": lm.name,
                "model_id": lm.id,
                "finetune": asdict(self.options),
                "text_tokens": tokens,
                "kl_first": self.rows[0]["kl"],
                "kl_last": self.rows[-1]["kl"],
                "fvu_last": self.rows[-1]["fvu"],
                "l0": self.rows[-1]["l0"],
            },
            paths={"sae": parent_folder} if parent_folder is not None else {},
            without=FILE,
        )
        (self.folder / FILE).unlink(missing_ok=True)  # not before: a kill would have lost the whole run
        return sae


def _log_probabilities(lm: LanguageModel, batch: Batch, scored: Tensor) -> Tensor:
    """Log-probabilities of the next token at the scored tokens, (n, vocabulary), with whatever is spliced."""
    logits = lm.model(**lm.inputs(batch.input_ids, batch.attention_mask), use_cache=False).logits
    return logits[:, :-1][scored].float().log_softmax(dim=-1)
