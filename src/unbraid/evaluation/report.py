"""What each metric means, in a few words, for tables."""

from __future__ import annotations

MEANINGS: dict[str, str] = {
    "l0": "latents that fire at a token",
    "mse": "squared error, summed over dimensions",
    "fvu": "share of the variance (about the mean) left unexplained",
    "ev_legacy": "explained variance as older tables have it, about each batch's mean",
    "l2_ratio": "size of the reconstruction over that of the activation",
    "bias": "1 where the reconstruction's size is unbiased",
    "dead": "share of the latents that never fired here",
    "dense_1": "share of the latents that fire on more than 1 % of the tokens",
    "dense_10": "share of the latents that fire on more than 10 % of the tokens",
    "delta_ce": "cross-entropy it costs the model, nats a token",
    "recovered_zero": "loss recovered against zeroing the site",
    "recovered_mean": "loss recovered against putting the mean there",
    "kl_sae": "divergence of the next-token distribution, nats",
    "kl_score_zero": "divergence avoided, against zeroing the site",
    "kl_score_mean": "divergence avoided, against putting the mean there",
    "ce_clean": "cross-entropy of the model as it is",
    "ce_sae": "with the reconstruction in place",
    "ce_zero": "with zeros in place",
    "ce_mean": "with the mean in place",
}
