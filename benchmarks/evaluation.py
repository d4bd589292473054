"""Evaluation side by side with SAELens's `run_evals`, in alternating turns on the same tokens.

    make bench NAME=evaluation JSON=out.json
    python benchmarks/evaluation.py --rounds 3 --tokens 8192     # a smaller turn

Both measure one TopK autoencoder of `--width` latents on a trained model, in windows of 256 tokens: CE
and KL with the reconstruction and with zeros in place, explained variance in both definitions, MSE,
cosine, norms, bias, L0, L1, densities and the weights' norms and cosines. SAELens is given every one of
these tokens for both of its passes; ours measures what it has beyond that as well (the mean ablation,
nearest rows of the weights, coherence, sparsity of logits, intervals), and tokenises. Only the measuring
is timed, no loading. SAELens has the model as transformers loads it; `--same-attention` times it also on
the model as unbraid loads it, which for GPT-Neo attends in one kernel.

The autoencoder is as training starts, scaled on the model's own activations; speed does not depend on
how good it is. In a turn every contender does the same work, the order changes from turn to turn, the
first turn is not counted, and a ratio is the median over turns of the ratio within a turn. On a busy
machine `--clock processor --threads 1` is steadier.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import subjects
import torch
from turns import CLOCKS, Result, clock, timed, turns

from training import machine, versions
from unbraid.activations.documents import Document
from unbraid.evaluation.evaluate import evaluate
from unbraid.evaluation.references import REFERENCES, untrained
from unbraid.model.load import LanguageModel
from unbraid.model.read import read_sites
from unbraid.model.sites import Site
from unbraid.sae.base import SAE, SAEConfig
from unbraid.sae.registry import build

CONTEXT, SEQUENCES = 256, 16
"""Tokens of a window, and windows in a batch of SAELens."""
BOTH = {
    "l0": ("sparsity", "l0"),
    "mse": ("reconstruction_quality", "mse"),
    "cosine": ("reconstruction_quality", "cossim"),
    "ce_clean": ("model_performance_preservation", "ce_loss_without_sae"),
    "ce_sae": ("model_performance_preservation", "ce_loss_with_sae"),
    "kl_sae": ("model_behavior_preservation", "kl_div_with_sae"),
}
"""Metrics whose values are printed side by side, so that one sees that both did the same work."""


class Given:
    """What `run_evals` asks of an ActivationsStore: the same windows of tokens, again and again."""

    def __init__(self, windows: torch.Tensor) -> None:
        self.windows, self.at = windows, 0
        self.context_size, self.store_batch_size_prompts = windows.shape[1], SEQUENCES

    def get_batch_tokens(self, batch_size: int | None = None) -> torch.Tensor:
        """The next windows."""
        size = batch_size or SEQUENCES
        part = self.windows[self.at : self.at + size]
        self.at += size
        return part

    def reset_input_dataset(self) -> None:
        """Begin again."""
        self.at = 0


def windows_of(lm: LanguageModel, tokens: int) -> tuple[torch.Tensor, list[Document]]:
    """Windows of CONTEXT tokens of stories, (n, CONTEXT), and documents that are tokenised to just these."""
    found: list[list[int]] = []
    documents: list[Document] = []
    for story in subjects.stories():
        ids = lm.tokenizer(story.text, add_special_tokens=False)["input_ids"][:CONTEXT]
        if len(ids) < CONTEXT:
            continue
        document = Document.of_text(lm.tokenizer.decode(ids))
        again = lm.tokenizer(document.text)["input_ids"]
        if again != ids or any(i in lm.tokenizer.all_special_ids for i in ids):
            continue
        found.append(ids)
        documents.append(document)
        if len(found) * CONTEXT >= tokens:
            break
    return torch.tensor(found), documents


def subject(given: argparse.Namespace) -> tuple[LanguageModel, SAE]:
    """The model, and an autoencoder of a site as training starts."""
    lm, site = subjects.real(name=given.model), Site(given.layer, "resid_post")
    windows, _ = windows_of(lm, 8 * CONTEXT)
    x = read_sites(lm, windows, torch.ones_like(windows), [site])[site].flatten(0, 1).float()
    config = SAEConfig(
        "topk", lm.d_in, given.width, given.k, site=str(site), model_name=lm.name, model_id=lm.id
    )
    return lm, untrained(build(config), x, 0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = {"rounds": 6, "threads": 2, "tokens": 16384, "width": 8192, "k": 32, "layer": 4}
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--model", default="tinystories-chat-3m", help="of the shared models")
    parser.add_argument("--full", type=int, default=0, help="tokens of one whole evaluation, timed alone")
    parser.add_argument(
        "--memory", type=int, nargs="+", help="tokens of evaluations in processes of their own"
    )
    parser.add_argument(
        "--same-attention", action="store_true", help="SAELens on the model as unbraid loads it, too"
    )
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--out", type=Path, help="file for the result as JSON")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    clock[0] = CLOCKS[given.clock]
    lm, sae = subject(given)
    windows, documents = windows_of(lm, given.tokens)
    found, last = Result(), {}
    if given.memory:
        memory(found, given)
    if given.full:
        full(found, lm, sae, given.full)
    if given.rounds:
        from sae_lens.evals import get_eval_everything_config, run_evals
        from sae_lens.training.activation_scaler import ActivationScaler

        sites = {"saelens": peer(lm, sae, given.layer, loaded(given.model))}
        if given.same_attention:
            sites["saelens_our_attention"] = peer(lm, sae, given.layer, subjects.another(lm).model)
        batches = -(-len(windows) // SEQUENCES)
        config = get_eval_everything_config(SEQUENCES, batches, batches)

        def saelens(name: str) -> None:
            store: Any = Given(windows)
            theirs, model = sites[name]
            last[name] = run_evals(theirs, store, model, ActivationScaler(), config)

        def ours() -> None:
            last["unbraid"] = evaluate(sae, lm, documents, context=CONTEXT)

        jobs = {"unbraid": lambda: timed(ours)}
        jobs |= {name: lambda name=name: timed(lambda: saelens(name)) for name in sites}
        taken = turns(jobs, given.rounds)
        found.rates("evaluate", windows.numel(), taken)
        for name in sites:
            found.ratio(f"evaluate_vs_{name}", taken[name], taken["unbraid"])
        for name, (group, theirs_name) in BOTH.items():
            found.row(f"{name}_unbraid", last["unbraid"].metrics[name].value, "value")
            found.row(f"{name}_saelens", last["saelens"][0][group][theirs_name], "value")
    if given.out:
        result = {
            "work": {name: value for name, value in vars(given).items() if name != "out"},
            "machine": machine(),
            "versions": versions(sys.executable),
            "rows": found.rows,
            "ratios": found.ratios,
        }
        given.out.write_text(json.dumps(result, indent=2) + "\n")


def loaded(name: str) -> Any:
    """The model as transformers loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(subjects.SHARED / "models" / name).eval()


