"""The architectures by name."""

from __future__ import annotations

from unbraid.manifest.errors import UserError
from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.batchtopk import BatchTopKSAE
from unbraid.sae.clt import CrossLayerTranscoder
from unbraid.sae.crosscoder import CrosscoderSAE
from unbraid.sae.gated import GatedSAE
from unbraid.sae.jumprelu import JumpReLUSAE
from unbraid.sae.lista import LISTASAE
from unbraid.sae.matching_pursuit import MatchingPursuitSAE
from unbraid.sae.matryoshka import MatryoshkaSAE
from unbraid.sae.matryoshka_jumprelu import MatryoshkaJumpReLUSAE
from unbraid.sae.relu import ReLUSAE
from unbraid.sae.topk import TopKSAE
from unbraid.sae.transcoder import (
    JumpReLUSkipTranscoder,
    JumpReLUTranscoder,
    SkipTranscoder,
    TopKSkipTranscoder,
    TopKTranscoder,
    Transcoder,
)

ARCHITECTURES: dict[str, type[SAE]] = {
    "topk": TopKSAE,
    "batchtopk": BatchTopKSAE,
    "matryoshka": MatryoshkaSAE,
    "relu": ReLUSAE,
    "jumprelu": JumpReLUSAE,
    "matryoshka_jumprelu": MatryoshkaJumpReLUSAE,
    "gated": GatedSAE,
    "matching_pursuit": MatchingPursuitSAE,
    "lista": LISTASAE,
    "transcoder": Transcoder,
    "skip_transcoder": SkipTranscoder,
    "jumprelu_transcoder": JumpReLUTranscoder,
    "jumprelu_skip_transcoder": JumpReLUSkipTranscoder,
    "topk_transcoder": TopKTranscoder,
    "topk_skip_transcoder": TopKSkipTranscoder,
    "crosscoder": CrosscoderSAE,
    "clt": CrossLayerTranscoder,
}


def architecture(name: str) -> type[SAE]:
    """The class of an architecture. Raises UserError for an unknown name."""
    if name not in ARCHITECTURES:
        names = ", ".join(ARCHITECTURES)
        raise UserError(f"architecture {name!r} is not known; choose one of {names}")
    return ARCHITECTURES[name]


def build(config: SAEConfig) -> SAE:
    """An autoencoder with weights of zero. Raises UserError for an unknown architecture."""
    return architecture(config.architecture)(config)
