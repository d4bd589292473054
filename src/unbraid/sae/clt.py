"""Cross-layer transcoder: latents read one layer and write to it and all layers after it.

    f_l = JumpReLU(x_l W_enc_l + b_enc_l),   ŷ_m = Σ_{l ≤ m} f_l W_dec_{l→m} + b_dec_m
    loss = Σ_m ‖y_m − ŷ_m‖² + λ Σ_j tanh(c f_j ‖W_dec[j]‖) + μ Σ_{j dead} ReLU(θ_j − p_j) ‖W_dec[j]‖

x_l: (n, d) before the MLP of layer l, y_m: (n, d_out) after that of layer m; both stand side by side,
x: (n, L·d), y: (n, L·d_out). Latents come in L groups of d_sae / L. W_enc: (d, d_sae) holds each latent's
own layer alone. W_dec: (d_sae (L + 1) / 2, d_out) holds for one layer m after the other what the latents that
may write there do, those of layers 0 to m: since these are the first (m + 1) d_sae / L, a latent's row in a
layer's part is its number, and no part has room for what would be 0. ‖W_dec[j]‖ is over all layers. Ameisen
et al. 2025, "Circuit tracing: revealing computational graphs in language models".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unbraid.manifest.errors import UserError
from unbraid.sae.base import SAEConfig
from unbraid.sae.codes import CHUNK_ROWS, SparseCodes, decode, selected
from unbraid.sae.elementwise import Entries, above
from unbraid.sae.jumprelu import JumpReLUOptions, JumpReLUSAE
from unbraid.sae.options import EDGE, Positive
from unbraid.sae.scaling import Scaling
from unbraid.sae.transcoder import linear_map


@dataclass(frozen=True)
class CLTOptions(JumpReLUOptions):
    """JumpReLU's options, with the sparsity term of the paper."""

    __pydantic_config__ = EDGE

    penalty: Literal["step", "tanh"] = "tanh"
    """The sparsity term S."""
    bandwidth: Positive = 0.3
    """ε, wider than JumpReLU's: what reaches the encoder through a narrow window is rare and large."""
    through_encoder: bool = True
    """Whether the window's gradient also reaches pre-activations, and so encoder and biases."""


