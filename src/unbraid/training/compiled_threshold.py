"""Compiled steps of the architectures whose latents fire above a threshold: that of BatchTopK is the batch's,
shared by all latents; that of ReLU is 0; those of JumpReLU are its own.

`compiled` has the step; what is here says which entries take part, and what their gradients are besides
reconstruction. Objectives: `sae.batchtopk`, `sae.matryoshka`, `sae.relu`, `sae.jumprelu`,
`sae.matryoshka_jumprelu`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from unbraid.sae.batchtopk import BatchTopKSAE
from unbraid.sae.elementwise import DENSE_SHARE
from unbraid.sae.jumprelu import JumpReLUSAE
from unbraid.sae.kernels import cpu
from unbraid.sae.kernels.cpu import CHUNK_ROWS, F32, I32, I64, Precision
from unbraid.sae.matryoshka import MatryoshkaSAE
from unbraid.sae.matryoshka_jumprelu import MatryoshkaJumpReLUSAE
from unbraid.sae.objective import StepContext, StepReport
from unbraid.sae.relu import ReLUSAE
from unbraid.training.adam import Adam
from unbraid.training.compiled import CompiledStep, Extra, Fired
from unbraid.training.step import PlainStep

SAMPLE = 64
"""Rows by which a threshold, or a share of entries, is judged beforehand."""
SPARE = 1.5
"""How many more entries than wanted BatchTopK looks at."""


class ThresholdStep(CompiledStep):
    """What the architectures of this file share: collecting entries above an edge."""

    def entries_above(self, x: Tensor, edge: F32) -> Fired:
        """Entries of x (n, d) whose pre-activation exceeds edge (F,), values being pre-activations."""

        def some(begin: int) -> tuple[I64, I32, F32]:
            return self.screen.above(self.centre(x, begin), edge)

        parts = cpu.side_by_side(some, range(0, len(x), CHUNK_ROWS), self.threads)
        counts, latents, values = zip(*((np.diff(starts), *rest) for starts, *rest in parts), strict=True)
        starts = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
        return Fired(starts, np.concatenate(latents), np.concatenate(values))

    def sample(self, x: Tensor) -> Tensor:
        """Some rows of x, spread evenly."""
        return x[torch.linspace(0, len(x) - 1, min(SAMPLE, len(x))).long()]


class BatchTopKStep(ThresholdStep):
    """BatchTopK, and Matryoshka on top of it."""

    def __init__(self, sae: BatchTopKSAE, optimizer: Adam, *, precision: Precision | None = None) -> None:
        super().__init__(sae, optimizer, precision=precision)
        if isinstance(sae, MatryoshkaSAE):
            self.edges = np.array([0, *sae.widths])

    def select(self, x: Tensor, number: int) -> Fired:
        """The n·k largest entries of the batch, as far as they are positive."""
        wanted = len(x) * self.sae.config.k
        sample = self.sae.centred(self.sample(x)).detach()
        offer = min(4 * self.sae.config.k, self.sae.config.d_sae)
        latents, values = np.empty((len(sample), offer), np.int32), np.empty((len(sample), offer), np.float32)
        self.screen.top_k(sample, latents, values)
        typical, share = np.sort(values, axis=None)[::-1], SPARE
        while True:
            place = int(share * self.sae.config.k * len(sample))
            edge = max(float(typical[place]), 0.0) if place < len(typical) else 0.0
            found = self.entries_above(x, np.full(self.sae.config.d_sae, edge, np.float32))
            if len(found.values) > wanted or edge == 0:
                break
            share *= 2
        place = len(found.values) - wanted - 1
        cut = np.partition(found.values, place)[place] if place >= 0 else 0.0
        kept = found.values > cut
        ends = np.concatenate([[0], np.cumsum(kept)])
        return Fired(ends[found.starts], found.latents[kept], found.values[kept])


class OwnThresholdStep(ThresholdStep):
    """ReLU and JumpReLU. While many latents fire, as in the beginning, whole matrices are faster."""

    def __init__(
        self, sae: ReLUSAE | JumpReLUSAE, optimizer: Adam, *, precision: Precision | None = None
    ) -> None:
        super().__init__(sae, optimizer, precision=precision)
        self.own, self.plain, self.stale = sae, PlainStep(sae, optimizer), False

    def step(self, x: Tensor, target: Tensor, context: StepContext, number: int, lr: float) -> StepReport:
        """One optimiser step, by whichever way is the faster."""
        if self.stale:
            self.refresh()
            self.stale = False
        sample = self.own.centred(self.sample(x)).detach()
        starts, *_ = self.screen.above(sample, self.edge())
        if starts[-1] >= DENSE_SHARE * len(sample) * self.sae.config.d_sae:
            before = torch.get_num_threads()
            torch.set_num_threads(self.threads)
            try:
                report = self.plain.step(x, target, context, number, lr)
            finally:
                torch.set_num_threads(before)
            self.stale = True
            return report
        return super().step(x, target, context, number, lr)

    def select(self, x: Tensor, number: int) -> Fired:
        """All entries above the edge."""
        return self.entries_above(x, self.edge())

    def edge(self) -> F32:
        """Every latent's, (F,)."""
        return self.own.edge().expand(self.sae.config.d_sae).contiguous().numpy()