def peer(lm: LanguageModel, sae: SAE, layer: int, model: Any) -> tuple[Any, Any]:
    """The same autoencoder as SAELens loads it, its wrapper of a model hooked at a layer.

    The wrapper leaves hooks on the model, which ours must not run through.
    """
    import sae_lens
    from sae_lens.load_model import HookedProxyLM

    with tempfile.TemporaryDirectory() as folder:
        sae.save_pretrained(folder)
        theirs = sae_lens.SAE.load_from_disk(folder)
    path = next(name for name, module in lm.model.named_modules() if module is lm.layout.layers[layer])
    theirs.cfg.metadata.hook_name = path
    return theirs, HookedProxyLM(model, lm.tokenizer, hook_names=[path])


def full(found: Result, lm: LanguageModel, sae: SAE, tokens: int) -> None:
    """One whole evaluation, by itself and beside all references as `unbraid evaluate` has it."""
    for beside, references in (("", ()), ("_with_references", REFERENCES)):
        seconds = timed(
            lambda r=references: evaluate(sae, lm, subjects.stories(), tokens=tokens, references=r)
        )
        found.row(f"full{beside}_seconds", seconds, "s")


def memory(found: Result, given: argparse.Namespace) -> None:
    """Resident memory at the peak of evaluations of growing size, beyond what the process held before."""
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as each_in_its_own:
        for tokens in given.memory:
            before, peak = each_in_its_own.submit(held, given, tokens).result()
            found.row(f"memory_{tokens}_before", before, "MB")
            found.row(f"memory_{tokens}_added", peak - before, "MB")


def held(given: argparse.Namespace, tokens: int) -> tuple[float, float]:
    """Resident memory, MB, before an evaluation and at its peak, in a process of its own."""
    torch.set_num_threads(given.threads)
    lm, sae = subject(given)
    documents = subjects.stories("train")
    before = peak()
    evaluate(sae, lm, documents, tokens=tokens)
    return before, peak()


def peak() -> float:
    """This process's resident memory at its highest, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