class CrossLayerTranscoder(JumpReLUSAE):
    """A transcoder for all layers together."""

    Options = CLTOptions
    reads = "pairs"

    def __init__(self, config: SAEConfig) -> None:
        super().__init__(config)
        self.layers = len(config.blocks)
        if self.layers < 2 or len(set(config.blocks)) > 1 or sum(config.blocks) != config.d_in:
            raise UserError(
                "a cross-layer transcoder reads two layers or more of the same size; their blocks are "
                f"{', '.join(map(str, config.blocks)) or 'missing'} in an input of {config.d_in}"
            )
        if config.d_sae % self.layers or self.b_dec.numel() % self.layers:
            raise UserError(
                f"a cross-layer transcoder over {self.layers} layers needs a width that they divide, not "
                f"{config.d_sae}; change --width"
            )
        if self.options.free_rows:
            raise UserError("a cross-layer transcoder has no free rows; leave out --set free_rows")
        each = config.d_sae // self.layers
        self.sizes = [(layer + 1) * each for layer in range(self.layers)]
        self.W_enc = nn.Parameter(torch.zeros(config.blocks[0], config.d_sae))
        self.W_dec = nn.Parameter(torch.zeros(sum(self.sizes), self.b_dec.numel() // self.layers))
        layer_of = torch.arange(self.layers).repeat_interleave(each)
        self.register_buffer("layer_of", layer_of, persistent=False)
        latent_of = torch.cat([torch.arange(size) for size in self.sizes])
        self.register_buffer("latent_of", latent_of, persistent=False)

    layer_of: Tensor
    """The layer that each latent reads, (d_sae,)."""
    latent_of: Tensor
    """The latent that each row of W_dec belongs to, (d_sae (L + 1) / 2,)."""

    def decoders(self) -> tuple[Tensor, ...]:
        """For each layer m what is written there, ((m + 1) d_sae / L, d_out): views into W_dec."""
        return self.W_dec.split(self.sizes)

    def of_latents(self, rows: Tensor) -> Tensor:
        """Sums of what W_dec's rows have, (d_sae (L + 1) / 2,), over the rows of each latent, (d_sae,)."""
        return rows.new_zeros(self.config.d_sae).index_add(0, self.latent_of, rows)

    def places(self, parameter: str, latents: Tensor) -> Tensor:
        """In W_dec a latent has a row for each layer that it writes to."""
        if parameter != "W_dec":
            return latents
        return torch.isin(self.latent_of, latents).nonzero().squeeze(1)

    def row_norms(self) -> Tensor:
        """‖W_dec[j]‖ over all layers, (d_sae,)."""
        return self.of_latents(self.W_dec.square().sum(dim=1)).clamp(min=1e-24).sqrt()

    def decode(self, codes: SparseCodes) -> Tensor:
        """Reconstructions of all layers, (n, L·d_out)."""
        return self.decode_entries(Entries(codes.values, codes.indices), codes.values)

    def decode_entries(self, entries: Entries, codes: Tensor) -> Tensor:
        """The same from the codes of entries, in the shape of `entries.pre`."""
        parts: list[Tensor] = []
        for W in self.decoders():
            if entries.latents is None:
                parts.append(codes[:, : len(W)] @ W)
            else:  # latents of later layers become padding; columns that hold no others are left out
                here = entries.latents < len(W)
                some = here.any(dim=0)
                latents, values, here = entries.latents[:, some], codes[:, some], here[:, some]
                parts.append(decode(SparseCodes(latents * here, values * here), W))
        return torch.cat(parts, dim=1) + self.b_dec

    def centred(self, x: Tensor) -> Tensor:
        """x as it is: the decoder's bias belongs to other sites."""
        return x.to(self.b_dec.dtype)

    def _groups(self) -> list[tuple[Tensor, Tensor]]:
        """Encoder (d, d_sae / L) and bias of each layer."""
        each = self.config.d_sae // self.layers
        return list(zip(self.W_enc.split(each, dim=1), self.b_enc.split(each), strict=True))

    def pre_activations(self, x: Tensor) -> Tensor:
        """Every latent's pre-activation at its own layer, (n, d_sae)."""
        parts = self.centred(x).chunk(self.layers, dim=1)
        found = [torch.addmm(b, part, W) for part, (W, b) in zip(parts, self._groups(), strict=True)]
        return torch.cat(found, dim=1)

    def _above(self, x: Tensor, edge: Tensor) -> Entries:
        """Layer by layer, so that each sparse product knows of its layer's latents alone."""
        each = self.config.d_sae // self.layers
        pre: list[Tensor] = []
        latents: list[Tensor] = []
        real: list[Tensor] = []
        for layer, (part, (W, b)) in enumerate(
            zip(self.centred(x).chunk(self.layers, dim=1), self._groups(), strict=True)
        ):
            with torch.no_grad():
                chunks = (torch.addmm(b, rows, W) for rows in part.split(CHUNK_ROWS))
                own = edge[layer * each : (layer + 1) * each]
                index, value, is_real = above(chunks, own)
            pre.append(selected(part, W, b, index, value))
            latents.append(index + layer * each)
            real.append(is_real)
        return Entries(torch.cat(pre, dim=1), torch.cat(latents, dim=1), torch.cat(real, dim=1))

    @torch.no_grad()
    def constrain_gradient(self) -> None:
        """As every autoencoder, with all rows of a latent as one."""
        grad = self.W_dec.grad
        assert grad is not None
        grad -= self.of_latents((grad * self.W_dec).sum(dim=1))[self.latent_of, None] * self.W_dec

    @torch.no_grad()
    def constrain(self) -> None:
        """All rows of a latent together of unit length, thresholds of 0 or more."""
        self.W_dec /= self.row_norms()[self.latent_of, None]
        self.threshold.clamp_(min=0)

    def reading_directions(self, x: Tensor, target: Tensor) -> Tensor:
        """For each latent the direction at its layer that predicts what it writes, (d, d_sae)."""
        each, d_out = self.sizes[0], self.W_dec.shape[1]
        found: list[Tensor] = []
        for layer, part in enumerate(x.chunk(self.layers, dim=1)):
            own = slice(layer * each, (layer + 1) * each)
            rows = torch.cat([W[own] for W in self.decoders()[layer:]], dim=1)
            found.append(linear_map(part, target[:, layer * d_out :]) @ rows.T)
        return torch.cat(found, dim=1)

    @torch.no_grad()
    def fold(self, source: Scaling, target: Scaling) -> None:
        """As every autoencoder, each latent with its own layer's scaling."""
        mean = (source.mean * source.scale).view(self.layers, -1)[self.layer_of]  # (d_sae, d)
        self.b_enc.sub_((mean * self.W_enc.T).sum(dim=1)).div_(target.unit)
        self.W_enc.mul_(source.scale.view(self.layers, -1)[self.layer_of].T / target.unit)
        for W, scale in zip(self.decoders(), target.scale.view(self.layers, -1), strict=True):
            W.mul_(target.unit / scale)
        self.b_dec.div_(target.scale).add_(target.mean)
        self.threshold.div_(target.unit)

    @torch.no_grad()
    def revive(self, latents: Tensor, x: Tensor, target: Tensor) -> None:
        """As every autoencoder, with what each latent may read and write."""
        layers = torch.arange(self.layers, device=latents.device)
        allowed = self.layer_of[latents, None] <= layers  # (m, L)
        write = (target - self.b_dec).view(len(latents), self.layers, -1) * allowed[:, :, None]
        write = F.normalize(write.flatten(1), dim=1).view_as(write)
        for layer, W in enumerate(self.decoders()):
            here = allowed[:, layer]
            W[latents[here]] = write[here, layer]
        read = x.view(len(x), self.layers, -1)[torch.arange(len(x)), self.layer_of[latents]]
        self.W_enc[:, latents] = F.normalize(read, dim=1).T * 0.2 * self.W_enc.norm(dim=0).mean()
        self.b_enc[latents] = 0.0

    def probe(self, latents: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Raises UserError: an Edit reads and writes one site."""
        raise UserError(
            "a cross-layer transcoder's latent reads one site and writes several others but an edit acts at "
            "one, so it cannot be edited; train an autoencoder on the site to be changed"
        )
