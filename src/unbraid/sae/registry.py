"""The architectures by name."""

from __future__ import annotations

from unbraid.manifest.errors import UserError
from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.batchtopk import BatchTopKSAE
from unbraid.sae.jumprelu import JumpReLUSAE
from unbraid.sae.relu import ReLUSAE
from unbraid.sae.topk import TopKSAE

ARCHITECTURES: dict[str, type[SAE]] = {
    "topk": TopKSAE,
    "batchtopk": BatchTopKSAE,
    "relu": ReLUSAE,
    "jumprelu": JumpReLUSAE,
}


def build(config: SAEConfig) -> SAE:
    """An autoencoder with weights of zero. Raises UserError for an unknown architecture."""
    if config.architecture not in ARCHITECTURES:
        names = ", ".join(ARCHITECTURES)
        raise UserError(f"architecture {config.architecture!r} is not known; choose one of {names}")
    return ARCHITECTURES[config.architecture](config)
