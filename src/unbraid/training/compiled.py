"""A whole training step on the processor, in compiled loops that touch only entries that are not 0.

Per batch of n activations x (n, d_in), with F = d_sae latents:

1. *Screen.* x and W_enc as int8, their product in chunks of rows, so that (n, F) never exists. The latents
   that may fire are candidates; their pre-activations are computed exactly, and decide which do. For TopK,
   here, those whose rough product is near a row's k best are candidates, and `recall` says how many of the
   true top k were among them; `compiled_threshold` has the architectures that compare with a threshold.
2. *Decode.* Reconstruction, error and the gradient of every entry's value, row by row.
3. *Update.* Entries grouped by latent; then for each latent, in one pass over its rows of every matrix: both
   gradients, decoder-norm projection, Adam, normalisation, int8 copy for the next screen.

It does what `SAE.backward`, `constrain_gradient`, `Adam.step` and `constrain` do one after the other, which
is the form to read. The loops are `sae.kernels.loops`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unbraid.sae.base import SAE
from unbraid.sae.codes import SparseCodes, decode, top_k
from unbraid.sae.kernels import cpu, loops
from unbraid.sae.kernels.cpu import CHUNK_ROWS, F32, I32, I64, PARTS, Lists, Precision, Screen
from unbraid.sae.objective import StepContext, StepReport
from unbraid.training.adam import BETA1, EPSILON, Adam

CHECKED, CHECKED_EVERY = 16, 32
"""Rows on which the screen is compared with the whole product, and after how many steps again."""


@dataclass(frozen=True, eq=False)
class Fired:
    """The entries that take part in a step, row after row; an entry of value 0 does not fire."""

    starts: I64
    """Row i's are starts[i]:starts[i + 1], (n + 1,)."""
    latents: I32
    """Whose they are."""
    values: F32
    """Their codes."""


@dataclass(frozen=True, eq=False)
class Extra:
    """Gradients that reach m latents without an entry, from the auxiliary losses of dead ones."""

    latents: Tensor
    """Which, (m,) int64."""
    rows: I32
    """Row of `enc` and `dec` for every latent, or −1, (F,)."""
    enc: F32
    """Of W_enc, (m, d)."""
    dec: F32
    """Of W_dec, (m, d)."""
    b_enc: Tensor
    """Of b_enc, (m,)."""
    b_dec: Tensor
    """Of b_dec, (d,)."""

    @classmethod
    def of(
        cls,
        latents: Tensor,
        F: int,
        enc: Tensor | None,
        dec: Tensor | None,
        b_enc: Tensor | None,
        b_dec: Tensor,
    ) -> Extra:
        """Of gradients that may be missing: None counts as 0."""
        rows, d = np.full(F, -1, np.int32), len(b_dec)
        rows[latents.numpy()] = np.arange(len(latents), dtype=np.int32)
        empty = torch.zeros(len(latents), d)
        return cls(
            latents, rows, (empty if enc is None else enc).numpy(), (empty if dec is None else dec).numpy(),
            torch.zeros(len(latents)) if b_enc is None else b_enc, b_dec,
        )  # fmt: skip


