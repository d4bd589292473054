"""SAELens's side of `capture.py`: its ActivationsStore over a model, and its Arrow cache.

Everything here calls SAELens's own code; what would fetch from the Hub is built from what is there.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import torch
from datasets import Array2D, Dataset, Features, Sequence, Value
from sae_lens.cache_activations_runner import CacheActivationsRunner
from sae_lens.load_model import HookedProxyLM
from sae_lens.training.activations_store import ActivationsStore
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_llama_weights

from unbraid.model.load import LanguageModel

SEQUENCES = 16
"""Sequences in a batch of its model."""


def proxy(lm: LanguageModel, layer: int) -> tuple[Any, str]:
    """Its wrapper of a Hugging Face model, hooked at one layer only, and the name of its output."""
    return HookedProxyLM(
        lm.model, lm.tokenizer, hook_names=[f"model.layers.{layer}"]
    ), f"model.layers.{layer}"


def hooked_transformer(lm: LanguageModel, layer: int) -> tuple[Any, str]:
    """The same Llama as a HookedTransformer, SAELens's default, up to the layer that is wanted."""
    c = lm.config
    config = HookedTransformerConfig(
        d_model=c.hidden_size, d_head=c.hidden_size // c.num_attention_heads, n_heads=c.num_attention_heads,
        d_mlp=c.intermediate_size, n_layers=c.num_hidden_layers, n_ctx=c.max_position_embeddings,
        eps=c.rms_norm_eps, d_vocab=c.vocab_size, act_fn="silu", normalization_type="RMS", final_rms=True,
        positional_embedding_type="rotary", rotary_adjacent_pairs=False, gated_mlp=True, device="cpu",
        rotary_dim=c.hidden_size // c.num_attention_heads, rotary_base=int(c.rope_parameters["rope_theta"]),
        tokenizer_prepends_bos=False,
    )  # fmt: skip
    logging.disable(logging.WARNING)
    model = HookedTransformer(config, tokenizer=lm.tokenizer, move_to_device=False)
    state = convert_llama_weights(lm.model, config)
    missing = model.load_state_dict(state, strict=False).missing_keys
    logging.disable(logging.NOTSET)
    lost = [name for name in missing if "mask" not in name and "rotary" not in name and "IGNORE" not in name]
    if lost:
        raise SystemExit(f"the HookedTransformer lacks {lost}")
    model.requires_grad_(False)
    return model, f"blocks.{layer}.hook_resid_post"


def live(model: Any, hook: str, texts: list[str], d: int, context: int, autocast: bool = False) -> Any:
    """An ActivationsStore that reads `texts` through a model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ActivationsStore(
            model=model, dataset=Dataset.from_dict({"text": texts}), streaming=False, hook_name=hook,
            hook_head_index=None, context_size=context, d_in=d, n_batches_in_buffer=20,
            total_training_tokens=10**9, store_batch_size_prompts=SEQUENCES, train_batch_size_tokens=4096,
            prepend_bos=False, normalize_activations="none", device=torch.device("cpu"), dtype="float32",
            autocast_lm=autocast, sequence_separator_token=None,
        )  # fmt: skip


def cache_writer(hook: str, d: int, context: int, sequences: int) -> CacheActivationsRunner:
    """Its runner, without the model: what makes shards of `sequences` sequences and joins them."""
    runner = CacheActivationsRunner.__new__(CacheActivationsRunner)
    runner.context_size = context
    runner.cfg = SimpleNamespace(hook_name=hook, n_seq_in_buffer=sequences, d_in=d, dtype="float16")  # type: ignore[assignment]
    runner.features = Features({
        hook: Array2D(shape=(context, d), dtype="float16"),
        "token_ids": Sequence(Value(dtype="int32"), length=context),
    })  # fmt: skip
    return runner


def write_cache(folder: Path, x: torch.Tensor, hook: str, context: int, sequences: int) -> None:
    """Write rows x (n, d) as `CacheActivationsRunner.run` does."""
    runner = cache_writer(hook, x.shape[1], context, sequences)
    shards, rows = folder / ".tmp_shards", sequences * context
    ids = torch.zeros(rows, dtype=torch.int64)
    shards.mkdir(parents=True)
    for number, part in enumerate(x.split(rows)):
        shard = runner._create_shard((part.half(), ids))  # as its store gives them
        shard.save_to_disk(f"{shards}/shard_{number:05d}", num_shards=1)
    CacheActivationsRunner._consolidate_shards(shards, folder, copy_files=False)


def read_cache(folder: Path, hook: str, d: int, context: int, buffer: int) -> Iterator[torch.Tensor]:
    """Its mixed batches of 4096 rows in float32 from a cache; `buffer` in contexts."""
    store = ActivationsStore(
        model=None, dataset=None, streaming=False, hook_name=hook, hook_head_index=None, context_size=context,
        d_in=d, n_batches_in_buffer=buffer, total_training_tokens=10**9, store_batch_size_prompts=32,
        train_batch_size_tokens=4096, prepend_bos=False, normalize_activations="none",
        device=torch.device("cpu"), dtype="float32", cached_activations_path=str(folder),
    )  # fmt: skip
    warnings.filterwarnings("ignore", "All samples in the training dataset")  # it begins again, as it should
    return iter(store)
