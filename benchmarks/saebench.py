"""SAEBench's own core numbers beside ours, from the same autoencoder and the same tokens.

    pip install --no-deps --target PEER sae-bench==0.6.0 sae-probes collectibles beartype jaxtyping \
        wadler-lindig einops tabulate seaborn matplotlib contourpy cycler kiwisolver fonttools \
        pyparsing pillow
    PYTHONPATH=PEER python benchmarks/saebench.py
    PYTHONPATH=PEER python benchmarks/saebench.py --suite scr

SAEBench pins a numpy that unbraid does not run with and asks for packages that its core metrics never use,
so `make bench` does not install it. It reads the model by TransformerLens's bridge. Nothing is timed: where
its definition is ours, the numbers have to agree; docs/EVALUATION.md says why the others do not.

`--suite scr` gives SAEBench's own code for spurious correlation removal the probes, documents and tokens of
ours, on conversations of the practice assistant; its data sets, which it would download, are not needed then.
"""

from __future__ import annotations

import argparse
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from evaluation import CONTEXT, SEQUENCES, Given, loaded, subject, windows_of
from unbraid.activations.documents import Document
from unbraid.evaluation.evaluate import evaluate
from unbraid.evaluation.labelled import Reading, read_tokens, split_documents
from unbraid.evaluation.scr import GAP, Pair, biases, effects, pairs
from unbraid.evaluation.tpp import Basis, Probe, fit_probe, strongest
from unbraid.model.load import load_model
from unbraid.model.sites import Site
from unbraid.practice.assistant import folder
from unbraid.practice.corpus import conversations
from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.registry import build

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
    parser.add_argument("--suite", choices=["core", "scr"], default="core")
    given = parser.parse_args()
    if given.suite == "scr":
        spurious()
        return
    from sae_bench.evals.core.eval_config import CoreEvalConfig
    from sae_bench.evals.core.main import run_evals
    from transformer_lens.model_bridge import TransformerBridge

    lm, sae = subject(given)
    windows, documents = windows_of(lm, given.tokens)
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


LENGTH = 24
"""Tokens of a conversation that are read, as many of each, so that SAEBench pads none."""
TOP = [2, 10, 50]
FIRST, SECOND, AGREEING = "professor / nurse", "male / female", "male_professor / female_nurse"
"""SAEBench's names for the labels, whatever they are, and for documents where they agree."""
OTHERS = {FIRST: "nurse_data_only", SECOND: "female_data_only", AGREEING: "female_nurse_data_only"}


def spurious() -> None:
    """SCR of one pair of labels after another by both, from the same documents, probes and autoencoder."""
    from sae_bench.evals.scr_and_tpp.main import (
        get_all_node_effects_for_one_sae,
        get_probe_test_accuracy,
        get_scr_plotting_dict,
        perform_feature_ablations,
    )
    from sae_bench.evals.sparse_probing.probe_training import Probe as TheirProbe

    lm, site = load_model(folder()), Site(2, "resid_post")
    documents = [
        Document.of_messages(list(c.messages), labels=c.labels())
        for c in islice(conversations("fit", seed=0, topic="refund"), 600)
    ]
    tokens = np.zeros((len(documents), LENGTH, lm.layout.width(site)), dtype=np.float32)
    for batch in read_tokens(lm, documents, Reading(site)):
        for document in np.unique(batch.document):
            tokens[document, :LENGTH] = batch.x[batch.document == document][:LENGTH].numpy()
    assert (tokens[:, LENGTH - 1] != 0).any(axis=1).all()
    sae = trained_on(torch.from_numpy(tokens).flatten(0, 1), site)
    codes = sae.encode_dense(torch.from_numpy(tokens).flatten(0, 1))
    latents = codes.view(len(documents), LENGTH, -1).double().mean(dim=1).numpy()
    raw = tokens.astype(np.float64).mean(axis=1)
    basis = Basis(latents, sae.W_dec.double().numpy(), False)
    its: Any = Theirs(sae, 2)
    x = torch.from_numpy(tokens)
    print(f"{'pair, direction, n':52}{'unbraid':>10}{'SAEBench':>10}")
    for pair in pairs(documents, split_documents(documents, 0), 0):
        probes = [fit_probe(raw, task) for task in pair.labels]
        asked = biases(raw, pair, probes)
        readers = {FIRST: probes[0], SECOND: probes[1], AGREEING: asked[0].probe}
        known = {name: as_theirs(TheirProbe, probe, x.shape[2]) for name, probe in readers.items()}
        names, test = list(readers), by_name(x, pair, "test")
        moved = get_all_node_effects_for_one_sae(its, known, names, True, by_name(x, pair, "select"), 64)
        after = perform_feature_ablations(known, its, 64, test, moved, TOP, names, 500, perform_scr=True)
        means = {name: its_tokens.mean(dim=1) for name, its_tokens in test.items()}
        before = get_probe_test_accuracy(known, names, means, 500, True)
        theirs = get_scr_plotting_dict(after, before)
        for direction, bias in enumerate(asked, 1):
            if bias.oracle - bias.before < GAP:
                continue
            for n in TOP:
                chosen = strongest(effects(basis, bias.removed, bias.reader), n)
                key = f"scr_dir{direction}_threshold_{n}"
                ours = bias.score(raw, basis, chosen).value
                print(f"{pair.name + ', ' + key:52}{ours:10.4f}{theirs[key]:10.4f}")


def trained_on(x: torch.Tensor, site: Site) -> SAE:
    """A TopK autoencoder of 512 latents after 300 plain steps on x (n, d_in)."""
    sae = build(SAEConfig("topk", x.shape[1], 512, 8, site=str(site)))
    generator = torch.Generator().manual_seed(0)
    sae.initialise(x, x, generator)
    optimiser = torch.optim.Adam(sae.parameters(), 1e-3)
    with torch.enable_grad():
        for _ in range(300):
            batch = x[torch.randint(len(x), (1024,), generator=generator)]
            optimiser.zero_grad()
            (sae(batch).x_hat - batch).square().sum(dim=1).mean().backward()
            optimiser.step()
    return sae.requires_grad_(False)


def by_name(x: torch.Tensor, pair: Pair, split: str) -> dict[str, torch.Tensor]:
    """Activations (n, length, d_in) of a split's documents under SAEBench's names."""
    rows = pair.labels[0].rows[split]
    a, b = (task.positive[split] for task in pair.labels)
    yes = {FIRST: a, SECOND: b, AGREEING: a & b}
    no = {FIRST: ~a, SECOND: ~b, AGREEING: ~a & ~b}
    return {name: x[rows[mask]] for name, mask in yes.items()} | {
        OTHERS[name]: x[rows[mask]] for name, mask in no.items()
    }


def as_theirs(kind: Any, probe: Probe, d_in: int) -> Any:
    """The same probe as SAEBench's class."""
    found = kind(d_in, torch.float32)
    found.net.weight.copy_(torch.from_numpy(probe.weight)[None])
    found.net.bias.fill_(probe.bias)
    return found


def row(name: str, ours: float, theirs: float) -> None:
    """One metric, both values."""
    print(f"{name:32}{ours:14.6g}{theirs:14.6g}{abs(ours - theirs) / abs(ours):22.1e}")


if __name__ == "__main__":
    main()
