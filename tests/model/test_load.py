from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor
from transformers import AutoModelForCausalLM

from unbraid.manifest.errors import IntegrityError, UserError
from unbraid.model.apply import applied
from unbraid.model.edits import Edit
from unbraid.model.load import LanguageModel, load_model, tokenizer_id, weights_id, wrap_model
from unbraid.model.read import read_sites
from unbraid.model.sites import Site


def test_a_loaded_model_says_what_it_is(llama: LanguageModel, tiny_llama: Path) -> None:
    assert (llama.d_in, llama.n_layers, llama.context) == (48, 3, 512)
    assert llama.name == tiny_llama.name and not llama.model.training
    assert not any(p.requires_grad for p in llama.model.parameters())
    assert llama.unembedding.shape == (48, len(llama.tokenizer)) and llama.final_norm_weight.shape == (48,)


def test_the_id_is_of_the_tensors_not_of_the_files(
    tmp_path: Path, tiny_llama: Path, llama: LanguageModel
) -> None:
    tensors = load_file(tiny_llama / "model.safetensors")
    names = list(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({n: tensors[n] for n in reversed(part)}, tmp_path / file, metadata={"format": "pt"})
    index = {"weight_map": {n: file for file, part in files.items() for n in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weights_id(tmp_path) == weights_id(tiny_llama) == llama.id == weights_id(tensors)


def test_one_bit_changes_the_id(tmp_path: Path, tiny_llama: Path) -> None:
    copy = tmp_path / "model.safetensors"
    shutil.copy(tiny_llama / "model.safetensors", copy)
    data = bytearray(copy.read_bytes())
    data[-1] ^= 1
    copy.write_bytes(data)
    assert weights_id(tmp_path) != weights_id(tiny_llama)


def test_names_shapes_and_dtypes_are_part_of_the_id() -> None:
    zeros = torch.zeros(4)
    ids = {
        weights_id({"a": zeros}),
        weights_id({"b": zeros}),
        weights_id({"a": zeros.reshape(2, 2)}),
        weights_id({"a": torch.zeros(4, dtype=torch.int32)}),
        weights_id({"a": torch.zeros(8, dtype=torch.bfloat16)}),
    }
    assert len(ids) == 5


def test_a_weight_made_of_other_tensors_is_hashed_as_those() -> None:
    one, two = torch.arange(4.0), torch.ones(4)
    ids = {
        weights_id({"a": TwoTensor(one, two)}),
        weights_id({"a": TwoTensor(two, one)}),
        weights_id({"a": TwoTensor(one, one)}),
        weights_id({"a": one}),
    }
    assert len(ids) == 4 and weights_id({"a": TwoTensor(one.clone(), two)}) in ids


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_a_model_in_memory_has_the_id_of_its_saved_self(request: pytest.FixtureRequest, name: str) -> None:
    folder: Path = request.getfixturevalue(name)
    loaded = load_model(folder)
    assert wrap_model(loaded.model, loaded.tokenizer, name="x").id == loaded.id


def test_a_cut_file_is_named(tmp_path: Path, tiny_llama: Path) -> None:
    whole = (tiny_llama / "model.safetensors").read_bytes()
    for size in (4, 100, len(whole) - 7):
        (tmp_path / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(IntegrityError, match=r"model\.safetensors"):
            weights_id(tmp_path)


def test_tokenizer_id_ignores_padding_but_not_the_template(tiny_llama: Path, llama: LanguageModel) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer(["a", "longer text"], padding=True, truncation=True, max_length=4)
    assert tokenizer_id(tokenizer) == llama.tokenizer_id
    tokenizer.chat_template += " "
    assert tokenizer_id(tokenizer) != llama.tokenizer_id


def test_prompts_end_where_the_reply_begins(llama: LanguageModel, gpt2: LanguageModel) -> None:
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    ids = llama.encode_prompt(messages)
    assert llama.decode(ids, skip_special_tokens=False) == (
        "<|bos|><|user|>hello<|end|><|assistant|>hi<|end|><|assistant|>"
    )
    assert gpt2.decode(gpt2.encode_prompt(messages)) == "hellohi"
    assert gpt2.encode_prompt([{"role": "user", "content": ""}]) == [gpt2.tokenizer.bos_token_id]


def test_mistakes_are_named(tmp_path: Path, tiny_llama: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_model(tmp_path / "missing")
    with pytest.raises(UserError, match=r"no config\.json"):
        load_model(tmp_path)
    with pytest.raises(UserError, match="float32, bfloat16, float16"):
        load_model(tiny_llama, dtype="float31")
    shutil.copy(tiny_llama / "config.json", tmp_path)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(tmp_path)


def test_bfloat16_and_progress_bars_left_as_they_were(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load_model(tiny_llama, dtype="bfloat16").model.dtype == torch.bfloat16
    assert capsys.readouterr() == ("", "")


def test_a_model_spread_by_the_library_is_read_and_edited_all_the_same(
    tiny_llama: Path, llama: LanguageModel, tmp_path: Path, make_edit: Callable[..., Edit]
) -> None:
    pytest.importorskip("accelerate", reason="accelerate places the parts of a model")
    stays = (
        "model.embed_tokens",
        "model.norm",
        "model.rotary_emb",
        "lm_head",
        "model.layers.0",
        "model.layers.2",
    )
    model = AutoModelForCausalLM.from_pretrained(
        tiny_llama,
        device_map={"model.layers.1": "disk"} | dict.fromkeys(stays, "cpu"),
        offload_folder=tmp_path,
    )
    lm = wrap_model(model, llama.tokenizer, name=llama.name, id=weights_id(tiny_llama))
    assert any(p.device.type == "meta" for p in lm.model.parameters())  # it is brought when it is needed
    assert lm.id == llama.id and lm.layout.kinds == llama.layout.kinds
    ids, mask = torch.arange(10, 30).view(2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[0, 7:] = 0
    sites = [Site(layer, "resid_post") for layer in range(3)]
    found: list[Tensor] = []
    for edits in ([], [make_edit(llama, "layers.1.mlp_out")]):
        for one in (llama, lm):
            with applied(one, edits):
                read = read_sites(one, ids, mask, sites)
            found.append(torch.stack([read[site] for site in sites]))
    assert found[0].equal(found[1]) and found[2].equal(found[3]) and not found[0].equal(found[2])
