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


def save(sae: SAE, folder: Path) -> None:
    """Write a TopK autoencoder into `folder`, which is made if it is missing.

    sparsify always subtracts b_dec from the input; where ours does not, the difference goes into the
    encoder's bias. Raises UserError for another architecture: sparsify knows TopK alone.
    """
    config = sae.config
    if config.architecture != "topk":
        raise UserError(
            f"sparsify stores topk autoencoders only, not {config.architecture}; write it as saelens"
        )
    with torch.no_grad():
        bias = sae.b_enc if config.apply_b_dec_to_input else sae.b_enc + sae.b_dec @ sae.W_enc
        tensors = {
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
        "skip_connection": False,
        "transcode": False,
        # Not sparsify's, which passes over them.
        "site": config.site,
        "model_name": config.model_name,
    }
    write_json(folder / CONFIG, record)
