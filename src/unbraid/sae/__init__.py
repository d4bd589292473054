"""Sparse autoencoders: the mathematics of each architecture, sparse codes, other tools' file formats."""

from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.codes import SparseCodes

__all__ = ["SAE", "SAEConfig", "SparseCodes"]
