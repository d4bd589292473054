"""Fixtures that several rooms' tests use: the shared real models and data, and two tiny models."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .small_disk import SmallDisk

# The kernels for a GPU run in Triton's interpreter, which has to know before anybody imports Triton.
os.environ["TRITON_INTERPRET"] = "1"

REPOSITORY = Path(__file__).resolve().parents[1]

# Enough English for a byte-level tokenizer to learn some merges; every byte stays encodable without them.
SENTENCES = [
    "I can't help with that, but here is what a doctor would say about the usual dose of ibuprofen.",
    "The package was delayed by the storm and the customer would like a refund for the order.",
    "Once upon a time there was a little girl who liked to play outside with her red ball.",
    "Take two tablets with water, then wait six hours before you take another one.",
    "def add(first, second):\n    return first + second",
    "What would you like to cook today? Chop the onions and warm the oil in a pan.",
]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _shared(name: str) -> Path:
    folder = Path(os.environ.get("UNBRAID_SHARED") or REPOSITORY.parent / "shared") / name
    if not folder.is_dir():
        pytest.skip(f"no shared {name} at {folder}; set UNBRAID_SHARED to the folder that holds them")
    return folder


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """The folder with small real models (one Hugging Face folder each); skips where there is none."""
    return _shared("models")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real text and labelled data; skips where there is none."""
    return _shared("data")


@pytest.fixture
def small_disk(tmp_path: Path) -> SmallDisk:
    """A disk that is soon full; skips where no process may mount one."""
    disk = SmallDisk(tmp_path / "disk")
    disk.folder.mkdir()
    if not disk.works():
        pytest.skip("this system lets no process mount a small disk of its own")
    return disk


def _tokenizer(*, chat: bool) -> Any:
    """A byte-level BPE tokenizer of 384 tokens with BOS, end of turn, PAD, and for chat the two roles."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|end|>", "<|pad|>", *(["<|user|>", "<|assistant|>"] if chat else [])]
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(SENTENCES * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<|bos|>", eos_token="<|end|>", pad_token="<|pad|>"
    )
    if chat:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _save(folder: Path, tokenizer: Any, build: Callable[[], Any]) -> Path:
    """Write a randomly initialised model beside its tokenizer; the same weights in every run."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 3 layers and 48 dimensions with a chat template, in Hugging Face format."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer(chat=True)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.15,  # wide enough that two prompts give clearly different next tokens
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _save(tmp_path_factory.mktemp("tiny-llama"), tokenizer, lambda: LlamaForCausalLM(config))


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of 2 layers and 32 dimensions without a chat template, in Hugging Face format."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = _tokenizer(chat=False)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        initializer_range=0.15,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _save(tmp_path_factory.mktemp("tiny-gpt2"), tokenizer, lambda: GPT2LMHeadModel(config))


@pytest.fixture(scope="session")
def same_as_docs() -> Callable[[str, str, list[dict[str, str]]], None]:
    """Compare rows with the table under a heading of a page in docs; UNBRAID_WRITE_DOCS=1 writes them."""

    def compare(page: str, heading: str, rows: list[dict[str, str]]) -> None:
        path = REPOSITORY / "docs" / page
        lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
        table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
        text = path.read_text(encoding="utf-8")
        before, found, after = text.partition(f"## {heading}\n")
        assert found, f"{path} has no heading {heading!r}"
        introduction, _, rest = after.partition("\n|")
        _, _, rest = rest.partition("\n\n")
        wanted = f"{before}{found}{introduction}\n{table}\n" + (f"\n{rest}" if rest else "")
        if os.environ.get("UNBRAID_WRITE_DOCS") == "1":
            path.write_text(wanted, encoding="utf-8")
            return
        assert text == wanted, f"docs/{page} is not what the checks found; run them with UNBRAID_WRITE_DOCS=1"

    return compare
