"""Encoders, encoder-decoders and vision transformers: what can be read and edited in them, and what not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor

from unbraid.activations.capture import capture
from unbraid.activations.documents import Document
from unbraid.activations.reading import CaptureConfig
from unbraid.manifest.errors import UserError
from unbraid.model.apply import applied
from unbraid.model.edits import Edit
from unbraid.model.generate import generate
from unbraid.model.load import LanguageModel, load_model, wrap_model
from unbraid.model.read import logits_and_sites, read_images, read_sites
from unbraid.model.sites import KINDS, Site

D, LAYERS, NEW = 32, 2, 5
IDS = torch.tensor([[5, 9, 30, 41, 17, 60], [8, 20, 50, 6, 19, 33]])
SAID = torch.tensor([[0, 7, 11, 40], [0, 12, 13, 50]])
ONES = torch.ones_like(IDS)
BERT = hf.BertConfig(
    vocab_size=64, hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=48
)
T5 = hf.T5Config(
    vocab_size=64, d_model=D, d_kv=12, d_ff=48, num_layers=LAYERS, num_heads=4, decoder_start_token_id=0
)
VIT = hf.ViTConfig(
    hidden_size=D,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    intermediate_size=48,
    image_size=8,
    patch_size=4,
)


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"w{i}": i for i in range(3, 64)}}
    raw = Tokenizer(models.WordLevel(words, unk_token="w3"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return hf.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")


def build(kind: Any, config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = kind(config).eval()
        with torch.no_grad():
            for parameter in made.parameters():
                noise = torch.randn_like(parameter)
                parameter.copy_(0.25 * noise if parameter.ndim > 1 else parameter + 0.1 * noise)
    return made


@pytest.fixture(scope="module")
def bert() -> LanguageModel:
    return wrap_model(build(hf.BertForMaskedLM, BERT), tokenizer(), name="bert", id="bert")


@pytest.fixture(scope="module")
def t5() -> LanguageModel:
    return wrap_model(build(hf.T5ForConditionalGeneration, T5), tokenizer(), name="t5", id="t5")


@pytest.fixture(scope="module")
def vit() -> LanguageModel:
    return wrap_model(build(hf.ViTModel, VIT), None, name="vit", id="vit")


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def at(found: dict[Site, Tensor], layer: int, stack: str = "") -> dict[str, Tensor]:
    return {s.kind: x for s, x in found.items() if s.layer == layer and s.stack == stack}


def edit(lm: LanguageModel, site: Site, value: float, operation: Any = "add") -> Edit:
    shape = (1, lm.layout.width(site))
    rng = np.random.default_rng(0)
    never = np.full(1, -np.inf)
    return Edit(site, operation, value, rng.normal(size=shape), np.zeros(1), never, rng.normal(size=shape))


def test_bert_normalises_its_stream_after_each_sum(bert: LanguageModel) -> None:
    with torch.no_grad():
        recorded = bert.model(IDS, output_hidden_states=True).hidden_states
    x = read_sites(bert, IDS, ONES, bert.layout.sites)
    for i, layer in enumerate(bert.layout.layers):
        here = at(x, i)
        assert torch.equal(here["resid_pre"], recorded[i]) and torch.equal(
            here["resid_post"], recorded[i + 1]
        )
        mid = layer.attention.output.LayerNorm(here["resid_pre"] + here["attn_out"])
        assert close(here["mlp_in"], mid)
        assert close(layer.output.LayerNorm(mid + here["mlp_out"]), here["resid_post"])
        assert close(layer.attention.output.dense(here["attn_z"]), here["attn_out"])
    assert bert.layout.missing.keys() == {"resid_mid", "final_norm", "router", "cross_out"}
    with pytest.raises(UserError, match="normalise the stream itself"):
        read_sites(bert, IDS, ONES, [Site(0, "resid_mid")])


def test_bert_padded_packed_and_edited(bert: LanguageModel) -> None:
    alone = read_sites(bert, IDS[:1, :4], ONES[:1, :4], bert.layout.sites)
    second = read_sites(bert, IDS[1:, :2], ONES[:1, :2], bert.layout.sites)
    ids = torch.stack([torch.tensor([0, 0, *IDS[0, :4]]), torch.tensor([*IDS[0, :4], 0, 0])])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    padded = read_sites(bert, ids, mask, bert.layout.sites)
    row = torch.cat([IDS[0, :4], IDS[1, :2]])[None]
    packed = read_sites(bert, row, torch.tensor([[1, 1, 1, 1, 2, 2]]), bert.layout.sites, packed=True)
    for site, x in alone.items():
        assert close(padded[site][0, 2:], x[0]) and close(padded[site][1, :4], x[0])
        assert close(packed[site][0, :4], x[0]) and close(packed[site][0, 4:], second[site][0])
    bare, inside = logits_and_sites(bert, IDS, ONES, bert.layout.sites)
    for site in bert.layout.sites:
        if site.layer != 0:
            continue
        with applied(bert, [edit(bert, site, 0.0)]):
            assert torch.equal(logits_and_sites(bert, IDS, ONES)[0], bare)
        with applied(bert, [edit(bert, site, 1.0)]):
            logits, found = logits_and_sites(bert, IDS, ONES, bert.layout.sites)
        for other, x in found.items():
            if other.layer == 1:
                assert not torch.isclose(x, inside[other]).all(dim=-1).any()
        assert not torch.allclose(logits, bare)


def test_t5_adds_up_in_both_stacks(t5: LanguageModel) -> None:
    with torch.no_grad():
        out = t5.model(IDS, decoder_input_ids=SAID, output_hidden_states=True)
    x = read_sites(t5, IDS, ONES, t5.layout.sites, decoder_input_ids=SAID)
    for stack, recorded in (("encoder", out.encoder_hidden_states), ("decoder", out.decoder_hidden_states)):
        for layer in range(LAYERS):
            here = at(x, layer, stack)
            assert torch.equal(here["resid_pre"], recorded[layer])
            assert close(here["resid_pre"] + here["attn_out"], here["resid_mid"])
            crossed = here["resid_mid"] + here.get("cross_out", torch.zeros(()))
            assert close(crossed + here["mlp_out"], here["resid_post"])
            assert here["attn_z"].shape[-1] == 48 and ("cross_out" in here) == (stack == "decoder")
        assert torch.equal(x[Site(None, "final_norm", stack)], recorded[-1])  # type: ignore[arg-type]
    assert t5.layout.width(Site(0, "attn_z", "encoder")) == 48


def test_t5_is_read_with_padding_and_without_its_decoder(t5: LanguageModel) -> None:
    sites = [site for site in t5.layout.sites if site.stack == "encoder"]
    ran: list[int] = []
    hook = t5.layout.decoder.register_forward_hook(lambda *_: ran.append(1))
    alone = read_sites(t5, IDS[:1, :4], ONES[:1, :4], sites)
    hook.remove()
    assert not ran
    ids = torch.stack([torch.tensor([0, 0, *IDS[0, :4]]), torch.tensor([*IDS[0, :4], 0, 0])])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    padded = read_sites(t5, ids, mask, sites)
    for site, x in alone.items():
        assert close(padded[site][0, 2:], x[0]) and close(padded[site][1, :4], x[0])
    both = read_sites(t5, ids, mask, t5.layout.sites, decoder_input_ids=SAID[[0, 0]])
    for site in t5.layout.places:
        assert close(both[site][0], both[site][1]), "the decoder sees the encoder's real tokens alone"
    with pytest.raises(UserError, match="give decoder_input_ids"):
        read_sites(t5, IDS, ONES, [Site(0, "resid_post", "decoder")])
    with pytest.raises(UserError, match=r"write encoder\.layers\.0\.resid_post or decoder\."):
        read_sites(t5, IDS, ONES, [Site(0, "resid_post")])


def t5_says(lm: LanguageModel) -> Tensor:
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    return lm.model.generate(IDS, attention_mask=ONES, **settings)


def test_t5_edits_reach_every_decoded_token(t5: LanguageModel) -> None:
    bare = t5_says(t5)
    for site in t5.layout.places:
        if site.layer != 0:
            continue
        with applied(t5, [edit(t5, site, 0.0)]) as run:
            assert torch.equal(t5_says(t5), bare) and run.counts[0].fired == 2 * NEW
        change = edit(t5, site, 2.0, "clamp")
        with applied(t5, [change]) as run:
            said = t5_says(t5)
        assert run.counts[0].fired == 2 * NEW
        with applied(t5, [change]), torch.no_grad():
            logits = t5.model(IDS, attention_mask=ONES, decoder_input_ids=said[:, :-1]).logits.clone()
        logits[..., list(t5.eos_ids)] = -torch.inf
        gap = logits.amax(dim=-1) - logits.gather(2, said[:, 1:, None])[..., 0]
        assert (gap < 1e-3).all(), site
    first = Site(0, "resid_post", "encoder")
    with pytest.raises(UserError, match="only read"), applied(t5, [edit(t5, first, 1.0)]):
        pass


def test_vit_is_read_from_images(vit: LanguageModel) -> None:
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = vit.model(pixels, output_hidden_states=True)
    x = read_images(vit, pixels, vit.layout.sites)
    for layer in range(LAYERS):
        here = at(x, layer)
        assert here["resid_pre"].shape == (2, 5, D)
        assert torch.equal(here["resid_pre"], out.hidden_states[layer])
        assert close(here["resid_pre"] + here["attn_out"], here["resid_mid"])
        assert close(here["resid_mid"] + here["mlp_out"], here["resid_post"])
    assert torch.equal(x[Site(None, "final_norm")], out.last_hidden_state)
    change = edit(vit, Site(0, "resid_post"), 1.0)
    with pytest.raises(UserError, match="edits are for models that read tokens"), applied(vit, [change]):
        pass


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (hf.BertModel, BERT),
        (hf.BertForMaskedLM, BERT),
        (hf.T5ForConditionalGeneration, T5),
        (hf.ViTModel, VIT),
    ],
)
def test_loaded_from_a_folder_as_what_it_is(kind: Any, config: Any, tmp_path: Path) -> None:
    made = build(kind, config)
    made.save_pretrained(tmp_path / "m")
    if kind is not hf.ViTModel:
        tokenizer().save_pretrained(tmp_path / "m")
    lm = load_model(tmp_path / "m")
    assert isinstance(lm.model, kind) and not lm.generates
    with pytest.raises(UserError, match="cannot be asked for replies"):
        generate(lm, [[{"role": "user", "content": "w5"}]], max_new_tokens=2)
    if kind is not hf.BertForMaskedLM:
        with pytest.raises(UserError, match="gives no logits"):
            logits_and_sites(lm, IDS, ONES)
    site = Site(1, "resid_post", "encoder" if config is T5 else "")
    documents = [Document.of_text("w5 w9 w30"), Document.of_text("w8 w20 w50 w6")]
    settings = CaptureConfig(sites=(site,), dtype="float32", context=32)
    if kind is hf.ViTModel:
        with pytest.raises(UserError, match="reads images"):
            capture(lm, documents, settings, tmp_path / "out")
        return
    store = capture(lm, documents, settings, tmp_path / "out")
    columns = store.columns(0)
    ids = torch.tensor([[8, 20, 50, 6]])
    alone = read_sites(lm, ids, torch.ones_like(ids), [site])[site][0]
    assert columns.tokens[columns.documents == 1].tolist() == ids[0].tolist()
    assert close(store.read(site, 0)[columns.documents == 1], alone)
    if config is T5:
        settings = CaptureConfig(sites=(Site(1, "resid_post", "decoder"),))
        with pytest.raises(UserError, match="capture the encoder"):
            capture(lm, documents, settings, tmp_path / "decoder")


def test_the_page_of_families_says_what_was_checked_here(
    bert: LanguageModel,
    t5: LanguageModel,
    vit: LanguageModel,
    same_as_docs: Callable[[str, str, list[dict[str, str]]], None],
) -> None:
    """Each row runs the checks above and stands on their success."""
    test_bert_normalises_its_stream_after_each_sum(bert)
    test_bert_padded_packed_and_edited(bert)
    test_t5_adds_up_in_both_stacks(t5)
    test_t5_is_read_with_padding_and_without_its_decoder(t5)
    test_t5_edits_reach_every_decoded_token(t5)
    test_vit_is_read_from_images(vit)
    rows: list[dict[str, str]] = []
    for family, lm, layout, sublayers, padding, edits in (
        ("BERT, MiniLM", bert, bert.layout, "normalised after each sum", "yes", "yes"),
        ("T5, encoder", t5, t5.layout.encoder, "one after the other", "yes", "refused"),
        (
            "T5, decoder",
            t5,
            t5.layout,
            "one after the other",
            "of the encoder, yes",
            "yes, at every decoded token",
        ),
        ("ViT", vit, vit.layout, "one after the other", "has none", "refused"),
    ):
        assert layout is not None
        missing = ", ".join(kind for kind in KINDS if kind in layout.missing)
        rows.append(
            {
                "family": family,
                "class": f"`{type(lm.model).__name__}`",
                "kinds of sites it lacks": missing,
                "sublayers": sublayers,
                "padding changes nothing": padding,
                "packing changes nothing": "yes" if lm is not vit and lm.packs else "refused",
                "edits": edits,
                "replies": "yes" if lm.generates else "refused",
            }
        )
    same_as_docs("FAMILIES.md", "Encoders and vision", rows)
