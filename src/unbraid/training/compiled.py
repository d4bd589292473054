"""A training step on the processor in compiled loops that touch only the entries where codes are not 0.

Per batch of n activations x (n, d_in), with F = d_sae latents of which k fire:

1. *Screen.* x and W_enc as int8, their product in chunks of rows, so that (n, F) never exists. The best
   1.5 k + 8 latents of each row are candidates; their pre-activations are computed exactly, and the k largest
   are the codes. `Screen.recall` counts, on some rows of every batch, how many of the true top k that finds.
2. *Decode.* Reconstruction, error and the gradient of every entry's value, row by row.
3. *Update.* Entries grouped by latent; then for each latent, in one pass over its rows of every matrix: both
   gradients, decoder-norm projection, Adam, normalisation, int8 copy for the next screen.

Steps 1 and 2 run over chunks of rows, 3 over ranges of latents, on as many threads as torch has; no sum
crosses a chunk, so the result does not depend on the number of threads. The loops are `sae.kernels.loops`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unbraid.sae.base import SAE
from unbraid.sae.codes import CHUNK_ROWS, SparseCodes, decode, top_k
from unbraid.sae.kernels import loops
from unbraid.training.adam import BETA_MEAN, BETA_SQUARE, EPSILON, Adam
from unbraid.training.objective import StepReport

T = TypeVar("T")
F32, F64 = NDArray[np.float32], NDArray[np.float64]
Precision = Literal["int8", "float32"]
PARTS = 64
"""Ranges of about equal work that the latents are split into."""
ROW_COST = 6
"""Work of moving the rows of a latent that no token fired, in units of one entry."""
CHECKED = 4
"""Rows of every batch on which the screen is compared with the whole product."""


def best_precision() -> Precision:
    """int8 where the processor multiplies it faster than float32 (AVX-512 VNNI), else float32."""
    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    return "int8" if supported is not None and supported() else "float32"


@dataclass(frozen=True, eq=False)
class Codes:
    """The codes of a batch, k entries a row, and the gradient of the loss in each value."""

    latents: NDArray[np.int32]
    """Which latents, (n, k)."""
    values: F32
    """How strongly they fire, (n, k); one with value 0 does not."""
    gradient: F32
    """(n · k,)."""
    starts: NDArray[np.int64]
    """Where each row's entries begin, (n + 1,)."""

    @classmethod
    def empty(cls, n: int, k: int) -> Codes:
        """Room for n rows."""
        latents, values = np.empty((n, k), np.int32), np.empty((n, k), np.float32)
        return cls(latents, values, np.zeros(n * k, np.float32), np.arange(0, n * k + 1, k))

    def by_latent(self, d_sae: int) -> Lists:
        """The same entries grouped by latent."""
        size = self.latents.size
        lists = Lists(np.empty(d_sae + 1, np.int64), *(np.empty(size, np.int32) for _ in range(2)))
        loops.group_by_latent(
            self.starts, self.latents.reshape(-1), self.values.reshape(-1), *vars(lists).values()
        )
        return lists


@dataclass(frozen=True, eq=False)
class Lists:
    """Entries grouped by latent: latent j's stand at first[j]:first[j + 1]."""

    first: NDArray[np.int64]
    """(F + 1,)."""
    rows: NDArray[np.int32]
    """Which row each belongs to."""
    entries: NDArray[np.int32]
    """Where it stands among the codes."""


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


