"""The same arithmetic in plain PyTorch, dense where that is clearest: what the compiled loops must match.

Sizes as in `loops`: n rows, d = d_in, F = d_sae; W_enc here is (F, d), one latent a row.
"""

from __future__ import annotations

from torch import Tensor


def top_k(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Latents and values (n, k) of the k largest pre-activations of each row of x (n, d)."""
    values, latents = (x @ W_enc.T + b_enc).topk(k, dim=1)
    return latents, values


def error(latents: Tensor, values: Tensor, W_dec: Tensor, b_dec: Tensor, target: Tensor) -> Tensor:
    """f W_dec + b_dec − target, (n, d), of codes given as latents and values (n, k)."""
    return (values[:, :, None] * W_dec[latents]).sum(dim=1) + b_dec - target


def weight_gradients(
    latents: Tensor, values: Tensor, gradient: Tensor, x: Tensor, error: Tensor, d_sae: int
) -> tuple[Tensor, Tensor, Tensor]:
    """d_enc (F, d) = Σ gradient · x, d_bias (F,) = Σ gradient and d_dec (F, d) = Σ value · error, by latent.

    Entries of value 0 did not fire and have no part in any of them.
    """
    fired = values != 0

    def spread(entries: Tensor) -> Tensor:
        return x.new_zeros(len(x), d_sae).scatter_add(1, latents.long(), entries * fired)

    return spread(gradient).T @ x, spread(gradient).sum(dim=0), spread(values).T @ error


def adam(
    weight: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, lr: float, number: int,
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Weight and moments after step `number` (from 1). Kingma and Ba 2015, arXiv 1412.6980."""
    mean = betas[0] * mean + (1 - betas[0]) * gradient
    square = betas[1] * square + (1 - betas[1]) * gradient.square()
    size = (square / (1 - betas[1] ** number)).sqrt() + eps
    return weight - lr / (1 - betas[0] ** number) * mean / size, mean, square


def without_length(gradient: Tensor, W_dec: Tensor) -> Tensor:
    """The gradient (F, d) without what would only change the length of W_dec's rows, which is 1."""
    return gradient - (gradient * W_dec).sum(dim=1, keepdim=True) * W_dec
