"""Every family of models, as a small one with random weights: what it has, and that it means what it says."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models
from torch import Tensor

from unbraid.manifest.errors import UserError
from unbraid.model.apply import applied
from unbraid.model.edits import Edit, apply_reference
from unbraid.model.families import discover
from unbraid.model.load import LanguageModel, load_model, wrap_model
from unbraid.model.read import logits_and_sites, read_sites
from unbraid.model.replace import replaced
from unbraid.model.sites import KINDS, Site

VOCABULARY, D, HEADS, LAYERS = 64, 32, 4, 3
IDS = torch.tensor([[5, 9, 30, 41, 17, 60], [8, 20, 50, 6, 19, 33]])
ONES = torch.ones_like(IDS)
NEW = 5

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": D,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_PLAIN = {**_SIZES, **_ENDS, "intermediate_size": 48, "max_position_embeddings": 64}
_GROUPED = {**_PLAIN, "num_key_value_heads": 2}
_SHORT = {
    "vocab_size": VOCABULARY,
    "n_embd": D,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": 64,
    **_ENDS,
}
_GEMMA = {**_GROUPED, "head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 16}
_EXPERTS = {"num_experts_per_tok": 2}
_QWEN_EXPERTS = {**_EXPERTS, "num_experts": 4, "moe_intermediate_size": 24}

FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", _SHORT),
    "GPT-Neo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            **{**_SIZES, **_ENDS, "num_layers": LAYERS, "num_heads": HEADS, "max_position_embeddings": 64},
            **{"attention_types": [[["global", "local", "global"], 1]], "window_size": 4},
        },
    ),
    "GPT-NeoX, Pythia": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _PLAIN),
    "GPT-NeoX, not parallel": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {**_PLAIN, "use_parallel_residual": False},
    ),
    "GPT-J": ("GPTJForCausalLM", "GPTJConfig", {**_SHORT, "rotary_dim": 4}),
    "OPT": ("OPTForCausalLM", "OPTConfig", {**_PLAIN, "ffn_dim": 48, "word_embed_proj_dim": D}),
    "OPT-350m": (
        "OPTForCausalLM",
        "OPTConfig",
        {**_PLAIN, "ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "BLOOM": ("BloomForCausalLM", "BloomConfig", {**_SIZES, **_ENDS}),
    "Falcon 7B": ("FalconForCausalLM", "FalconConfig", {**_SIZES, **_ENDS, "multi_query": True}),
    "Falcon 40B": (
        "FalconForCausalLM",
        "FalconConfig",
        {**_SIZES, **_ENDS, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "Falcon-RW": (
        "FalconForCausalLM",
        "FalconConfig",
        {**_SIZES, **_ENDS, "parallel_attn": False, "multi_query": False, "alibi": True, "bias": True},
    ),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "SmolLM3": ("SmolLM3ForCausalLM", "SmolLM3Config", _GROUPED),
    "Mistral": ("MistralForCausalLM", "MistralConfig", {**_GROUPED, "sliding_window": 4}),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_GROUPED, **_EXPERTS, "num_local_experts": 4}),
    "Qwen 2": ("Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
    "Qwen 3": ("Qwen3ForCausalLM", "Qwen3Config", {**_GROUPED, "head_dim": 16}),
    "Qwen 2 MoE": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**_GROUPED, **_QWEN_EXPERTS, "shared_expert_intermediate_size": 24, "mlp_only_layers": [1]},
    ),
    "Qwen 3 MoE": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_GROUPED, **_QWEN_EXPERTS, "head_dim": 16}),
    "Gemma": ("GemmaForCausalLM", "GemmaConfig", {**_GROUPED, "head_dim": 16}),
    "Gemma 2": ("Gemma2ForCausalLM", "Gemma2Config", _GEMMA),
    "Gemma 3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _GEMMA),
    "Phi": ("PhiForCausalLM", "PhiConfig", _PLAIN),
    "Phi 3": ("Phi3ForCausalLM", "Phi3Config", _GROUPED),
    "OLMo 2": ("Olmo2ForCausalLM", "Olmo2Config", _GROUPED),
}


@cache
def tokenizer() -> Any:
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    raw = Tokenizer(models.WordLevel(words, unk_token="w3"))
    ends = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return hf.PreTrainedTokenizerFast(tokenizer_object=raw, **ends)


def build(model: str, config: str, options: dict[str, Any]) -> Any:
    """A model whose every weight is random, biases and norms too, so that nothing is right by being zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = getattr(hf, model)(getattr(hf, config)(**options)).eval()
        with torch.no_grad():
            for parameter in made.parameters():
                noise = torch.randn_like(parameter)
                parameter.copy_(0.25 * noise if parameter.ndim > 1 else parameter + 0.1 * noise)
    return made


