"""The tools of `index.py`, each run by its own interpreter: `python index_workers.py TOOL FOLDER [LATENTS]`.

FOLDER holds settings.json, tokens.npy (n, context), texts.jsonl that are tokenised to just these, and the
autoencoder in `sae`, of which SAEDashboard takes the first LATENTS, or all.  What a tool makes goes to
FOLDER/TOOL.  The answer is one line of JSON on standard output: seconds from loaded weights to written pages,
the most memory held, and bytes on the disk.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch


def unbraid(s: dict[str, Any], folder: Path, out: Path) -> Callable[[], object]:
    """All of `build_index`, which also tokenises."""
    from unbraid.activations.documents import Document
    from unbraid.features import index
    from unbraid.model.load import load_model
    from unbraid.sae.base import SAE

    lm, sae = load_model(s["model"]), SAE.from_pretrained(folder / "sae")
    lines = (folder / "texts.jsonl").open()
    documents = (Document.of_text(json.loads(line)) for line in lines)
    config = index.IndexConfig(context=s["context"], tokens=s.get("tokens"))
    return lambda: index.build_index(sae, lm, documents, config, out / "index", sae_id="benchmark")


def saedashboard(s: dict[str, Any], folder: Path, out: Path) -> Callable[[], object]:
    """SaeVisRunner with its defaults, and its page of all features."""
    from sae_dashboard.data_writing_fns import save_feature_centric_vis
    from sae_dashboard.sae_vis_data import SaeVisConfig
    from sae_dashboard.sae_vis_runner import SaeVisRunner
    from sae_lens import SAE, HookedSAETransformer
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights
    from transformers import AutoModelForCausalLM, AutoTokenizer

    own = AutoModelForCausalLM.from_pretrained(s["model"])
    tokenizer, c = AutoTokenizer.from_pretrained(s["model"]), own.config
    config = HookedTransformerConfig(
        d_model=c.hidden_size, d_head=c.hidden_size // c.num_attention_heads, n_heads=c.num_attention_heads,
        n_key_value_heads=c.num_key_value_heads, d_mlp=c.intermediate_size, n_layers=c.num_hidden_layers,
        n_ctx=c.max_position_embeddings, eps=c.rms_norm_eps, d_vocab=c.vocab_size, act_fn="silu",
        normalization_type="RMS", final_rms=True, positional_embedding_type="rotary", gated_mlp=True,
        rotary_adjacent_pairs=False, rotary_dim=c.hidden_size // c.num_attention_heads,
        rotary_base=int(c.rope_theta), device="cpu", tokenizer_prepends_bos=True,
    )  # fmt: skip
    model = HookedSAETransformer(config, tokenizer=tokenizer, move_to_device=False)
    model.load_state_dict(convert_llama_weights(own, config), strict=False)
    model.requires_grad_(False)
    tokens = torch.from_numpy(np.load(folder / "tokens.npy"))
    hook = f"blocks.{s['layer']}.hook_resid_post"
    sae = SAE.load_from_disk(folder / "sae")
    sae.cfg.metadata.hook_name = hook
    sae.cfg.rescale_acts_by_decoder_norm = True  # which SAEDashboard insists on; the rows have unit length
    with torch.no_grad():
        theirs = model(tokens[:2], return_type="logits")
        off = float((theirs - own(tokens[:2]).logits).abs().max())
    if off > 1e-3:
        raise SystemExit(f"the HookedTransformer's logits are {off} off")
    del own
    asked = SaeVisConfig(hook_point=hook, features=list(range(s.get("latents", s["width"]))), device="cpu")

    def work() -> None:
        data = SaeVisRunner(asked).run(encoder=sae, model=model, tokens=tokens)
        save_feature_centric_vis(data, out / "pages.html")

    return work


TOOLS = {"unbraid": unbraid, "saedashboard": saedashboard}


def peak_mb() -> float:
    """The most memory this process has held. Not getrusage's: that begins with what the parent held."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def main() -> None:
    tool, folder = sys.argv[1], Path(sys.argv[2])
    settings = json.loads((folder / "settings.json").read_text())
    if len(sys.argv) > 3:
        settings["latents"] = int(sys.argv[3])
    torch.set_num_threads(settings["threads"])
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a tool prints is no answer
    out = folder / tool
    out.mkdir()
    work = TOOLS[tool](settings, folder, out)
    loaded, began, used = peak_mb(), time.perf_counter(), time.process_time()
    work()
    seconds, processor = time.perf_counter() - began, time.process_time() - used
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    record = {"seconds": seconds, "processor": processor, "peak_mb": peak_mb(), "loaded_mb": loaded}
    print(json.dumps({**record, "mb": size / 1e6}), file=answers, flush=True)
    answers.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