class CompiledStep:
    """Steps of a TopK autoencoder; weights and moments are those of the SAE and of Adam, changed in place."""

    def __init__(self, sae: SAE, optimizer: Adam, *, precision: Precision | None = None) -> None:
        """Raises ValueError when the matrices do not lie one latent a row in memory."""
        self.sae, self.optimizer = sae, optimizer
        self.precision = precision or best_precision()
        F, d = sae.config.d_sae, sae.config.d_in
        self.W_enc, self.W_dec = _rows(sae.W_enc.detach().T), _rows(sae.W_dec.detach())  # (F, d)
        mean, square = optimizer.mean, optimizer.square
        self.moments = [
            _rows(m) for m in (mean["W_enc"].T, square["W_enc"].T, mean["W_dec"], square["W_dec"])
        ]
        self.shadow, self.shadow_scale = torch.empty(F, d, dtype=torch.int8), np.ones(F, np.float32)
        self.refresh()
        self.screened = min(F, sae.config.k + sae.config.k // 2 + 8)
        self.hits = self.wanted = 0
        self.local = threading.local()

    def refresh(self) -> None:
        """Quantise the encoder again, after its weights were changed from outside."""
        loops.quantise_rows(self.W_enc, self.shadow.numpy(), self.shadow_scale)

    @property
    def recall(self) -> float:
        """Share of the true top k that the screen found, on the rows checked so far."""
        return self.hits / self.wanted if self.wanted else 1.0

    def step(self, x: Tensor, dead: Tensor, auxk_alpha: float, number: int, lr: float) -> StepReport:
        """One optimiser step on activations x (n, d_in); `number` counts from 1, dead: (F,) booleans."""
        sae, scale = self.sae, 2 / x.numel()
        n, d, F, k = len(x), sae.config.d_in, sae.config.d_sae, sae.config.k
        centred, target = sae.centred(x).detach().contiguous(), x.contiguous().numpy()
        b_enc, b_dec = sae.b_enc.detach().numpy(), sae.b_dec.detach().numpy()
        codes = Codes.empty(n, k)
        error, squared = np.empty((n, d), np.float32), np.empty(n, np.float64)

        def forward(begin: int) -> F64:
            rows = slice(begin, min(begin + CHUNK_ROWS, n))
            self._encode(centred[rows], b_enc, codes.latents[rows], codes.values[rows])
            loops.decode_and_compare(
                codes.starts, codes.latents.reshape(-1), codes.values.reshape(-1), self.W_dec, b_dec,
                target[rows], begin, scale, error[rows], codes.gradient, squared[rows],
            )  # fmt: skip
            return error[rows].sum(axis=0, dtype=np.float64)

        d_b_dec = scale * sum(self._side_by_side(forward, range(0, n, CHUNK_ROWS)))
        self._check_recall(centred, b_enc, codes)
        extra = self._auxiliary(centred, torch.from_numpy(error), dead, auxk_alpha)

        lists = codes.by_latent(F)
        cuts = _even_cuts(lists.first, PARTS)
        d_b_enc, back = np.empty(F, np.float32), np.zeros((PARTS, d), np.float32)
        unbias_mean, unbias_square = 1 - BETA_MEAN**number, 1 - BETA_SQUARE**number

        def backward(part: int) -> None:
            loops.update(
                cuts[part], cuts[part + 1], lists.first, lists.rows, lists.entries, codes.values.reshape(-1),
                codes.gradient, centred.numpy(), error, scale, extra.rows, extra.enc, extra.dec,
                self.W_enc, self.W_dec, *self.moments, d_b_enc, back[part], self.shadow.numpy(),
                self.shadow_scale, lr / unbias_mean, 1 / unbias_square, BETA_MEAN, BETA_SQUARE, EPSILON,
            )  # fmt: skip

        self._side_by_side(backward, range(PARTS))
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

    def _encode(self, x: Tensor, b_enc: F32, latents: NDArray[np.int32], values: F32) -> None:
        """Fill latents and values (m, k) with the codes of centred activations x (m, d)."""
        m, d = x.shape
        if self.precision == "int8":
            rough, scale = torch.empty(m, d, dtype=torch.int8), np.empty(m, np.float32)
            loops.quantise_rows(x.numpy(), rough.numpy(), scale)
            product = self._room(m)
            torch._int_mm(rough, self.shadow.T, out=product)  # pyright: ignore[reportPrivateUsage]
            units = self.shadow_scale
        else:
            product, scale, units = x @ self.sae.W_enc.detach(), np.ones(m, np.float32), np.ones_like(b_enc)
        loops.top_k_screened(
            product.numpy(), scale, units, x.numpy(), self.W_enc, b_enc, self.screened, latents, values
        )
        np.maximum(values, 0, out=values)

    def _room(self, rows: int) -> Tensor:
        """This thread's own (rows, F) int32, made once: a fresh one's pages cost more than filling it."""
        kept = getattr(self.local, "product", None)
        if kept is None:
            kept = self.local.product = torch.empty(CHUNK_ROWS, self.sae.config.d_sae, dtype=torch.int32)
        return kept[:rows]

    def _check_recall(self, x: Tensor, b_enc: F32, codes: Codes) -> None:
        """Count on a few rows, other ones at every step, what the screen found of the true top k."""
        rows = np.linspace(0, len(x) - 1, CHECKED).astype(np.int64)
        exact = x[rows].numpy() @ self.W_enc.T + b_enc
        bar = np.partition(exact, -codes.latents.shape[1], axis=1)[:, -codes.latents.shape[1]]
        found = np.take_along_axis(exact, codes.latents[rows].astype(np.int64), axis=1) >= bar[:, None]
        self.hits += int(found.sum())
        self.wanted += found.size

    def _auxiliary(self, x: Tensor, error: Tensor, dead: Tensor, alpha: float) -> Extra:
        """Gradients of the loss by which dead latents learn what the live ones left over (`sae.topk`)."""
        d, F = self.sae.config.d_in, self.sae.config.d_sae
        latents, rows = dead.nonzero().squeeze(1), np.full(F, -1, np.int32)
        if not alpha or not len(latents):
            none = np.empty((0, d), np.float32)
            return Extra(latents[:0], rows, none, none, torch.empty(0), torch.zeros(d))
        rows[latents.numpy()] = np.arange(len(latents), dtype=np.int32)
        weights = (self.W_enc, self.W_dec, self.sae.b_enc.detach().numpy())
        enc, dec, bias = (torch.from_numpy(w[latents.numpy()]).requires_grad_() for w in weights)
        k = max(1, d // 2)
        k_dead = min(k, len(latents))
        shift = torch.zeros(d, requires_grad=True)  # moves b_dec
        total = torch.zeros(())
        for part, left in zip(x.split(CHUNK_ROWS), error.split(CHUNK_ROWS), strict=True):
            p = (part - shift) @ enc.T + bias
            values, indices = top_k(p, k_dead)
            total = total + (left + decode(SparseCodes(indices, values.relu()), dec)).square().sum()
        weight = alpha * min(1.0, len(latents) / k) / error.square().sum().clamp(min=1e-12)
        (weight * total).backward()
        grads = [w.grad if w.grad is not None else torch.zeros_like(w) for w in (enc, dec, bias, shift)]
        at_input = grads[3] if self.sae.config.apply_b_dec_to_input else torch.zeros(d)
        return Extra(latents, rows, grads[0].numpy(), grads[1].numpy(), grads[2], at_input)

    def _side_by_side(self, work: Callable[[int], T], items: Iterable[int]) -> list[T]:
        """work(item) of each, in order, on torch's number of threads, each of which has torch to itself."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(threads) as pool:
                return list(pool.map(work, items))
        finally:
            torch.set_num_threads(threads)


def _rows(matrix: Tensor) -> F32:
    if not matrix.is_contiguous():
        raise ValueError("a compiled step needs matrices with one latent a row in memory")
    return matrix.numpy()


def _even_cuts(first: NDArray[np.int64], parts: int) -> NDArray[np.int64]:
    """Where to cut the latents into ranges of about equal work, (parts + 1,)."""
    work = first + ROW_COST * np.arange(len(first))
    return np.searchsorted(work, np.linspace(0, work[-1], parts + 1)).clip(max=len(first) - 1)