@cache
def family(name: str) -> LanguageModel:
    return wrap_model(build(*FAMILIES[name]), tokenizer(), name=name, id=name)


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def edits(lm: LanguageModel, operation: str, value: float, layer: int = 0) -> list[Edit]:
    """An edit of two random directions at each kind of site of a layer, firing at every token."""
    rng = np.random.default_rng(0)
    made: list[Edit] = []
    for site in lm.layout.sites:
        if site.layer not in (layer, None) or site.kind == "router":
            continue
        shape = (2, lm.layout.width(site))
        probe, write, always = rng.normal(size=shape), rng.normal(size=shape), np.full(2, -np.inf)
        made.append(Edit(site, operation, value, probe, np.zeros(2), always, write, name=str(site)))  # type: ignore[arg-type]
    return made


# --- the checks; each raises AssertionError, and returns what the table of families says of it ---


def check_identities(lm: LanguageModel) -> str:
    """The stream is the library's, and its parts add up to it."""
    sites = lm.layout.sites
    with torch.no_grad():
        recorded = lm.model(IDS, attention_mask=ONES, output_hidden_states=True).hidden_states
    x = read_sites(lm, IDS, ONES, sites)
    assert all(x[site].shape == (2, 6, lm.layout.width(site)) for site in sites)
    forms: set[str] = set()
    for i, layer in enumerate(lm.layout.layers):
        at = {site.kind: x[site] for site in sites if site.layer == i}
        pre, post = at["resid_pre"], at["resid_post"]
        assert torch.equal(pre, recorded[i])
        assert i + 1 == LAYERS or torch.equal(post, recorded[i + 1])
        assert "attn_out" in at and at["attn_out"].std() > 0.01 and at["mlp_out"].std() > 0.01
        norms = [m for m in layer.modules() if "Norm" in type(m).__name__]
        if "resid_mid" in at:
            forms.add("one after the other")
            assert close(pre + at["attn_out"], at["resid_mid"])
            assert close(at["resid_mid"] + at["mlp_out"], post)
            read = at["resid_mid"]
        elif close(pre + at["attn_out"] + at["mlp_out"], post):
            forms.add("side by side")
            read = pre
        else:
            forms.add("normalised after each sum")
            mids = [n(pre + at["attn_out"]) for n in norms if n.weight.shape == (D,)]
            read = next(m for m in mids if any(close(n(m + at["mlp_out"]), post) for n in norms))
        normed = [read, *(n(read) for n in norms if n.weight.shape == (D,))]
        assert any(close(at["mlp_in"], n) for n in normed), (
            "mlp_in is what the MLP's norm makes of the stream"
        )
        check_heads(layer, at, norms)
    if Site(None, "final_norm") in x:
        assert torch.equal(x[Site(None, "final_norm")], recorded[-1])
    (form,) = forms
    return form


def check_heads(layer: Any, at: dict[str, Tensor], norms: list[Any]) -> None:
    """attn_z holds the heads one after the other: each through its part of W_O, summed, is attn_out."""
    z = at["attn_z"].unflatten(-1, (HEADS, -1))
    for module in layer.modules():
        weight = getattr(module, "weight", None)
        if weight is None or weight.ndim != 2 or D not in weight.shape:
            continue
        w = weight if type(module).__name__ == "Conv1D" else weight.T  # (heads · d_head, D)
        if w.shape != (at["attn_z"].shape[-1], D):
            continue
        out = torch.einsum("bthd,hde->bte", z, w.unflatten(0, (HEADS, -1)))
        if getattr(module, "bias", None) is not None:
            out = out + module.bias
        if any(
            close(n(out) if n else out, at["attn_out"])
            for n in (None, *norms)
            if not n or n.weight.shape == (D,)
        ):
            return
    raise AssertionError("no projection makes attn_out of attn_z")


def check_zero(lm: LanguageModel) -> str:
    """An edit of strength zero is bitwise nothing, at every site, in one pass and in generation."""
    bare, _ = logits_and_sites(lm, IDS, ONES)
    words = generate(lm, IDS, ONES)
    nothings = [*edits(lm, "add", 0.0), *edits(lm, "scale", 1.0)]
    for nothing in nothings:
        with applied(lm, [nothing]) as run:
            logits, _ = logits_and_sites(lm, IDS, ONES)
            assert run.counts[0].fired == IDS.numel(), "it fires everywhere"
            assert torch.equal(logits.view(torch.int32), bare.view(torch.int32)), nothing.name
    with applied(lm, nothings) as run:
        assert torch.equal(generate(lm, IDS, ONES), words)
        assert all(count.fired == IDS.numel() + 2 * (NEW - 1) for count in run.counts)
    return "yes"


