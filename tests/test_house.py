"""The package itself: cheap to import, one version, tiny fixtures that work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import unbraid


def test_the_root_package_imports_no_room() -> None:
    code = "import sys, unbraid; print([m for m in sys.modules if m.startswith(('unbraid.', 'torch'))])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_citation_names_this_version() -> None:
    citation = (Path(__file__).resolve().parents[1] / "CITATION.cff").read_text()
    assert f"version: {unbraid.__version__}\n" in citation


def test_tiny_models_load_speak_and_keep_every_byte(tiny_llama: Path, tiny_gpt2: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for folder in (tiny_llama, tiny_gpt2):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
        text = "Refund for Zoë: 40 mg, please!\n"
        ids = tokenizer(text, return_tensors="pt")
        assert tokenizer.decode(ids["input_ids"][0]) == text
        assert model(**ids).logits.shape[-1] == len(tokenizer)
    chat = AutoTokenizer.from_pretrained(tiny_llama)
    turn = chat.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert turn == "<|bos|><|user|>Hi<|end|><|assistant|>"
    roles = chat.convert_tokens_to_ids(["<|user|>", "<|assistant|>", "<|end|>"])
    assert len(set(roles)) == 3 and set(roles) <= set(chat.all_special_ids)