class CompiledStep(ABC):
    """Steps of one autoencoder; weights and moments are those of the SAE and of Adam, changed in place.

    It runs on as many threads as torch has when it is made. A subclass says which entries fire.
    """

    own_threads = True

    def __init__(self, sae: SAE, optimizer: Adam, *, precision: Precision | None = None) -> None:
        self.sae, self.optimizer, self.threads = sae, optimizer, torch.get_num_threads()
        self.W_enc, self.W_dec = _rows(sae.W_enc.detach().T), _rows(sae.W_dec.detach())  # (F, d)
        mean, square = optimizer.mean, optimizer.square
        self.moments = (
            *(_rows(mean["W_enc"].T), _rows(square["W_enc"].T)),
            *(_rows(mean["W_dec"]), _rows(square["W_dec"])),
        )
        self.screen = Screen(self.W_enc, sae.b_enc.detach().numpy(), precision)
        self.edges = np.array([0, sae.config.d_sae])
        self.small = ("b_enc", "b_dec")
        # Kept between steps: fresh memory costs more than its use.
        self.error, self.squared, self.centred = np.empty((1, 0, 0), np.float32), np.empty(0), torch.empty(0)

    @property
    def name(self) -> str:
        """What it computes with, in a few words."""
        return f"compiled loops after {self.screen.kind} screening, {self.threads} threads"

    def refresh(self) -> None:
        """Take notice of weights that were changed from outside."""
        self.screen = Screen(self.W_enc, self.screen.b_enc, self.screen.kind)

    def step(self, x: Tensor, target: Tensor, context: StepContext, number: int, lr: float) -> StepReport:
        """One optimiser step on activations x and targets, both (n, d_in); `number` counts from 1."""
        sae, scale = self.sae, 2 / target.numel()
        n, d, F = len(x), sae.config.d_in, sae.config.d_sae
        nested = len(self.edges) - 1
        if self.error.shape[:2] != (nested, n):
            self.error, self.squared = np.empty((nested, n, d), np.float32), np.empty(n)
            self.centred = torch.empty(n, d)
        fired, wanted, centred = self.select(x, number), cpu.array(target), self.centred
        error, gradient = self.error, np.empty(len(fired.values), np.float32)

        def forward(begin: int) -> F32:
            rows = slice(begin, min(begin + CHUNK_ROWS, n))
            loops.decode_and_compare(
                fired.starts, fired.latents, fired.values, self.W_dec, sae.b_dec.detach().numpy(), self.edges,
                wanted[rows], begin, scale, error[:, rows], gradient, self.squared[rows],
            )  # fmt: skip
            return error[0, rows].sum(axis=0)

        # Lists are made in one piece: first, so that the other threads need not wait for them.
        jobs: list[Callable[[], Any]] = [partial(Lists.of, fired.starts, fired.latents, fired.values, F)]
        jobs += [partial(forward, begin) for begin in range(0, n, CHUNK_ROWS)]
        lists, *sums = cpu.side_by_side(lambda job: job(), jobs, self.threads)
        d_b_dec = scale * sum(sums, np.zeros(d))
        self.finish_gradient(fired, gradient, context, target.numel())
        extra = self.auxiliary(centred, torch.from_numpy(error[-1]), context)
        cuts = lists.cuts()
        d_b_enc, back = np.empty(F, np.float32), np.zeros((PARTS, d), np.float32)
        beta2 = self.optimizer.beta2
        unbias_mean, unbias_square = 1 - BETA1**number, 1 - beta2**number

        def backward(part: int) -> None:
            loops.update(
                cuts[part], cuts[part + 1], lists.first, lists.rows, lists.entries, fired.values, gradient,
                centred.numpy(), error, self.edges, scale, extra.rows, extra.enc, extra.dec,
                self.W_enc, self.W_dec, *self.moments, d_b_enc, back[part],
                self.screen.shadow, self.screen.shift, self.screen.unit, self.screen.length,
                lr / unbias_mean, 1 / unbias_square, BETA1, beta2, EPSILON,
                sae.unit_rows,
            )  # fmt: skip

        cpu.side_by_side(backward, range(PARTS), self.threads)
        if sae.config.apply_b_dec_to_input:
            d_b_dec = d_b_dec - back.sum(axis=0, dtype=np.float64)
        sae.b_enc.grad = torch.from_numpy(d_b_enc).index_add(0, extra.latents, extra.b_enc)
        sae.b_dec.grad = torch.from_numpy(d_b_dec).float() + extra.b_dec
        self.optimizer.step(number, lr, only=self.small)
        return StepReport(
            squared_error=torch.tensor(self.squared.sum()),
            fired=torch.from_numpy(np.diff(lists.first) > 0),
            active=torch.tensor(int(lists.first[-1])),
        )

    @abstractmethod
    def select(self, x: Tensor, number: int) -> Fired:
        """The entries of a batch, x (n, d_in); fills `centred` by calling `centre` for all of it."""

    def centre(self, x: Tensor, begin: int) -> Tensor:
        """What W_enc multiplies of the chunk of rows that begins there, kept in `centred`."""
        rows = slice(begin, begin + CHUNK_ROWS)
        shift = self.sae.b_dec.detach() if self.sae.config.apply_b_dec_to_input else torch.zeros(())
        return torch.sub(x[rows], shift, out=self.centred[rows])  # as `SAE.centred`, into memory that is kept

    def finish_gradient(self, fired: Fired, gradient: F32, context: StepContext, numel: int) -> None:
        """Add to the gradient of each entry's value what is not reconstruction: here nothing."""
        return

    def auxiliary(self, x: Tensor, error: Tensor, context: StepContext) -> Extra:
        """Gradients of AuxK (`objective.auxk`), formed for the dead latents' rows alone.

        error: (n, d), that of the whole width, over the number of nested widths.
        """
        d, F = self.sae.config.d_in, self.sae.config.d_sae
        latents = context.dead.nonzero().squeeze(1)
        if not context.auxk_alpha or not len(latents):
            return Extra.of(latents[:0], F, None, None, None, torch.zeros(d))
        enc, dec, bias, shift = self.leaves(latents)
        auxk_gradients(x - shift, error * (len(self.edges) - 1), enc, dec, bias, context.auxk_alpha)
        return Extra.of(latents, F, enc.grad, dec.grad, bias.grad, self.at_input(shift))

    def leaves(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows of W_enc and W_dec (m, d), b_enc (m,), and a shift (d,) that stands for a change of b_dec in
        the input, all to be differentiated in.
        """
        weights = (self.W_enc, self.W_dec, self.screen.b_enc)
        enc, dec, bias = (torch.from_numpy(w[latents.numpy()]).requires_grad_() for w in weights)
        return enc, dec, bias, torch.zeros(self.sae.config.d_in, requires_grad=True)

    def at_input(self, shift: Tensor) -> Tensor:
        """What the shift's gradient adds to that of b_dec, (d,)."""
        used = self.sae.config.apply_b_dec_to_input and shift.grad is not None
        return shift.grad if used and shift.grad is not None else torch.zeros(len(shift))


class TopKStep(CompiledStep):
    """TopK: every row has k entries."""

    def __init__(self, sae: SAE, optimizer: Adam, *, precision: Precision | None = None) -> None:
        super().__init__(sae, optimizer, precision=precision)
        self.hits = self.wanted = 0
        self.latents, self.values = np.empty((0, 0), np.int32), np.empty((0, 0), np.float32)

    def select(self, x: Tensor, number: int) -> Fired:
        """The k largest of each row; those below 0 have the value 0."""
        n, k = len(x), self.sae.config.k
        if len(self.latents) != n:
            self.latents, self.values = np.empty((n, k), np.int32), np.empty((n, k), np.float32)

        def some(begin: int) -> None:
            rows = slice(begin, begin + CHUNK_ROWS)
            self.screen.top_k(self.centre(x, begin), self.latents[rows], self.values[rows])

        cpu.side_by_side(some, range(0, n, CHUNK_ROWS), self.threads)
        if number % CHECKED_EVERY == 1:
            self._check_recall(self.centred)
        np.maximum(self.values, 0, out=self.values)
        return Fired(np.arange(n + 1) * k, self.latents.reshape(-1), self.values.reshape(-1))

    @property
    def recall(self) -> float:
        """Share of the true top k that the screen found, on the rows checked so far."""
        return self.hits / self.wanted if self.wanted else 1.0

    def _check_recall(self, x: Tensor) -> None:
        """Count on a few rows what the screen found of the true top k."""
        rows = np.linspace(0, len(x) - 1, CHECKED).astype(np.int64)
        exact = (x[rows] @ torch.from_numpy(self.W_enc).T).numpy() + self.screen.b_enc
        k = self.latents.shape[1]
        bar = np.partition(exact, -k, axis=1)[:, -k]
        found = np.take_along_axis(exact, self.latents[rows].astype(np.int64), axis=1)
        # An entry just at the bar may come out on either side of it by rounding.
        self.hits += int((found >= bar[:, None] - 1e-5 * np.abs(bar[:, None])).sum())
        self.wanted += found.size


def auxk_gradients(x: Tensor, error: Tensor, enc: Tensor, dec: Tensor, bias: Tensor, alpha: float) -> None:
    """Add to the leaves enc, dec (m, d) and bias (m,), the rows of dead latents, AuxK's gradients.

    x: (n, d), what W_enc multiplies; error: (n, d), the reconstruction less the target.
    """
    k = max(1, error.shape[1] // 2)
    total = error.new_zeros(())
    for part, left in zip(x.split(CHUNK_ROWS), error.split(CHUNK_ROWS), strict=True):
        values, indices = top_k(part @ enc.T + bias, min(k, len(bias)))
        total = total + (left + decode(SparseCodes(indices, values.relu()), dec)).square().sum()
    weight = alpha * min(1.0, len(bias) / k) / error.square().sum().clamp(min=1e-12)
    (weight * total).backward()


def _rows(matrix: Tensor) -> F32:
    """The memory of a matrix that has one latent a row."""
    assert matrix.is_contiguous()
    return matrix.numpy()
