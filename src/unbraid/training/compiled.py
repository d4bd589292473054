"""A whole training step of TopK on the processor, in compiled loops that touch only entries that are not 0.

Per batch of n activations x (n, d_in), with F = d_sae latents of which k fire:

1. *Screen.* x and W_enc as int8, their product in chunks of rows, so that (n, F) never exists. The best
   1¼ k + 8 latents of each row are candidates; their pre-activations are computed exactly, and the k
   largest are the codes. `CompiledStep.recall` says how many of the true top k were among the candidates.
2. *Decode.* Reconstruction, error and the gradient of every entry's value, row by row.
3. *Update.* Entries grouped by latent; then for each latent, in one pass over its rows of every matrix: both
   gradients, decoder-norm projection, Adam, normalisation, int8 copy for the next screen.

It does what `SAE.backward`, `constrain_gradient`, `Adam.step` and `constrain` do one after the other, which
is the form to read. The loops are `sae.kernels.loops`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unbraid.sae.base import SAE
from unbraid.sae.codes import SparseCodes, decode, top_k
from unbraid.sae.kernels import cpu, loops
from unbraid.sae.kernels.cpu import CHUNK_ROWS, F32, PARTS, Lists, Precision, Screen
from unbraid.sae.objective import StepContext, StepReport
from unbraid.sae.topk import TopKSAE
from unbraid.training.adam import BETA_MEAN, BETA_SQUARE, EPSILON, Adam

CHECKED, CHECKED_EVERY = 16, 32
"""Rows on which the screen is compared with the whole product, and after how many steps again."""


@dataclass(frozen=True, eq=False)
class Extra:
    """Gradients from the auxiliary loss, of m dead latents."""

    latents: Tensor
    """Which, (m,) int64."""
    rows: NDArray[np.int32]
    """Row of `enc` and `dec` for every latent, or −1, (F,)."""
    enc: F32
    """Of W_enc, (m, d)."""
    dec: F32
    """Of W_dec, (m, d)."""
    b_enc: Tensor
    """Of b_enc, (m,)."""
    b_dec: Tensor
    """Of b_dec, (d,)."""


class Room:
    """What a step writes before it changes a weight. Kept between steps: fresh memory costs more than its use."""

    def __init__(self, n: int, d: int, k: int) -> None:
        self.starts = np.arange(n + 1) * k
        self.latents, self.values = np.empty((n, k), np.int32), np.empty((n, k), np.float32)
        self.gradient = np.zeros(n * k, np.float32)
        self.error, self.squared = np.empty((n, d), np.float32), np.empty(n, np.float64)


class CompiledStep:
    """Steps of a TopK autoencoder; weights and moments are those of the SAE and of Adam, changed in place.

    It runs on as many threads as torch has when it is made.
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
        self.hits = self.wanted = 0
        self.room = Room(0, sae.config.d_in, sae.config.k)

    @staticmethod
    def serves(sae: SAE) -> bool:
        """Whether this is an autoencoder that it steps: TopK in float32, on the processor."""
        return type(sae) is TopKSAE and cpu.fits(sae.W_enc, sae.W_dec)

    def refresh(self) -> None:
        """Take notice of weights that were changed from outside."""
        self.screen = Screen(self.W_enc, self.screen.b_enc, self.screen.kind)

    @property
    def recall(self) -> float:
        """Share of the true top k that the screen found, on the rows checked so far."""
        return self.hits / self.wanted if self.wanted else 1.0

    def step(self, x: Tensor, target: Tensor, context: StepContext, number: int, lr: float) -> StepReport:
        """One optimiser step on activations x and targets, both (n, d_in); `number` counts from 1."""
        sae, scale = self.sae, 2 / target.numel()
        n, d, F, k = len(x), sae.config.d_in, sae.config.d_sae, sae.config.k
        centred, wanted = sae.centred(x).detach().contiguous(), cpu.array(target)
        if len(self.room.error) != n:
            self.room = Room(n, d, k)
        starts, latents, values = self.room.starts, self.room.latents, self.room.values
        gradient, error, squared = self.room.gradient, self.room.error, self.room.squared
        entries, b_dec = (latents.reshape(-1), values.reshape(-1)), sae.b_dec.detach().numpy()

        def forward(begin: int) -> NDArray[np.float64]:
            rows = slice(begin, min(begin + CHUNK_ROWS, n))
            self.screen.top_k(centred[rows], latents[rows], values[rows])
            np.maximum(values[rows], 0, out=values[rows])
            loops.decode_and_compare(
                starts, *entries, self.W_dec, b_dec, wanted[rows], begin, scale, error[rows], gradient,
                squared[rows],
            )  # fmt: skip
            return error[rows].sum(axis=0, dtype=np.float64)

        d_b_dec = scale * sum(cpu.side_by_side(forward, range(0, n, CHUNK_ROWS), self.threads), np.zeros(d))
        if number % CHECKED_EVERY == 1:
            self._check_recall(centred, latents)
        extra = self._auxiliary(centred, torch.from_numpy(error), context)

        lists = Lists.of(starts, *entries, F)
        cuts = lists.cuts()
        d_b_enc, back = np.empty(F, np.float32), np.zeros((PARTS, d), np.float32)
        unbias_mean, unbias_square = 1 - BETA_MEAN**number, 1 - BETA_SQUARE**number

        def backward(part: int) -> None:
            loops.update(
                cuts[part], cuts[part + 1], lists.first, lists.rows, lists.entries, entries[1], gradient,
                centred.numpy(), error, scale, extra.rows, extra.enc, extra.dec, self.W_enc, self.W_dec,
                *self.moments, d_b_enc, back[part], self.screen.shadow.numpy(), self.screen.unit,
                lr / unbias_mean, 1 / unbias_square, BETA_MEAN, BETA_SQUARE, EPSILON,
            )  # fmt: skip

        cpu.side_by_side(backward, range(PARTS), self.threads)
        if sae.config.apply_b_dec_to_input:
            d_b_dec = d_b_dec - back.sum(axis=0, dtype=np.float64)
        sae.b_enc.grad = torch.from_numpy(d_b_enc).index_add(0, extra.latents, extra.b_enc)
        sae.b_dec.grad = torch.from_numpy(d_b_dec).float() + extra.b_dec
        self.optimizer.step(number, lr, only=("b_enc", "b_dec"))
        return StepReport(
            squared_error=torch.tensor(squared.sum()),
            fired=torch.from_numpy(np.diff(lists.first) > 0),
            active=torch.tensor(int(lists.first[-1])),
        )

    def _check_recall(self, x: Tensor, latents: NDArray[np.int32]) -> None:
        """Count on a few rows what the screen found of the true top k."""
        rows = np.linspace(0, len(x) - 1, CHECKED).astype(np.int64)
        exact = (x[rows] @ torch.from_numpy(self.W_enc).T).numpy() + self.screen.b_enc
        k = latents.shape[1]
        bar = np.partition(exact, -k, axis=1)[:, -k]
        found = np.take_along_axis(exact, latents[rows].astype(np.int64), axis=1)
        # An entry just at the bar may come out on either side of it by rounding.
        self.hits += int((found >= bar[:, None] - 1e-5 * np.abs(bar[:, None])).sum())
        self.wanted += found.size

    def _auxiliary(self, x: Tensor, error: Tensor, context: StepContext) -> Extra:
        """Gradients of AuxK (`objective.auxk`), formed for the dead latents' rows alone."""
        d, F, alpha = self.sae.config.d_in, self.sae.config.d_sae, context.auxk_alpha
        latents, rows = context.dead.nonzero().squeeze(1), np.full(F, -1, np.int32)
        if not alpha or not len(latents):
            none = np.empty((0, d), np.float32)
            return Extra(latents[:0], rows, none, none, torch.empty(0), torch.zeros(d))
        rows[latents.numpy()] = np.arange(len(latents), dtype=np.int32)
        weights = (self.W_enc, self.W_dec, self.screen.b_enc)
        enc, dec, bias = (torch.from_numpy(w[latents.numpy()]).requires_grad_() for w in weights)
        k = max(1, d // 2)
        shift = torch.zeros(d, requires_grad=True)  # stands for a change of b_dec in the input
        total = torch.zeros(())
        for part, left in zip(x.split(CHUNK_ROWS), error.split(CHUNK_ROWS), strict=True):
            values, indices = top_k((part - shift) @ enc.T + bias, min(k, len(latents)))
            total = total + (left + decode(SparseCodes(indices, values.relu()), dec)).square().sum()
        weight = alpha * min(1.0, len(latents) / k) / error.square().sum().clamp(min=1e-12)
        (weight * total).backward()
        grads = [w.grad if w.grad is not None else torch.zeros_like(w) for w in (enc, dec, bias, shift)]
        at_input = grads[3] if self.sae.config.apply_b_dec_to_input else torch.zeros(d)
        return Extra(latents, rows, grads[0].numpy(), grads[1].numpy(), grads[2], at_input)


def _rows(matrix: Tensor) -> F32:
    """The memory of a matrix that has one latent a row."""
    assert matrix.is_contiguous()
    return matrix.numpy()
