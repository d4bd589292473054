"""Sparse codes: for each activation the few latents that fire, as (index, value) pairs.

A dense code of width d_sae is never built unless asked for. The gradients of both weight matrices are
sums over the tokens at which a latent fired, so they too are sparse products: tokens are grouped by
latent once, and the gradient of a latent's row is a weighted sum of a few rows of activations, which is
an embedding bag with tokens as its vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from unbraid.sae.kernels import cpu

CHUNK_ROWS = cpu.CHUNK_ROWS
"""Rows whose dense pre-activations exist at the same time."""


@dataclass(frozen=True, eq=False)
class SparseCodes:
    """The codes of n activations with at most k active latents each; an entry with value 0 is padding."""

    indices: Tensor
    """Which latents, shape (n, k), int64. No latent stands twice in a row with values other than 0."""
    values: Tensor
    """How strongly they fire, shape (n, k), 0 or more."""

    def dense(self, d_sae: int) -> Tensor:
        """The same codes as one matrix of shape (n, d_sae)."""
        out = self.values.new_zeros(len(self.values), d_sae)
        return out.scatter_add(1, self.indices, self.values)

    def l0(self) -> Tensor:
        """How many latents fire at each activation, shape (n,), int64."""
        return (self.values != 0).sum(dim=1)

    @classmethod
    def from_dense(cls, dense: Tensor) -> SparseCodes:
        """Codes of a matrix (n, d_sae) without negative entries; k is the most entries that a row has."""
        k = int((dense > 0).sum(dim=1).max()) if len(dense) else 0
        values, indices = dense.topk(k, dim=1)
        return cls(indices * (values > 0), values)

    @classmethod
    def concatenate(cls, parts: list[SparseCodes]) -> SparseCodes:
        """Stack codes of several activations, padding each to the widest."""
        k = max(part.values.shape[1] for part in parts)
        indices = [F.pad(part.indices, (0, k - part.indices.shape[1])) for part in parts]
        values = [F.pad(part.values, (0, k - part.values.shape[1])) for part in parts]
        return cls(torch.cat(indices), torch.cat(values))


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices, both (n, k), of the k largest entries of each row of x (n, width), in no order.

    The same entries as `torch.topk` picks (up to ties) in less than half its time: split a row into
    groups, and the k largest entries lie in the k groups with the largest maxima, so only these are
    searched.
    """
    n, width = x.shape
    group = 1  # near √(width / k) the two searches are equally long
    while group * group * 2 * k <= width and width % (group * 2) == 0:
        group *= 2
    groups = width // group
    if group == 1 or groups < k:
        values, indices = x.topk(k, dim=1, sorted=False)
        return values, indices
    # A group is a strided set of columns, so that its maxima are taken over whole rows at a time.
    members = x.reshape(n, group, groups)
    best = members.amax(dim=1).topk(k, dim=1, sorted=False).indices  # (n, k)
    candidates = members.gather(2, best.unsqueeze(1).expand(n, group, k)).reshape(n, group * k)
    values, found = candidates.topk(k, dim=1, sorted=False)
    return values, best.gather(1, found % k) + (found // k) * groups


def top_k_pre_activations(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, among: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Values and indices (n, k) of the k largest of x @ W_enc + b_enc, differentiable in all three.

    x: (n, d_in), W_enc: (d_in, d_sae), b_enc: (d_sae,). With `among`, a vector of latents, only these are
    candidates. The dense pre-activations exist for a chunk of rows at a time.
    """
    if among is None and cpu.fits(x, W_enc, b_enc):
        values, indices = cpu.top_k_pre_activations(x, W_enc.T, b_enc, k)
        return selected(x, W_enc, b_enc, indices, values), indices
    with torch.no_grad():
        weight, bias = (W_enc, b_enc) if among is None else (W_enc[:, among], b_enc[among])
        chunks = [top_k(torch.addmm(bias, rows, weight), k) for rows in x.split(CHUNK_ROWS)]
        values = torch.cat([v for v, _ in chunks])
        indices = torch.cat([i for _, i in chunks])
        if among is not None:
            indices = among[indices]
    return selected(x, W_enc, b_enc, indices, values), indices


def selected(x: Tensor, W_enc: Tensor, b_enc: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """`values` (n, k), known to be (x @ W_enc + b_enc) at `indices` (n, k), with the gradients of that and in
    the weights' type, whatever the product was computed in."""
    return cast(Tensor, _Selected.apply(x, W_enc, b_enc, indices, values.to(W_enc.dtype)))


def decode(codes: SparseCodes, W_dec: Tensor) -> Tensor:
    """Σ_j value_j · W_dec[j] for each row of codes: shape (n, d_in), from W_dec of shape (d_sae, d_in)."""
    if codes.values.shape[1] == 0:
        return W_dec.new_zeros(len(codes.values), W_dec.shape[1])
    return cast(Tensor, _Decode.apply(codes.indices, codes.values.to(W_dec.dtype), W_dec))


class _Selected(torch.autograd.Function):
    """Chosen entries of x @ W_enc + b_enc, whose gradient reaches only the chosen latents."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, indices: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(x, W_enc, indices)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, indices = cast("tuple[Tensor, Tensor, Tensor]", ctx.saved_tensors)
        grad = grads[0]
        d_x = _bag(indices, W_enc.T, grad) if ctx.needs_input_grad[0] else None
        d_weight = _sum_by_latent(indices, grad, x, W_enc.shape[1]).T if ctx.needs_input_grad[1] else None
        d_bias = None
        if ctx.needs_input_grad[2]:
            d_bias = grad.new_zeros(W_enc.shape[1]).index_add(0, indices.flatten(), grad.flatten())
        return d_x, d_weight, d_bias, None, None


class _Decode(torch.autograd.Function):
    """Codes to activations. The built-in gradient of an embedding bag is many times slower for its table."""

    @staticmethod
    def forward(ctx: Any, indices: Tensor, values: Tensor, W_dec: Tensor) -> Tensor:
        ctx.save_for_backward(indices, values, W_dec)
        return _bag(indices, W_dec, values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        indices, values, W_dec = cast("tuple[Tensor, Tensor, Tensor]", ctx.saved_tensors)
        grad = grads[0].contiguous()
        d_values = d_weight = None
        if ctx.needs_input_grad[1]:
            d_values = _products(indices, grad, W_dec)
        if ctx.needs_input_grad[2]:
            d_weight = _sum_by_latent(indices, values, grad, len(W_dec))
        return None, d_values, d_weight


def _bag(indices: Tensor, table: Tensor, weights: Tensor) -> Tensor:
    """Σ_k weights[i, k] · table[indices[i, k]] for each row i: (n, d)."""
    if cpu.fits(table, weights):
        return cpu.decode(indices, weights, table)
    return F.embedding_bag(indices, table.contiguous(), per_sample_weights=weights.contiguous(), mode="sum")


def _products(indices: Tensor, rows: Tensor, table: Tensor) -> Tensor:
    """rows[i] · table[indices[i, k]] for each entry (i, k): (n, k)."""
    if cpu.fits(rows, table):
        return cpu.value_gradients(indices, rows, table)
    with torch.enable_grad():  # the gradient of an embedding bag in its weights is just that
        leaf = torch.ones_like(indices, dtype=rows.dtype).requires_grad_()
        (found,) = torch.autograd.grad((_bag(indices, table.detach(), leaf) * rows).sum(), leaf)
    return found


def _sum_by_latent(indices: Tensor, weights: Tensor, rows: Tensor, d_sae: int) -> Tensor:
    """For each latent j, Σ weights[i, k] · rows[i] over all (i, k) with indices[i, k] = j: (d_sae, d)."""
    if cpu.fits(weights, rows):
        return cpu.sum_by_latent(indices, weights, rows, d_sae)
    flat = indices.flatten()
    order = flat.argsort(stable=True)
    ends = torch.bincount(flat, minlength=d_sae).cumsum(0)
    starts = F.pad(ends[:-1], (1, 0))
    return F.embedding_bag(
        order // indices.shape[1],
        rows.contiguous(),
        starts,
        per_sample_weights=weights.flatten()[order],
        mode="sum",
    )
