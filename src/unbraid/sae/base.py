"""What every sparse autoencoder has: two matrices, two biases, sparse codes, Edits made from latents."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unbraid.manifest.errors import UserError
from unbraid.model.edits import Edit, Gate, Operation, Positions
from unbraid.model.sites import Site
from unbraid.sae.codes import CHUNK_ROWS, SparseCodes, decode


def _no_metadata() -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True)
class SAEConfig:
    """What is fixed about an autoencoder besides its weights."""

    architecture: str
    """One of the names in `registry.ARCHITECTURES`."""
    d_in: int
    """Size of an activation."""
    d_sae: int
    """Number of latents, the autoencoder's width."""
    k: int = 0
    """Latents that may fire at a token (TopK) or do on average (BatchTopK); 0 where a threshold decides."""
    site: str = ""
    """The site whose activations it was trained on, such as layers.2.resid_post; empty when unknown."""
    model_name: str = ""
    """What people call the model it was trained on."""
    model_id: str = ""
    """SHA-256 of that model's weights; empty when it comes from a tool that does not record it."""
    apply_b_dec_to_input: bool = True
    """Whether the decoder's bias is subtracted from the input before encoding."""
    dtype: str = "float32"
    """Number format of the weights."""
    metadata: Mapping[str, Any] = field(default_factory=_no_metadata)
    """Whatever else the file it came from says about it."""


@dataclass(frozen=True, eq=False)
class SAEOutput:
    """Codes and reconstruction of a batch."""

    x_hat: Tensor
    """Reconstruction, shape (n, d_in)."""
    codes: SparseCodes
    """What it was decoded from."""


class SAE(nn.Module, ABC):
    """f = activation((x − b_dec) W_enc + b_enc) and x̂ = f W_dec + b_dec, on raw activations x of shape
    (n, d_in).

    W_enc: (d_in, d_sae), b_enc: (d_sae,), W_dec: (d_sae, d_in), b_dec: (d_in,). Each architecture is one
    way to keep f sparse. `threshold` (d_sae,), where there is one, is the pre-activation above which a
    latent counts as firing.
    """

    threshold: Tensor | None

    def __init__(self, config: SAEConfig) -> None:
        super().__init__()
        if config.d_in < 1 or config.d_sae < 1:
            raise UserError(
                f"an autoencoder needs width 1 or more; d_in is {config.d_in}, width {config.d_sae}"
            )
        if not 0 <= config.k <= config.d_sae:
            raise UserError(
                f"k is {config.k} but must lie between 0 and the width {config.d_sae}; change --k or --width"
            )
        self.config = config
        # One latent a row in memory, as in W_dec: what is selected, moved and quantised is a latent.
        self.W_enc = nn.Parameter(torch.zeros(config.d_sae, config.d_in).T)
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.W_dec = nn.Parameter(torch.zeros(config.d_sae, config.d_in))
        self.b_dec = nn.Parameter(torch.zeros(config.d_in))
        self.register_buffer("threshold", None)

    @abstractmethod
    def encode(self, x: Tensor) -> SparseCodes:
        """Codes of activations x, shape (n, d_in), differentiable in x and the weights."""

    def centred(self, x: Tensor) -> Tensor:
        """What W_enc multiplies: x − b_dec in float32, or x where the decoder's bias is not applied."""
        x = x.to(self.b_dec.dtype)
        return x - self.b_dec if self.config.apply_b_dec_to_input else x

    def pre_activations(self, x: Tensor) -> Tensor:
        """Every latent's pre-activation, shape (n, d_sae); dense, so give it few rows."""
        return torch.addmm(self.b_enc, self.centred(x), self.W_enc)

    def encode_dense(self, x: Tensor) -> Tensor:
        """Codes as one matrix of shape (n, d_sae)."""
        return self.encode(x).dense(self.config.d_sae)

    def decode(self, codes: SparseCodes) -> Tensor:
        """Reconstructions, shape (n, d_in)."""
        return decode(codes, self.W_dec) + self.b_dec

    def forward(self, x: Tensor) -> SAEOutput:
        """Encode and decode activations x, shape (n, d_in)."""
        codes = self.encode(x)
        return SAEOutput(self.decode(codes), codes)

    @property
    def site(self) -> Site:
        """The site it was trained on; raises UserError when its file names none, or one we do not know."""
        if not self.config.site:
            raise UserError("this autoencoder does not say which site it reads; give the site")
        return Site.parse(self.config.site)

    def latent_edit(
        self,
        latents: Sequence[int],
        operation: Operation,
        value: float | tuple[float, ...] = 0.0,
        *,
        site: Site | None = None,
        positions: Positions = "reply",
        gate: Gate | None = None,
        thresholds: Sequence[float] | None = None,
        name: str = "",
    ) -> Edit:
        """An Edit that acts on these latents together, at O(d_in) per latent instead of a pass through
        the SAE.

        The encoder is folded into the probe: pre-activation = x·W_enc[:, j] + (b_enc[j] − b_dec·W_enc[:,
        j]). A latent fires above its threshold: JumpReLU's own, zero for ReLU. For TopK, whose membership
        depends on all latents, it is the one measured after training at which the latent fires as often
        as it was among the top k (`training. calibrate`); zero when none was measured. `thresholds`
        replaces them, −inf meaning at every token. Raises UserError for a latent that does not exist.
        """
        chosen = [int(j) for j in latents]
        for j in chosen:
            if not 0 <= j < self.config.d_sae:
                raise UserError(
                    f"latent {j} does not exist; the autoencoder has latents 0 to {self.config.d_sae - 1}"
                )
        with torch.no_grad():
            probe = self.W_enc[:, chosen].T.double()  # (n, d_in)
            bias = self.b_enc[chosen].double()
            if self.config.apply_b_dec_to_input:
                bias = bias - probe @ self.b_dec.double()
            measured = self.threshold[chosen] if self.threshold is not None else torch.zeros(len(chosen))
            return Edit(
                site=site or self.site,
                operation=operation,
                value=value,
                probe=probe.float().cpu().numpy(),
                bias=bias.float().cpu().numpy(),
                threshold=torch.as_tensor(measured if thresholds is None else thresholds)
                .float()
                .cpu()
                .numpy(),
                write=self.W_dec[chosen].float().cpu().numpy(),
                positions=positions,
                gate=gate,
                name=name or f"{operation} {', '.join(map(str, chosen))}",
            )

    def save_pretrained(self, folder: Path | str) -> None:
        """Write cfg.json and sae_weights.safetensors as SAELens does (see `formats.saelens`)."""
        from unbraid.sae.formats.saelens import save

        save(self, Path(folder))

    @staticmethod
    def from_pretrained(folder: Path | str) -> SAE:
        """Load what `save_pretrained` or SAELens wrote. Raises UserError when the folder holds none."""
        from unbraid.sae.formats.saelens import load

        return load(Path(folder))


def encode_in_chunks(sae: SAE, x: Tensor, activation: nn.Module) -> SparseCodes:
    """Codes of an architecture that decides latent by latent, dense for a few rows at a time."""
    parts = [SparseCodes.from_dense(activation(sae.pre_activations(rows))) for rows in x.split(CHUNK_ROWS)]
    return SparseCodes.concatenate(parts)
