"""What every sparse autoencoder has: two matrices, two biases, sparse codes, Edits made from latents."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from unbraid.manifest.errors import UserError
from unbraid.model.edits import Edit, Gate, Operation, Positions
from unbraid.model.sites import Site
from unbraid.sae.codes import SparseCodes, decode
from unbraid.sae.objective import StepContext, StepReport, auxk
from unbraid.sae.options import NoOptions, check_options
from unbraid.sae.scaling import Scaling

Reads = Literal["site", "pair", "sites", "pairs"]
"""What an architecture learns from: one site, a site and another to predict, several, several such pairs."""


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
    d_out: int = 0
    """Size of what it reconstructs; 0 where that is its input."""
    target_site: str = ""
    """The site whose activations it reconstructs, where that is not the one that it reads."""
    blocks: tuple[int, ...] = ()
    """Sizes of the sites that stand side by side in an input; empty for one site. `site` and `target_site`
    then name all of them, with commas."""
    options: Mapping[str, Any] = field(default_factory=_no_metadata)
    """The architecture's own options where they are not its defaults, as JSON values by name."""
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

    W_enc: (d_in, d_sae), b_enc: (d_sae,), W_dec: (d_sae, d_out), b_dec: (d_out,), where d_out is d_in but
    for transcoders. Each architecture is one way to keep f sparse. `threshold` (d_sae,), where there is
    one, is the pre-activation above which a latent counts as firing.

    A new architecture is a subclass in a file of its own, with its formula, its paper, `encode` and what
    its objective adds, and a line in `registry`. The trainer calls `initialise`, then at each step
    `backward`, `constrain_gradient` and `constrain`, and at the end `fold` and `calibrated`.
    """

    Options: ClassVar[type] = NoOptions
    """Its own hyperparameters: a frozen dataclass."""
    uses_k: ClassVar[bool] = False
    """Whether `k` means something."""
    reads: ClassVar[Reads] = "site"
    """What it learns from."""
    training_only: ClassVar[bool] = False
    """Whether it is turned into another architecture for use."""
    against_death: ClassVar[str] = "a larger --auxk-alpha"
    """What helps when many of its latents die."""
    latent_axes: ClassVar[Mapping[str, int]] = {"W_enc": 1, "b_enc": 0, "W_dec": 0}
    """The parameters in which a latent has a place of its own, and along which axis."""
    beta2: ClassVar[float] = 0.99
    """Adam's β₂. The usual is 0.999; a latent that was silent for long has a faded second moment, and its
    next step is lr · (1 − β₁) / √(1 − β₂): 3.2 lr with 0.999, 1.0 lr with 0.99, with which FVU and ΔCE at
    equal L0 were lower (benchmarks/RESULTS.md, "sweep: Adam's β₂")."""

    unit_rows: bool = True
    """Whether training keeps decoder rows at unit length."""

    threshold: Tensor | None

    def __init__(self, config: SAEConfig) -> None:
        super().__init__()
        if config.d_in < 1 or config.d_sae < 1 or config.d_out < 0:
            raise UserError(
                f"an autoencoder needs width 1 or more; d_in is {config.d_in}, width {config.d_sae}"
            )
        if not 0 <= config.k <= config.d_sae:
            raise UserError(
                f"k is {config.k} but must lie between 0 and the width {config.d_sae}; change --k or --width"
            )
        if self.uses_k and config.k < 1:
            raise UserError(
                f"architecture {config.architecture} needs k of 1 or more, not {config.k}; change --k"
            )
        self.options: Any = check_options(self.Options, config.options, config.architecture)
        self.config = config
        d_out = config.d_out or config.d_in
        # One latent a row in memory, as in W_dec: what is selected, moved and quantised is a latent.
        self.W_enc = nn.Parameter(torch.zeros(config.d_sae, config.d_in).T)
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.W_dec = nn.Parameter(torch.zeros(config.d_sae, d_out))
        self.b_dec = nn.Parameter(torch.zeros(d_out))
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
        """Reconstructions, shape (n, d_out)."""
        return decode(codes, self.W_dec) + self.b_dec

    def row_norms(self) -> Tensor:
        """How much each latent's decoder row counts: its length, (d_sae,)."""
        return self.W_dec.norm(dim=1)

    def places(self, parameter: str, latents: Tensor) -> Tensor:
        """Where latents (m,) stand in a parameter along its axis of `latent_axes`: here at their numbers."""
        return latents

    def encoder_rows(self) -> Tensor | None:
        """What each latent reads, (d_sae, d_in); None where there are no weights to read with but W_dec."""
        return self.W_enc.T

    def bypass(self, x: Tensor) -> Tensor | float:
        """What reaches the reconstruction past the latents, (n, d_out); 0 but for skip connections."""
        return 0.0

    def forward(self, x: Tensor) -> SAEOutput:
        """Encode and decode activations x, shape (n, d_in)."""
        codes = self.encode(x)
        return SAEOutput(self.decode(codes) + self.bypass(x), codes)

    def backward(self, x: Tensor, target: Tensor, context: StepContext) -> StepReport:
        """Add the gradients of this architecture's objective on a batch, x (n, d_in) and target (n, d_out).

        Here: reconstruction, and AuxK on dead latents.
        """
        codes = self.encode(x)
        loss, error = self.reconstruction_loss(codes, x, target)
        dead = context.dead.nonzero().squeeze(1)
        if context.auxk_alpha and len(dead):
            rest = error.detach()
            loss = loss + context.auxk_alpha * auxk(*self.auxiliary(x, rest), self.W_dec, rest, dead)
        loss.backward()
        return StepReport.of(error, codes, self.config.d_sae)

    def reconstruction_loss(self, codes: SparseCodes, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, a scalar, and the error target − reconstruction, (n, d_out)."""
        error = target - (self.decode(codes) + self.bypass(x))
        return error.square().sum() / target.numel(), error

    def auxiliary(self, x: Tensor, error: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """By what AuxK ranks dead latents: an input (n, d), weights (d, d_sae) and biases (d_sae,)."""
        return self.centred(x), self.W_enc, self.b_enc

    @torch.no_grad()
    def initialise(self, x: Tensor, target: Tensor, generator: torch.Generator) -> None:
        """Weights to start from: the data x (n, d_in), target (n, d_out) decides how far the encoder reaches.

        Decoder rows are random unit vectors, the encoder is their transpose, shrunk so that the codes of
        this batch reconstruct it as well as one common factor can make them (otherwise overlapping latents
        overshoot).
        """
        self.W_dec.copy_(torch.randn(self.W_dec.shape, generator=generator))
        self.constrain()
        self.W_enc.copy_(self.reading_directions(x, target))
        x_hat = self(x).x_hat
        self.W_enc *= (target * x_hat).sum() / x_hat.square().sum().clamp(min=1e-12)

    def reading_directions(self, x: Tensor, target: Tensor) -> Tensor:
        """The encoder to start from, (d_in, d_sae): here the decoder's transpose."""
        return self.W_dec.T

    @torch.no_grad()
    def constrain_gradient(self) -> None:
        """Take out of each decoder row's gradient what would only change the row's length, which stays 1."""
        if not self.unit_rows:
            return
        grad = self.W_dec.grad
        assert grad is not None
        grad -= (grad * self.W_dec).sum(dim=1, keepdim=True) * self.W_dec

    @torch.no_grad()
    def constrain(self) -> None:
        """Return to what the weights have to satisfy: decoder rows of unit length."""
        if self.unit_rows:
            self.W_dec /= self.W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12)

    @torch.no_grad()
    def fold(self, source: Scaling, target: Scaling) -> None:
        """Change an autoencoder of scaled activations into the same one of raw activations, in place.

        Afterwards a latent's value is what it was divided by `target.unit`: with one site it is in the
        model's own units, decoder rows still have unit length, and W_enc is unchanged.
        """
        if not self.config.apply_b_dec_to_input:
            self.b_enc.sub_((source.mean * source.scale) @ self.W_enc)
        self.W_enc.mul_((source.scale / target.unit)[:, None])
        self.b_enc.div_(target.unit)
        self.W_dec.mul_(target.unit / target.scale)
        self.b_dec.div_(target.scale).add_(target.mean)

    def calibrated(self, batches: Sequence[Tensor]) -> SAE:
        """The autoencoder for use, after a look at batches (n, d_in) of what it was trained on."""
        return self

    @torch.no_grad()
    def revive(self, latents: Tensor, x: Tensor, target: Tensor) -> None:
        """Point dead latents at activations x (m, d_in) and targets (m, d_out), one for each.

        Bricken et al. 2023, "Towards monosemanticity", appendix on resampling: the decoder row is the
        activation's direction, the encoder row the same at a fifth of the usual length, the bias 0.
        """
        write = target - self.b_dec
        self.W_dec[latents] = write / write.norm(dim=1, keepdim=True).clamp(min=1e-12)
        read = self.centred(x)
        usual = self.W_enc.norm(dim=0).mean()
        self.W_enc[:, latents] = (read / read.norm(dim=1, keepdim=True).clamp(min=1e-12)).T * 0.2 * usual
        self.b_enc[latents] = 0.0

    @property
    def site(self) -> Site:
        """The site it was trained on; raises UserError when its file names none, or one we do not know."""
        if not self.config.site:
            raise UserError("this autoencoder does not say which site it reads; give the site")
        if "," in self.config.site:
            raise UserError(f"this autoencoder reads several sites, {self.config.site}; give one of them")
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
        as it was among the top k (`topk.rate_matched_thresholds`); zero when none was measured. `thresholds`
        replaces them, −inf meaning at every token. Raises UserError for a latent that does not exist, and
        for an architecture whose latents cannot be edited so.
        """
        chosen = [int(j) for j in latents]
        for j in chosen:
            if not 0 <= j < self.config.d_sae:
                raise UserError(
                    f"latent {j} does not exist; the autoencoder has latents 0 to {self.config.d_sae - 1}"
                )
        with torch.no_grad():
            probe, bias, measured = self.probe(chosen)
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

    def probe(self, latents: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Directions (n, d_in), biases (n,) and thresholds (n,) such that a latent's value at raw x is
        x · direction + bias where that exceeds the threshold. Raises UserError where no such thing exists.
        """
        chosen = list(latents)
        probe = self.W_enc[:, chosen].T.double()
        bias = self.b_enc[chosen].double()
        if self.config.apply_b_dec_to_input:
            bias = bias - probe @ self.b_dec.double()
        return probe, bias, self.threshold[chosen] if self.threshold is not None else torch.zeros(len(chosen))

    def save_pretrained(self, folder: Path | str) -> None:
        """Write cfg.json and sae_weights.safetensors as SAELens does (see `formats.saelens`)."""
        from unbraid.sae.formats.saelens import save

        save(self, Path(folder))

    def push_to_hub(self, repository: str, subfolder: str = "", *, public: bool = False) -> str:
        """Send what `save_pretrained` writes to owner/name on the Hugging Face Hub; returns where it is.

        A new repository is private unless `public`. Raises what `formats.hub.push` does.
        """
        from unbraid.sae.formats.hub import push

        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push(Path(folder), repository, subfolder, public=public)

    @staticmethod
    def from_pretrained(
        source: Path | str, subfolder: str = "", *, k: int | None = None, revision: str | None = None
    ) -> SAE:
        """Load an autoencoder that unbraid or another tool wrote (see `formats` for which).

        `source` is a folder, a weights file where its format has one a layer, or owner/name on the Hugging
        Face Hub, with `subfolder` in it and a `revision`. `k` is only for TopK files that do not say theirs.
        Raises UserError when there is none of a known kind, and IntegrityError when it is damaged.
        """
        from unbraid.sae.formats.detect import detect
        from unbraid.sae.formats.hub import locate

        return detect(locate(source, subfolder, revision)).load(k)
