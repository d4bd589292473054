"""Writing sparsify's folder: cfg.json and sae.safetensors, as its SparseCoder.load_from_disk reads it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save as to_bytes

from unbraid.manifest.errors import UserError
from unbraid.manifest.files import write_bytes, write_json
from unbraid.sae.base import SAE

CONFIG = "cfg.json"
WEIGHTS = "sae.safetensors"
TRANSCODES = {"topk": False, "topk_transcoder": True, "topk_skip_transcoder": True}
"""The architectures that sparsify has, and whether it calls them transcoders."""


def save(sae: SAE, folder: Path) -> None:
    """Write a TopK autoencoder or transcoder into `folder`, which is made if it is missing.

    sparsify's autoencoders always subtract b_dec from the input; where ours does not, the difference goes
    into the encoder's bias. Raises UserError for another architecture, for sparsify knows TopK alone, and for
    a transcoder between activations of different sizes.
    """
    config = sae.config
    if config.architecture not in TRANSCODES:
        raise UserError(
            f"sparsify stores {', '.join(TRANSCODES)} only, not {config.architecture}; write it as saelens"
        )
    transcode = TRANSCODES[config.architecture]
    if config.d_out not in (0, config.d_in):
        raise UserError(
            "sparsify stores transcoders between activations of one size only, not from "
            f"{config.d_in} to {config.d_out}; write it as saelens"
        )
    skip = {"W_skip": sae.get_parameter("W_skip")} if config.architecture == "topk_skip_transcoder" else {}
    with torch.no_grad():
        same = transcode or config.apply_b_dec_to_input
        bias = sae.b_enc if same else sae.b_enc + sae.b_dec @ sae.W_enc
        tensors = {
            **skip,
            "encoder.weight": sae.W_enc.T,
            "encoder.bias": bias,
            "W_dec": sae.W_dec,
            "b_dec": sae.b_dec,
        }
        data = to_bytes({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
    write_bytes(folder / WEIGHTS, data)
    record = {
        "activation": "topk",
        "d_in": config.d_in,
        "expansion_factor": max(config.d_sae // config.d_in, 1),
        "num_latents": config.d_sae,
        "k": config.k,
        "multi_topk": False,
        "normalize_decoder": False,
        "skip_connection": bool(skip),
        "transcode": transcode,
        # Not sparsify's, which passes over them.
        "site": config.site,
        "target_site": config.target_site,
        "model_name": config.model_name,
    }
    write_json(folder / CONFIG, record)