class ReLUStep(OwnThresholdStep):
    """ReLU with its L1 penalty."""

    own: ReLUSAE

    def finish_gradient(self, fired: Fired, gradient: F32, context: StepContext, numel: int) -> None:
        """The penalty's gradient is the same for every entry, as decoder rows have unit length."""
        gradient += context.ramp * self.own.options.l1 / numel

    def auxiliary(self, x: Tensor, error: Tensor, context: StepContext) -> Extra:
        """None."""
        return super().auxiliary(x, error, StepContext(context.dead))


class JumpReLUStep(OwnThresholdStep):
    """JumpReLU, nested or not, with either sparsity term, and the term that pulls dead latents."""

    own: JumpReLUSAE

    def __init__(self, sae: JumpReLUSAE, optimizer: Adam, *, precision: Precision | None = None) -> None:
        super().__init__(sae, optimizer, precision=precision)
        self.small = ("b_enc", "b_dec", "threshold")
        if isinstance(sae, MatryoshkaJumpReLUSAE):
            self.edges = np.array([0, *sae.widths])

    def step(self, x: Tensor, target: Tensor, context: StepContext, number: int, lr: float) -> StepReport:
        """One optimiser step; thresholds stay 0 or more."""
        report = super().step(x, target, context, number, lr)
        with torch.no_grad():
            self.own.threshold.clamp_(min=0)
        return report

    def select(self, x: Tensor, number: int) -> Fired:
        """Those above the threshold fire; those less than half a window below it move it."""
        near = super().select(x, number)
        self.pre, self.theta = near.values, self.own.threshold.detach().numpy()[near.latents]
        return Fired(near.starts, near.latents, self.pre * (self.pre > self.theta))

    def finish_gradient(self, fired: Fired, gradient: F32, context: StepContext, numel: int) -> None:
        """See `sae.jumprelu`: the window gives θ its gradient, only latents that fire pass one on."""
        options, price = self.own.options, context.ramp * self.own.options.l0 / numel
        if options.penalty == "tanh":
            gradient += price * options.tanh_scale * (1 - np.tanh(options.tanh_scale * fired.values) ** 2)
        moved = self.theta * gradient + (price if options.penalty == "step" else 0.0)
        moved *= np.abs(self.pre - self.theta) < options.bandwidth / 2
        at_theta = np.bincount(fired.latents, -moved / options.bandwidth, self.sae.config.d_sae)
        self.own.threshold.grad = torch.from_numpy(at_theta).float()
        gradient *= self.pre > self.theta

    def auxiliary(self, x: Tensor, error: Tensor, context: StepContext) -> Extra:
        """Gradients of μ Σ ReLU(θ − p) of the dead latents."""
        latents, F = context.dead.nonzero().squeeze(1), self.sae.config.d_sae
        if not self.own.options.pre_act or not len(latents):
            return super().auxiliary(x, error, StepContext(context.dead))
        enc, dec, bias, shift = self.leaves(latents)
        theta = self.own.threshold.detach()[latents].requires_grad_()
        factor = context.ramp * self.own.options.pre_act / x.numel()
        for rows in x.split(CHUNK_ROWS):
            short = (theta - ((rows - shift) @ enc.T + bias)).relu()
            (factor * (short * dec.norm(dim=1)).sum()).backward()
        assert self.own.threshold.grad is not None and theta.grad is not None
        self.own.threshold.grad.index_add_(0, latents, theta.grad)
        return Extra.of(latents, F, enc.grad, dec.grad, bias.grad, self.at_input(shift))