def check_reach(lm: LanguageModel) -> str:
    """An edit does at its site what the reference says; everything later changes, nothing earlier."""
    bare = read_sites(lm, IDS, ONES, lm.layout.sites)
    for edit in edits(lm, "add", 0.7):
        with applied(lm, [edit]):
            logits, edited = logits_and_sites(lm, IDS, ONES, lm.layout.sites)
        expected, _ = apply_reference(bare[edit.site].numpy(), edit)
        np.testing.assert_allclose(edited[edit.site].numpy(), expected, rtol=1e-4, atol=1e-4)
        carrier = Site(0, "attn_out") if edit.site.kind == "resid_mid" else None
        for site, x in edited.items():
            if site.depth < edit.site.depth and site != carrier:
                assert torch.equal(x, bare[site]), f"{edit.name} reaches back to {site}"
            later = site.layer is None or (edit.site.layer is not None and site.layer > edit.site.layer)
            if later:
                assert not torch.isclose(x, bare[site]).all(dim=-1).any(), (
                    f"{edit.name} is not seen at {site}"
                )
        assert not torch.allclose(logits, logits_and_sites(lm, IDS, ONES)[0], atol=1e-3)
    return "yes"


def check_decoding(lm: LanguageModel) -> str:
    """Under an edit, generation with a cache says what full passes without one say, at every token."""
    mask = ONES.clone()
    mask[1, :2] = 0
    for edit in edits(lm, "clamp", 2.0):
        with applied(lm, [edit]) as run:
            said = generate(lm, IDS, mask)
        assert run.fired[0].tolist() == [6 + NEW - 1, 4 + NEW - 1]
        ids = torch.cat([IDS, said], dim=1)
        whole = torch.cat([mask, torch.ones_like(said)], dim=1)
        with applied(lm, [edit]):
            logits, _ = logits_and_sites(lm, ids, whole)
        logits = logits[:, IDS.shape[1] - 1 : -1].clone()
        logits[..., list(lm.eos_ids)] = -torch.inf
        gap = logits.amax(dim=-1) - logits.gather(2, said[..., None])[..., 0]
        assert (gap < 1e-3).all(), f"{edit.name}: a decoded token is not what the edited model would say"
    return "yes"


def check_padding(lm: LanguageModel) -> str:
    """The same tokens give the same activations alone, padded left and padded right."""
    short = IDS[0, :4]
    alone = read_sites(lm, short[None], torch.ones(1, 4), lm.layout.sites)
    for ids, mask in (
        ([0, 0, *short], [0, 0, 1, 1, 1, 1]),
        ([*short, 0, 0], [1, 1, 1, 1, 0, 0]),
    ):
        rows, masks = torch.stack([torch.tensor(ids), IDS[1]]), torch.tensor([mask, [1] * 6])
        found = read_sites(lm, rows, masks, lm.layout.sites)
        for site, x in found.items():
            assert close(x[0][torch.tensor(mask) == 1], alone[site][0]), f"{site} differs under padding"
    return "yes"


def check_packing(lm: LanguageModel) -> str:
    """Documents packed into one row give the activations that they give alone, or packing is refused."""
    first, second = IDS[0, :4], IDS[1, :3]
    rows = torch.stack([torch.cat([first, second, torch.zeros(1, dtype=torch.long)]), torch.arange(3, 11)])
    numbers = torch.tensor([[1] * 4 + [2] * 3 + [0], [1] * 2 + [2] * 4 + [3] * 2])
    if not lm.packs:
        with pytest.raises(UserError, match="cannot read packed rows"):
            read_sites(lm, rows, numbers, lm.layout.sites, packed=True)
        return "refused"
    found = read_sites(lm, rows, numbers, lm.layout.sites, packed=True)
    for row, number, document in ((0, 1, first), (0, 2, second), (1, 3, torch.tensor([9, 10]))):
        alone = read_sites(lm, document[None], torch.ones(1, len(document)), lm.layout.sites)
        for site, x in found.items():
            assert close(x[row][numbers[row] == number], alone[site][0]), f"{site} differs when packed"
    return "yes"


def generate(lm: LanguageModel, ids: Tensor, mask: Tensor) -> Tensor:
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    return lm.model.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :]


