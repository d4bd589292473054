"""Architectures whose latents each decide for themselves: a code is a function of its own pre-activation.

    f_j = a_j(p_j),   loss = ‖x − x̂‖² + Σ_j c_j(p_j),   p: (n, d_sae)

Below a latent's `edge` both a_j and c_j are flat, so neither codes nor gradients know of it. What an
architecture says is elementwise on the entries above the edge; the large products around it (encode,
decode, and their gradients) are done here. While few latents are above, these entries are collected and
all products are sparse; while many are, as at the start of training, products of whole matrices cost less.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from unbraid.sae.base import SAE
from unbraid.sae.codes import CHUNK_ROWS, SparseCodes, decode, selected
from unbraid.sae.objective import StepContext, StepReport

DENSE_SHARE = 1 / 32
"""Share of entries above the edge from which on products of whole matrices are the cheaper ones."""


@dataclass(frozen=True, eq=False)
class Entries:
    """Pre-activations of some activations: all of them, or those above the edge."""

    pre: Tensor
    """(n, d_sae), or (n, m) where `latents` says whose they are."""
    latents: Tensor | None = None
    """Which latents, (n, m) int64; None for all of them in order."""
    real: Tensor | None = None
    """False where an entry only fills up its row, (n, m) booleans; None for none such."""

    def of(self, parameter: Tensor) -> Tensor:
        """A latent's parameter (d_sae,) for each entry, in the shape of `pre`."""
        return parameter.expand_as(self.pre) if self.latents is None else parameter[self.latents]

    def only_real(self, values: Tensor) -> Tensor:
        """The values with 0 at entries that only fill up a row."""
        return values if self.real is None else values * self.real

    def decode(self, values: Tensor, W_dec: Tensor) -> Tensor:
        """Σ_j value_j · W_dec[j]: (n, d_out)."""
        return values @ W_dec if self.latents is None else decode(SparseCodes(self.latents, values), W_dec)


class ElementwiseSAE(SAE):
    """Encoding and the training step of the architectures that decide latent by latent."""

    @abstractmethod
    def activate(self, entries: Entries) -> Tensor:
        """The codes of entries, in the shape of `entries.pre`, with the gradients used in training."""

    def loss(self, entries: Entries, codes: Tensor, target: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """What is added to the squared error, summed over entries: (cost of firing, other terms).

        The first is multiplied by the warm-up's factor. codes: `activate` of the entries, target (n, d_out).
        """
        return 0.0, 0.0

    def firing_threshold(self) -> Tensor:
        """The pre-activation that a latent has to exceed to fire, (d_sae,) or a scalar."""
        return self.b_enc.new_zeros(())

    def edge(self) -> Tensor:
        """The pre-activation from which on a latent has a gradient, (d_sae,) or a scalar."""
        return self.firing_threshold()

    def decode_entries(self, entries: Entries, codes: Tensor) -> Tensor:
        """Reconstructions (n, d_out) from the entries' codes, in the shape of `entries.pre`."""
        return entries.decode(codes, self.W_dec) + self.b_dec

    def squared_error(
        self, entries: Entries, codes: Tensor, x: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What of the loss is reconstruction, a sum over x (n, d_in), and the error (n, d_out)."""
        error = target - (self.decode_entries(entries, codes) + self.bypass(x))
        return error.square().sum(), error

    def encode(self, x: Tensor) -> SparseCodes:
        """Codes of activations x, shape (n, d_in); k is the most latents that fire at one of them."""
        entries = self._above(x, self.firing_threshold())
        assert entries.latents is not None
        return SparseCodes(entries.latents, entries.only_real(self.activate(entries)))

    def pre_activations_at(self, x: Tensor, latents: Tensor, values: Tensor) -> Tensor:
        """`values` (n, m), known to be the pre-activations of `latents` (n, m), with their gradients."""
        return selected(self.centred(x), self.W_enc, self.b_enc, latents, values)

    def backward(self, x: Tensor, target: Tensor, context: StepContext) -> StepReport:
        """Add the gradients of squared error and own terms on a batch, x (n, d_in) and target (n, d_out)."""
        with torch.no_grad():
            first = self.pre_activations(x[:CHUNK_ROWS]) > self.edge()
        if float(first.float().mean()) < DENSE_SHARE:
            return self._backward(self._above(x, self.edge()), x, target, context, target.numel())
        reports = [
            self._backward(Entries(self.pre_activations(rows)), rows, goal, context, target.numel())
            for rows, goal in zip(x.split(CHUNK_ROWS), target.split(CHUNK_ROWS), strict=True)
        ]
        return StepReport(
            torch.stack([report.squared_error for report in reports]).sum(),
            torch.stack([report.fired for report in reports]).any(dim=0),
            torch.stack([report.active for report in reports]).sum(),
        )

    def _backward(
        self, entries: Entries, x: Tensor, target: Tensor, context: StepContext, numel: int
    ) -> StepReport:
        codes = entries.only_real(self.activate(entries))
        loss, error = self.squared_error(entries, codes, x, target)
        cost, other = self.loss(entries, codes, target)
        ((loss + context.ramp * cost + other) / numel).backward()
        on = codes.detach() > 0
        if entries.latents is None:
            fired = on.any(dim=0)
        else:
            fired = torch.zeros(self.config.d_sae, dtype=torch.bool, device=on.device)
            fired[entries.latents[on]] = True
        return StepReport(error.detach().square().sum(), fired, on.sum())

    def _above(self, x: Tensor, edge: Tensor) -> Entries:
        """The entries whose pre-activation exceeds `edge`, each row filled up to the longest."""
        with torch.no_grad():
            latents, values, real = above((self.pre_activations(rows) for rows in x.split(CHUNK_ROWS)), edge)
        return Entries(self.pre_activations_at(x, latents, values), latents, real)


def above(chunks: Iterable[Tensor], edge: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where pre-activations, chunks of shape (rows, d_sae), exceed `edge`, (d_sae,) or a scalar.

    Returns latents, values and whether an entry is one or only fills up its row, all (n, m), largest first.
    """
    found: list[SparseCodes] = []
    counts: list[Tensor] = []
    for pre in chunks:
        over = pre > edge
        counts.append(over.sum(dim=1))
        values, latents = pre.masked_fill_(~over, -torch.inf).topk(max(1, int(counts[-1].max())), dim=1)
        found.append(SparseCodes(latents, values))
    merged, count = SparseCodes.concatenate(found), torch.cat(counts)
    real = torch.arange(merged.values.shape[1], device=count.device) < count[:, None]
    return merged.indices * real, merged.values.masked_fill(~real, 0.0), real
