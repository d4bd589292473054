"""What every step of an audit shares: its settings, its folder, and how an artifact is made once."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unbraid.causal.measure import Sampling
from unbraid.causal.selection import Limits
from unbraid.manifest.errors import UserError
from unbraid.manifest.files import building, write_json
from unbraid.manifest.progress import Progress
from unbraid.manifest.record import Manifest, check_files, write_manifest
from unbraid.model.load import LanguageModel

Stage = Callable[[str, str], AbstractContextManager[Progress]]
"""Opens the progress display of one stage: title and unit."""


@dataclass(frozen=True)
class AuditConfig:
    """How an audit is carried out."""

    seed: int = 0
    """Seed of sampling, training and search."""
    sites: tuple[str, ...] = ()
    """Sites to look at; without any, resid_post at a quarter and at half of the model's depth."""
    width: int = 1024
    """Latents of each autoencoder, d_sae."""
    k: int = 16
    """Latents that fire at a token."""
    sae_steps: int = 500
    """Training steps of each autoencoder."""
    sae_batch: int = 2048
    """Tokens in a training step."""
    sae_seeds: int = 2
    """Autoencoders trained at each site, each from its own seed."""
    most_latents: int = 3
    """A policy edits at most this many latents."""
    doses: tuple[float, ...] = (2.0, 4.0, 6.0)
    """Doses tried: how many times a latent's own contribution is removed."""
    alphas: tuple[float, ...] = (1.0, 2.0, 4.0, 6.0)
    """Multiples of the contrastive vector tried for subtraction."""
    clip_fractions: tuple[float, ...] = (-1.0, -0.5, 0.0, 0.5)
    """Bars tried for clipping along it: 0 is the honest mean, below it is beyond."""
    max_new_tokens: int = 48
    """Longest reply in tokens."""
    batch_size: int = 250
    """Replies sampled together; no influence on them."""
    limits: Limits = field(default_factory=Limits)
    """What the chosen edit may cost on the selection split."""

    @property
    def sampling(self) -> Sampling:
        """How replies are drawn: at temperature 1, one to each prompt."""
        return Sampling(max_new_tokens=self.max_new_tokens, batch_size=self.batch_size, seed=self.seed)


@dataclass(frozen=True, eq=False)
class Workshop:
    """What every step of an audit needs."""

    lm: LanguageModel
    """The model under audit."""
    out: Path
    """Folder of the audit."""
    config: AuditConfig
    """Its settings."""
    command: str
    """The command that reproduces it."""
    stage: Stage
    """Opens progress displays."""

    def artifact(
        self, name: str, kind: str, inputs: dict[str, str], build: Callable[[Path], dict[str, Any]]
    ) -> Manifest:
        """The finished artifact `name`, every byte checked; built first where it does not exist."""
        folder = self.out / name
        if not folder.exists():
            with building(folder) as partial:
                facts = build(partial)
                write_manifest(
                    partial,
                    kind=kind,
                    command=self.command,
                    seed=self.config.seed,
                    inputs=inputs,
                    facts=facts,
                )
        return check_files(folder)


def remember_settings(out: Path, settings: dict[str, Any]) -> None:
    """Write the audit's settings, or refuse to go on in a folder that was begun with others."""
    path = out / "settings.json"
    if path.exists():
        if json.loads(path.read_text()) != json.loads(json.dumps(settings)):
            raise UserError(
                f"{out} was begun with other settings (see {path}); choose another --out or delete it"
            )
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)


def default_sites(lm: LanguageModel) -> tuple[str, ...]:
    """resid_post at a quarter and at half of the depth: late enough to have read the prompt, early enough to
    act.
    """
    return tuple(f"layers.{layer}.resid_post" for layer in sorted({lm.n_layers // 4, lm.n_layers // 2}))
