"""Kernels of torch in the place of several passes over memory, where transformers computes step by step.

GPT-Neo's own attention, the TinyStories models' too, writes the weights of all pairs of tokens to memory five
times: most of the time that such a model takes on a processor. The GELU of GPT-2 and its kin takes eight
passes.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


def fuse(model: nn.Module) -> None:
    """Have a model compute what it computes with fewer passes; others are left as they are.

    What comes out is the same but for rounding. GPT-Neo's weights of attention are never made, so a caller
    who asks for them gets None, as with the kernels of other families.
    """
    for module in model.modules():
        if type(module).__name__ == "GPTNeoSelfAttention":
            cast(Any, module)._attn = MethodType(_attend, module)
        for name, child in module.named_children():
            if type(child).__name__ == "NewGELUActivation":
                setattr(module, name, nn.GELU(approximate="tanh"))


def _attend(
    layer: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
) -> tuple[Tensor, None]:
    """query (B, H, T, d), key and value (B, H, S, d), mask (B or 1, 1, T, S) to add: result (B, H, T, d).

    As the family has it: not divided by √d, and in float32 whatever the model's dtype is.
    """
    new, all_of_them = query.shape[-2], key.shape[-2]
    # Windows of local layers are in the buffer.
    allowed = layer.bias[:, :, all_of_them - new : all_of_them, :all_of_them]
    mask = allowed
    if attention_mask is not None:
        # Not added up: twice the lowest number would be −∞, and NaN for a token that may see nothing.
        mask = attention_mask.float().masked_fill(~allowed, torch.finfo(torch.float32).min)
    dropout = layer.attn_dropout.p if layer.training else 0.0
    found = scaled_dot_product_attention(
        query.float(), key.float(), value.float(), mask, dropout_p=dropout, scale=1.0
    )
    return found.to(value.dtype), None
