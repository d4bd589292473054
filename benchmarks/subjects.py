"""Models and texts that `capture.py` reads, and the batches that it makes of them."""

from __future__ import annotations

import os
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from unbraid.activations.documents import Document, read_documents
from unbraid.activations.plan import Piece, Plan
from unbraid.model.load import LanguageModel, load_model, wrap_model

CONTEXT, BATCH_TOKENS = 256, 4096
"""Tokens that a model reads at once, and in a batch."""
SHARED = Path(os.environ.get("UNBRAID_SHARED") or Path(__file__).resolve().parents[2] / "shared")
Batches = list[tuple[torch.Tensor, torch.Tensor]]
"""Token ids and masks, both (B, T)."""


def random_llama(tokenizer_of: str, dtype: str = "float32", **shape: int) -> LanguageModel:
    """A Llama with random weights and a real model's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / tokenizer_of)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).to(getattr(torch, dtype))
    name = f"llama-{shape['num_hidden_layers']}x{shape['hidden_size']}"
    return wrap_model(model, tokenizer, name=name, id=f"random {dtype}")


def big(hidden: int, layers: int, dtype: str = "float32") -> LanguageModel:
    """A Llama with heads of 64; with 768 and 12 of GPT-2 small's size, 7.1 million weights a layer."""
    return random_llama(
        "tinystories-chat-3m", dtype, hidden_size=hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, intermediate_size=hidden * 8 // 3, max_position_embeddings=1024,
    )  # fmt: skip


def tiny() -> LanguageModel:
    """One layer of 8: all but nothing to compute."""
    return random_llama(
        "stories260k", hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16
    )


def real(dtype: str = "float32", name: str = "tinystories-chat-3m") -> LanguageModel:
    """A trained model."""
    return load_model(SHARED / "models" / name, dtype=dtype)


def int8(lm: LanguageModel) -> LanguageModel | None:
    """The model with int8 weights in its layers and their inputs rounded to int8 row by row, under the id of
    the exact one, on which its autoencoders are measured; None where torchao is not installed."""
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError:
        print("int8 model: left out, torchao is not installed")
        return None
    model = deepcopy(lm.model)
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    quantize_(layers, Int8DynamicActivationInt8WeightConfig())
    return wrap_model(model, lm.tokenizer, name=f"{lm.name}-int8", id=lm.id)


def another(lm: LanguageModel) -> LanguageModel:
    """Another model around the same weights, for a tool that leaves hooks behind."""
    model = deepcopy(lm.model, {id(p): p for p in lm.model.parameters()})
    return wrap_model(model, lm.tokenizer, name=lm.name, id=lm.id)


def wiki() -> list[Document]:
    """Paragraphs of WikiText-2."""
    return list(read_documents(SHARED / "data" / "wikitext-2" / "valid.txt"))


def stories(name: str = "valid") -> list[Document]:
    """Stories."""
    return list(read_documents(SHARED / "data" / "tinystories" / f"{name}.txt"))


def planned(lm: LanguageModel, documents: list[Document], tokens: int) -> list[list[Piece]]:
    """The batches that a capture of these tokens makes."""
    plan = Plan(lm, documents, CONTEXT, BATCH_TOKENS, "all", tokens)
    return [batch for group in plan for batch in group.batches]


def padded(work: list[list[Piece]], pad: int) -> Batches:
    """Batches padded on the right, as `capture` does it."""
    found: Batches = []
    for batch in work:
        ids = torch.full((len(batch), max(len(piece.window.input_ids) for piece in batch)), pad)
        mask = torch.zeros_like(ids)
        for row, piece in enumerate(batch):
            length = len(piece.window.input_ids)
            ids[row, :length] = torch.tensor(piece.window.input_ids)
            mask[row, :length] = 1
        found.append((ids, mask))
    return found


def packed(work: list[list[Piece]]) -> Batches:
    """The same windows in rows of one context, with the number of each token's window in its row for a mask:
    the longest first, each into the first row that has room."""
    rows: list[list[tuple[int, ...]]] = []
    for window in sorted((p.window.input_ids for batch in work for p in batch), key=len, reverse=True):
        room = (row for row in rows if sum(map(len, row)) + len(window) <= CONTEXT)
        if (row := next(room, None)) is None:
            rows.append([window])
        else:
            row.append(window)
    found: Batches = []
    for start in range(0, len(rows), BATCH_TOKENS // CONTEXT):
        chosen = rows[start : start + BATCH_TOKENS // CONTEXT]
        ids, numbers = torch.zeros(2, len(chosen), CONTEXT, dtype=torch.long)
        for i, row in enumerate(chosen):
            at = 0
            for number, window in enumerate(row, 1):
                ids[i, at : at + len(window)] = torch.tensor(window)
                numbers[i, at : at + len(window)] = number
                at += len(window)
        found.append((ids, numbers))
    return found


def cut(lm: LanguageModel, layer: int) -> Any:
    """The model's own stack up to a layer, the same weights, without a hook, a final norm or a head."""
    stack = lm.layout.decoder
    bare = deepcopy(stack, {id(p): p for p in stack.parameters()})
    for name, child in stack.named_children():
        if child is lm.layout.layers:
            setattr(bare, name, getattr(bare, name)[: layer + 1])
        if child is lm.layout.final_norm:
            setattr(bare, name, torch.nn.Identity())
    bare.config.num_hidden_layers = layer + 1
    return bare
