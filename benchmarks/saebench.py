"""SAEBench's own core numbers beside ours, from the same autoencoder and the same tokens.

    pip install --no-deps --target PEER sae-bench==0.6.0 sae-probes collectibles beartype jaxtyping \
        wadler-lindig einops tabulate seaborn matplotlib contourpy cycler kiwisolver fonttools \
        pyparsing pillow
    PYTHONPATH=PEER python benchmarks/saebench.py

SAEBench pins a numpy that unbraid does not run with and asks for packages that its core metrics never use,
so `make bench` does not install it. It reads the model by TransformerLens's bridge. Nothing is timed: where
its definition is ours, the numbers have to agree; docs/EVALUATION.md says why the others do not.
"""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import subjects
import torch

from evaluation import CONTEXT, SEQUENCES, Given, loaded, start, windows_of
from unbraid.evaluation.evaluate import evaluate
from unbraid.model.sites import Site
from unbraid.sae.base import SAE

SAME = {
    "l0": ("sparsity", "l0"),
    "l1": ("sparsity", "l1"),
    "cosine": ("reconstruction_quality", "cossim"),
    "norm_in": ("shrinkage", "l2_norm_in"),
    "norm_out": ("shrinkage", "l2_norm_out"),
    "l2_ratio": ("shrinkage", "l2_ratio"),
    "ce_clean": ("model_performance_preservation", "ce_loss_without_sae"),
    "ce_sae": ("model_performance_preservation", "ce_loss_with_sae"),
    "ce_zero": ("model_performance_preservation", "ce_loss_with_ablation"),
    "recovered_zero": ("model_performance_preservation", "ce_loss_score"),
    "mse": ("reconstruction_quality", "mse"),
    "ev_legacy": ("reconstruction_quality", "explained_variance_legacy"),
    "kl_sae": ("model_behavior_preservation", "kl_div_with_sae"),
    "kl_zero": ("model_behavior_preservation", "kl_div_with_ablation"),
    "bias": ("shrinkage", "relative_reconstruction_bias"),
}


class Theirs:
    """What SAEBench asks of an autoencoder: dense codes, a decoder, where it reads."""

    def __init__(self, sae: SAE, layer: int) -> None:
        self.sae, self.device = sae, torch.device("cpu")
        self.W_enc, self.W_dec, self.b_enc = sae.W_enc, sae.W_dec, sae.b_enc
        self.cfg = SimpleNamespace(
            hook_name=f"blocks.{layer}.hook_resid_post", hook_layer=layer, hook_head_index=None,
            d_sae=sae.config.d_sae,
        )  # fmt: skip

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """(..., d_in) -> (..., d_sae), dense."""
        return self.sae.encode(x.flatten(0, -2)).dense(self.cfg.d_sae).view(*x.shape[:-1], -1)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """(..., d_sae) -> (..., d_in)."""
        return codes @ self.sae.W_dec + self.sae.b_dec


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in {"tokens": 4096, "width": 2048, "k": 32, "layer": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--model", default="tinystories-chat-3m", help="of the shared models")
    given = parser.parse_args()
    from sae_bench.evals.core.eval_config import CoreEvalConfig
    from sae_bench.evals.core.main import run_evals
    from transformer_lens.model_bridge import TransformerBridge

    lm = subjects.real(name=given.model)
    windows, documents = windows_of(lm, given.tokens)
    sae = start(lm, Site(given.layer, "resid_post"), given.width, given.k, windows)
    bridge: Any = TransformerBridge.boot_transformers(
        given.model, hf_model=loaded(given.model), tokenizer=lm.tokenizer, device="cpu"
    )
    batches = -(-len(windows) // SEQUENCES)
    config = CoreEvalConfig(
        given.model, batch_size_prompts=SEQUENCES, n_eval_reconstruction_batches=batches,
        n_eval_sparsity_variance_batches=batches, context_size=CONTEXT, compute_kl=True, compute_ce_loss=True,
        compute_l2_norms=True, compute_sparsity_metrics=True, compute_variance_metrics=True,
        compute_featurewise_density_statistics=True, compute_featurewise_weight_based_metrics=False,
    )  # fmt: skip
    its: Any = Theirs(sae, given.layer)
    store: Any = Given(windows)
    theirs, latents = run_evals(its, store, bridge, config)
    ours = evaluate(sae, lm, documents, context=CONTEXT)
    assert ours.tokens == windows.numel()
    print(f"{windows.numel():,} tokens of {given.model}, {len(windows)} windows, TopK {given.width}")
    print(f"{'metric':32}{'unbraid':>14}{'SAEBench':>14}{'relative difference':>22}")
    for name, (group, key) in SAME.items():
        row(name, ours.metrics[name].value, theirs[group][key])
    row("1 − fvu", 1 - ours.metrics["fvu"].value, theirs["reconstruction_quality"]["explained_variance"])
    density = ours.details.latents.density
    off = (torch.from_numpy(density) - torch.tensor(latents["feature_density"])).abs().max()
    print(f"largest difference of a latent's density: {float(off):.1e}")


def row(name: str, ours: float, theirs: float) -> None:
    """One metric, both values."""
    print(f"{name:32}{ours:14.6g}{theirs:14.6g}{abs(ours - theirs) / abs(ours):22.1e}")


if __name__ == "__main__":
    main()