def check_transformer_lens(lm: LanguageModel) -> str:
    """TransformerLens' bridge reads the same at every site that it has, where its logits are the model's."""
    pytest.importorskip("transformer_lens", reason="TransformerLens is the oracle")
    from transformer_lens.model_bridge import TransformerBridge

    bare = build(*FAMILIES[lm.name])
    bare.config.architectures = [type(bare).__name__]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer().save_pretrained(folder)
        (Path(folder) / "config.json").write_text('{"model_type": "llama"}')
        words = hf.AutoTokenizer.from_pretrained(folder)
        words.init_kwargs["name_or_path"] = folder  # it loads the tokenizer again from there
        try:
            bridge = TransformerBridge.boot_transformers(
                lm.name, hf_model=bare, tokenizer=words, device="cpu"
            )
            logits, kept = bridge.run_with_cache(IDS, attention_mask=ONES)
        except (ValueError, RuntimeError) as error:
            return f"no oracle: its bridge ends in a {type(error).__name__}"
    if not close(logits, logits_and_sites(lm, IDS, ONES)[0]):
        return "no oracle: its logits are not the model's"
    compared: set[str] = set()
    for site, x in read_sites(lm, IDS, ONES, lm.layout.sites).items():
        if site.transformer_lens in kept:
            assert close(kept[site.transformer_lens].reshape(x.shape), x), site
            compared.add(site.kind)
    assert len(compared) >= 7
    without = [kind for kind in KINDS if kind in lm.layout.kinds - compared]
    return "the same" + (f", has no {', '.join(without)}" if without else "")


CHECKS: dict[str, Callable[[LanguageModel], str]] = {
    "sublayers": check_identities,
    "edit of strength zero is nothing": check_zero,
    "edit seen by all later layers": check_reach,
    "and by every decoded token": check_decoding,
    "padding changes nothing": check_padding,
    "packing changes nothing": check_packing,
    "TransformerLens": check_transformer_lens,
}


@cache
def result(name: str, check: str) -> str:
    return CHECKS[check](family(name))


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_means_what_it_says(name: str, check: str) -> None:
    assert result(name, check)


def test_the_page_of_families_says_what_the_checks_found(
    same_as_docs: Callable[[str, str, list[dict[str, str]]], None],
) -> None:
    rows: list[dict[str, str]] = []
    for name, (model, _, _) in FAMILIES.items():
        missing = [kind for kind in KINDS if kind in family(name).layout.missing]
        what = {"family": name, "class": f"`{model}`", "kinds of sites it lacks": ", ".join(missing)}
        rows.append(what | {check: result(name, check) for check in CHECKS})
    same_as_docs("FAMILIES.md", "Decoders", rows)


def test_a_captured_and_restored_site_leaves_the_loss_of_real_models(shared_models: Path) -> None:
    """Activations read, kept and put back in: at every kind of site the next-token loss stays."""
    text = "Once upon a time there was a little girl who liked to play outside with her red ball."
    for folder in ("stories260k", "tinystories-656k", "tinystories-chat-3m"):
        lm = load_model(shared_models / folder)
        ids = torch.tensor([lm.tokenizer(text)["input_ids"]])
        mask = torch.ones_like(ids)
        untouched = loss(lm, ids)
        sites = [site for site in lm.layout.sites if site.layer in (0, lm.n_layers - 1, None)]
        kept = read_sites(lm, ids, mask, sites)
        for site in sites:
            # What was there is thrown away: the restored values must carry the whole computation.
            with replaced(lm, site, lambda x, new=kept[site][0]: 0 * x + new.clone(), mask.bool()):
                assert abs(loss(lm, ids) - untouched) <= 1e-5, (folder, site)
            with replaced(lm, site, lambda x, new=kept[site][0]: new.flip(0), mask.bool()):
                assert abs(loss(lm, ids) - untouched) > 1e-3, f"{site} of {folder} carries nothing"


def loss(lm: LanguageModel, ids: Tensor) -> float:
    logits, _ = logits_and_sites(lm, ids, torch.ones_like(ids))
    return float(torch.nn.functional.cross_entropy(logits[0, :-1].double(), ids[0, 1:]))


