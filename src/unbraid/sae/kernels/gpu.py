"""A TopK training step's arithmetic on a GPU, in Triton; `reference` is what each kernel must match.

Sizes: n rows, d = d_in, F = d_sae, k entries a row. Matrices have one latent a row, (F, d). Weights, moments
and sums are float32; the dense product alone runs in bfloat16, on a shadow copy of the encoder, and only
proposes candidates, whose pre-activations are then computed in float32.

(n, F) never exists: a program computes a tile of the product and writes down its few largest entries. A row
whose tile might hide more of the top k than it wrote down is computed again by itself, so the result does
not depend on luck. Gradients are summed latent by latent in the order of the entries, without atomics:
equal input gives equal bits.

Imported only where Triton is installed. With TRITON_INTERPRET=1 in the environment before the import, the
kernels run on the processor, slowly, for tests.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2

from unbraid.sae.kernels import programs

TILE_ROWS, TILE_LATENTS, TILE_INNER = 128, 128, 64
TOGETHER = 8
"""Blocks of rows whose programs run side by side, so that they share latents in the cache."""
KEPT = 8
"""Largest entries that a tile writes down for a row, a power of two."""
INNER = 64
"""Dimensions that a row's kernels read at a time."""

_RUN: Any = programs
"""A program is started as name[grid](arguments), which has no type."""


def candidates(x: Tensor, W_enc: Tensor, b_enc: Tensor, c: int, keep: int = KEPT) -> tuple[Tensor, Tensor]:
    """Latents (n, c) of the c largest entries of x W_enc^T + b_enc in low precision, and for each row
    whether a tile may hide another one of them, (n,) booleans.

    x: (n, d) and W_enc: (F, d) in the same low precision, contiguous; b_enc: (F,) float32.
    """
    (n, d), F = x.shape, len(W_enc)
    tiles = cdiv(F, TILE_LATENTS)
    keep = min(keep, TILE_LATENTS)
    values = torch.empty(n, tiles, keep, device=x.device)
    latents = torch.empty(n, tiles, keep, device=x.device, dtype=torch.int32)
    grid = (cdiv(n, TILE_ROWS) * tiles,)
    _RUN.tile_top[grid](
        x, W_enc, b_enc, values, latents, n, F, d, tiles,
        BM=TILE_ROWS, BN=TILE_LATENTS, BK=TILE_INNER, KEEP=keep, GROUP=TOGETHER,
    )  # fmt: skip
    best = values.view(n, -1).topk(min(c, tiles * keep), dim=1)
    found = latents.view(n, -1).gather(1, best.indices)
    hidden = (values[:, :, -1] >= best.values[:, -1:]).any(dim=1)
    return found, hidden | (best.values[:, -1] == float("-inf"))


def top_k(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, shadow: Tensor, k: int, *, keep: int = KEPT
) -> tuple[Tensor, Tensor]:
    """Latents and values (n, k) of the k largest of x W_enc^T + b_enc: candidates by `shadow`, W_enc in low
    precision, their values and so the choice in float32. x: (n, d), W_enc: (F, d), both contiguous.
    """
    n, d = x.shape
    c = min(k + k // 4 + 8, len(W_enc))
    low = x.to(shadow.dtype)
    found, hidden = candidates(low, shadow, b_enc, c, keep)
    if found.shape[1] < c:  # fewer tiles than it takes: all of a small encoder's rows are looked at whole
        found, hidden = found.new_empty(n, c), torch.ones_like(hidden)
    again = hidden.nonzero().squeeze(1)
    for rows in again.split(1024):
        whole = low[rows].float() @ shadow.float().T + b_enc
        found[rows] = whole.topk(c, dim=1).indices.to(found.dtype)
    found = found.contiguous()
    values = torch.empty(n, c, device=x.device)
    _RUN.rescore[(n,)](x, W_enc, b_enc, found, values, d, c, C=next_power_of_2(c), BK=INNER)
    best = values.topk(k, dim=1)
    return found.gather(1, best.indices), best.values


def decode_and_compare(
    latents: Tensor, codes: Tensor, W_dec: Tensor, b_dec: Tensor, target: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Error codes · W_dec + b_dec − target (n, d), the gradient scale · error · W_dec of every code (n, k),
    0 where a code is, and each row's squared error (n,)."""
    (n, d), k = target.shape, codes.shape[1]
    error, gradient = torch.empty_like(target), torch.empty_like(codes)
    squared = torch.empty(n, device=target.device)
    _RUN.decode[(n,)](
        latents, codes, W_dec, b_dec, target, error, gradient, squared, d, k, scale,
        K=next_power_of_2(k), BK=INNER,
    )  # fmt: skip
    return error, gradient, squared


def by_latent(latents: Tensor, codes: Tensor, F: int) -> tuple[Tensor, Tensor]:
    """Entries other than 0 grouped by latent: latent j's stand at first[j]:first[j + 1] of `entries`, in
    their order."""
    keys = torch.where(codes.flatten() != 0, latents.flatten().long(), F)
    sorted_keys, entries = keys.sort(stable=True)
    first = torch.searchsorted(sorted_keys, torch.arange(F + 1, device=keys.device))
    return first, entries


def bias_gradient(first: Tensor, entries: Tensor, gradient: Tensor) -> Tensor:
    """The sum of each latent's entries' gradients, (F,)."""
    out = torch.empty(len(first) - 1, device=gradient.device)
    _RUN.sum_lists[(len(out),)](first, entries, gradient, out)
    return out


def update(
    first: Tensor, entries: Tensor, codes: Tensor, gradient: Tensor, x: Tensor, error: Tensor,
    extra: tuple[Tensor, Tensor, Tensor], weights: tuple[Tensor, Tensor], moments: tuple[Tensor, ...],
    shadow: Tensor, scale: float, step: float, unbias: float, betas: tuple[float, float], epsilon: float,
) -> None:  # fmt: skip
    """Move W_enc and W_dec, both (F, d), and their moments (mean and square of each) in place, and write the
    encoder's low-precision copy.

    `extra`: for every latent its row in two matrices of further gradients, or −1. `step` is the rate over
    1 − β₁^t, `unbias` 1 / (1 − β₂^t).
    """
    F, d = weights[0].shape
    options: dict[str, Any] = {"num_warps": 8 if d > 1024 else 4}
    _RUN.update[(F,)](
        first, entries, codes, gradient, x, error, *extra, *weights, *moments, shadow,
        d, codes.shape[1], scale, step, unbias,
        D=next_power_of_2(d), B1=betas[0], B2=betas[1], EPS=epsilon, **options,
    )  # fmt: skip
