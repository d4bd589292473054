"""What an autoencoder has to beat: an untrained one, random directions, raw neurons, principal components."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unbraid.sae.base import SAE
from unbraid.sae.batchtopk import BatchTopKSAE
from unbraid.sae.jumprelu import JumpReLUSAE
from unbraid.sae.topk import TopKSAE
from unbraid.training.run import first_weights

ROWS_AT_ONCE = 2048
"""Activations whose products with every direction exist at the same time."""


@torch.no_grad()
def untrained(sae: SAE, x: Tensor, seed: int) -> SAE:
    """An autoencoder of the same width and L0 that never learned: random unit directions, tied, around E x.

    x (n, d_in) are activations of the site. A TopK one keeps its k; every other gets the one threshold at
    which as many latents fire on x as in `sae`.
    """
    l0 = max(1, round(float(sae.encode(x).l0().double().mean())))
    k = sae.config.k if isinstance(sae, TopKSAE) else min(l0, sae.config.d_sae)
    kind = TopKSAE if isinstance(sae, TopKSAE) else BatchTopKSAE
    config = replace(
        sae.config, architecture="topk" if kind is TopKSAE else "batchtopk", k=k, d_out=0, options={},
        apply_b_dec_to_input=True,
    )  # fmt: skip
    found = _aimed(kind(config), x, seed)
    return found if kind is TopKSAE else found.calibrated([x]).requires_grad_(False)


@torch.no_grad()
def random_directions(sae: SAE, x: Tensor, seed: int) -> SAE:
    """Random unit directions, each with the threshold at which it fires on x (n, d_in) as often as the latent
    of `sae` in its place, though never below E x along it. A latent that is dead on x has a dead direction.
    """
    config = replace(sae.config, architecture="jumprelu", k=0, d_out=0, options={}, apply_b_dec_to_input=True)
    found = _aimed(JumpReLUSAE(config), x, seed)
    codes = sae.encode(x)
    fired = torch.bincount(codes.indices[codes.values > 0].flatten().cpu(), minlength=sae.config.d_sae)
    thresholds = torch.full((sae.config.d_sae,), torch.inf)
    for latents in torch.arange(sae.config.d_sae).split(max(1, 2**24 // len(x))):
        products = (
            (found.centred(x) @ found.W_enc[:, latents.to(x.device)]).cpu().sort(dim=0, descending=True)
        )
        counts = fired[latents]
        at = products.values.gather(0, counts.clamp(max=len(x) - 1)[None])[0].clamp(min=0)
        thresholds[latents] = torch.where(counts > 0, at, torch.inf)
    state = {name: value.detach() for name, value in found.named_parameters()}
    found.load_state_dict({**state, "threshold": thresholds})
    return found


@torch.no_grad()
def without_training(sae: SAE, x: Tensor) -> dict[str, SAE]:
    """Raw neurons and principal components as autoencoders around E x, by what tables call them.

    Each axis is two latents, one a way, so either of them is silent as latents are. x (n, d_in) are
    activations of the site; at each token fire as many as in `sae` on average, those farthest from E x.
    """
    centred = x.double() - x.double().mean(dim=0)
    axes = {"neurons": torch.eye(sae.config.d_in), "PCA": torch.linalg.eigh(centred.T @ centred)[1].T.flip(0)}
    k = min(max(1, round(float(sae.encode(x).l0().double().mean()))), sae.config.d_in)
    found: dict[str, SAE] = {}
    for name, rows in axes.items():
        config = replace(
            sae.config, architecture="topk", d_sae=2 * len(rows), k=k, d_out=0, options={},
            apply_b_dec_to_input=True,
        )  # fmt: skip
        found[name] = _around(TopKSAE(config), x, torch.cat([rows, -rows]))
    return found


def _aimed(sae: SAE, x: Tensor, seed: int) -> SAE:
    rows = torch.randn(sae.config.d_sae, sae.config.d_in, generator=first_weights(seed))
    return _around(sae, x, rows / rows.norm(dim=1, keepdim=True))


def _around(sae: SAE, x: Tensor, rows: Tensor) -> SAE:
    sae.W_dec.copy_(rows)
    sae.W_enc.copy_(sae.W_dec.T)
    sae.b_dec.copy_(x.double().mean(dim=0).float())
    return sae.to(x.device).requires_grad_(False)


def principal_components(raw: NDArray[np.float64]) -> NDArray[np.float64]:
    """The principal directions of documents' means (n_docs, d_in), as columns (d_in, m), largest first."""
    _, sizes, rows = np.linalg.svd(raw - raw.mean(axis=0), full_matrices=False)
    return rows[sizes > 1e-10 * max(sizes.max(initial=0.0), 1e-300)].T


def unit_directions(d_in: int, count: int, seed: int) -> NDArray[np.float64]:
    """Random unit vectors as columns (d_in, count)."""
    drawn = np.random.default_rng(seed).normal(size=(d_in, count))
    return drawn / np.linalg.norm(drawn, axis=0)