# What a family lacks, but for cross_out and router, which none has without an encoder and experts.
LACKS = {
    **{name: {"resid_mid"} for name in ("GPT-NeoX, Pythia", "GPT-J", "Falcon 7B", "Falcon 40B", "Phi")},
    "OPT-350m": {"resid_mid", "final_norm"},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_has_all_sites_but_those_it_cannot_have(name: str) -> None:
    layout = family(name).layout
    experts = set() if name in ("Mixtral", "Qwen 2 MoE", "Qwen 3 MoE") else {"router"}
    assert layout.missing.keys() == LACKS.get(name, set()) | experts | {"cross_out"}
    assert layout.kinds == set(KINDS) - layout.missing.keys()


def test_what_a_family_does_with_its_tensors_is_found_out() -> None:
    places = family("Falcon 7B").layout.places
    assert {site.kind for site, place in places.items() if place.overwritten} == {"mlp_out"}
    places = family("OPT").layout.places
    assert {site.kind for site, place in places.items() if place.flat} == {"resid_mid", "mlp_in", "mlp_out"}
    places = family("Mixtral").layout.places
    assert {site.kind for site, place in places.items() if place.flat} == {"router"}


def test_sublayers_that_do_not_add_up_are_not_offered() -> None:
    """BLOOM with its residual taken after the norm: neither form holds, and the reason is said."""
    config = {**_SIZES, **_ENDS, "apply_residual_connection_post_layernorm": True}
    lm = wrap_model(build("BloomForCausalLM", "BloomConfig", config), tokenizer(), name="x", id="x")
    assert lm.layout.kinds == {"resid_pre", "resid_post", "final_norm"}
    with pytest.raises(UserError, match="no known module of its layers has outputs that add up"):
        read_sites(lm, IDS, ONES, [Site(0, "attn_out")])


@pytest.mark.parametrize(
    ("model", "config", "options", "missing"),
    [
        (
            "GptOssForCausalLM",
            "GptOssConfig",
            {**_GROUPED, "head_dim": 8, "num_local_experts": 4},
            {"cross_out"},
        ),
        ("CohereForCausalLM", "CohereConfig", _PLAIN, {"resid_mid", "cross_out", "router"}),
        # Its sublayers' outputs are scaled before they are added.
        (
            "GraniteForCausalLM",
            "GraniteConfig",
            {**_PLAIN, "residual_multiplier": 0.5},
            set(KINDS[1:8]) | {"router"},
        ),
        # Its layers are neither attention nor MLP.
        ("MambaForCausalLM", "MambaConfig", {**_PLAIN, "state_size": 4}, {*KINDS[1:8], "final_norm"}),
    ],
)
def test_of_a_family_that_nobody_listed_what_adds_up_is_offered(
    model: str, config: str, options: dict[str, Any], missing: set[str]
) -> None:
    assert discover(build(model, config, options)).missing.keys() == missing


def test_positions_that_begin_elsewhere_are_left_to_the_model() -> None:
    """RoBERTa counts from its padding token's number on: positions from 0 would be silently wrong."""
    roberta = build("RobertaForMaskedLM", "RobertaConfig", {**_PLAIN, "pad_token_id": 1, "bos_token_id": 0})
    lm = wrap_model(roberta, tokenizer(), name="x", id="x")
    with torch.no_grad():
        recorded = roberta(IDS, output_hidden_states=True).hidden_states
    assert not lm.layout.positions
    assert torch.equal(read_sites(lm, IDS, ONES, [Site(1, "resid_pre")])[Site(1, "resid_pre")], recorded[1])


def test_an_edit_where_it_would_do_nothing_is_refused() -> None:
    lm = family("Mixtral")
    edit = Edit(Site(0, "router"), "add", 1.0, np.ones(4), np.zeros(1), np.zeros(1), np.ones(4))
    with pytest.raises(UserError, match="is only read"), applied(lm, [edit]):
        pass
    edit = Edit(Site(0, "attn_z"), "add", 1.0, np.ones(D), np.zeros(1), np.zeros(1), np.ones(D), name="z")
    with (
        pytest.raises(UserError, match="'z' is for 32 dimensions, model Qwen 3 has 64"),
        applied(family("Qwen 3"), [edit]),
    ):
        pass


@pytest.mark.parametrize("name", ["Mixtral", "Qwen 2 MoE", "Qwen 3 MoE"])
def test_router_logits_are_those_that_the_library_records(name: str) -> None:
    lm = family(name)
    with torch.no_grad():
        recorded = lm.model(IDS, attention_mask=ONES, output_router_logits=True).router_logits
    sites = [site for site in lm.layout.sites if site.kind == "router"]
    found = read_sites(lm, IDS, ONES, sites)
    assert [site.layer for site in sites] == ([0, 2] if name == "Qwen 2 MoE" else [0, 1, 2])
    for site, logits in zip(sites, recorded, strict=True):
        assert found[site].shape == (2, 6, 4) and torch.equal(found[site].flatten(0, 1), logits)
