from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from unbraid.manifest.errors import UserError
from unbraid.model.apply import applied
from unbraid.model.edits import Edit, Gate, apply_reference
from unbraid.model.load import LanguageModel
from unbraid.model.read import logits_and_sites, read_sites
from unbraid.model.sites import STREAM_KINDS, Site

Make = Callable[..., Edit]
IDS = torch.tensor([[5, 9, 30, 41, 77, 60], [8, 20, 200, 6, 19, 33], [70, 71, 72, 73, 90, 12]])
ONES = torch.ones_like(IDS)
OPERATIONS = ["clamp", "scale", "add", "ablate", "project_out", "clip"]
NEW = 7


def gate(lm: LanguageModel, site: str, *, threshold: float) -> Gate:
    return Gate(Site.parse(site), np.random.default_rng(3).normal(size=lm.d_in), 0.0, threshold, "gate")


def all_sites(lm: LanguageModel) -> list[Site]:
    return [Site(layer, kind) for layer in range(lm.n_layers) for kind in STREAM_KINDS]


def hf_generate(lm: LanguageModel, ids: Tensor, mask: Tensor, new: int = NEW) -> Tensor:
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": lm.pad_id}
    return lm.model.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :]


@pytest.mark.parametrize("kind", STREAM_KINDS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_edit_does_at_its_site_what_the_reference_says(
    lm: LanguageModel, make_edit: Make, kind: str, operation: str
) -> None:
    bare = read_sites(lm, IDS, ONES, all_sites(lm))
    edit = make_edit(lm, f"layers.0.{kind}", operation)
    x = bare[edit.site].numpy()
    edit = replace(edit, threshold=np.quantile(x @ edit.probe.T, 0.55, axis=(0, 1)))
    if operation == "clip":
        edit = replace(edit, value=tuple(np.quantile(x @ edit.directions.T, 0.3, axis=(0, 1))))
    with applied(lm, [edit]) as run:
        edited = read_sites(lm, IDS, ONES, all_sites(lm))
    expected, fired = apply_reference(bare[edit.site].numpy(), edit)
    np.testing.assert_allclose(edited[edit.site].numpy(), expected, rtol=1e-4, atol=1e-4)
    assert 0 < fired.sum() < fired.size
    assert (run.fired == fired.sum(axis=1)).all() and (run.considered == IDS.shape[1]).all()
    # Tokens where nothing fires keep their value to the bit.
    assert torch.equal(edited[edit.site][~torch.tensor(fired)], bare[edit.site][~torch.tensor(fired)])
    # What was computed before stays, but for attn_out, which carries an edit of resid_mid; what comes after
    # has changed, through the residual stream and through the sublayers.
    carrier = Site(0, "attn_out") if kind == "resid_mid" else None
    before = [s for s in bare if s.depth < edit.site.depth and s != carrier]
    after = [s for s in bare if s.depth > edit.site.depth]
    assert all(torch.equal(edited[s], bare[s]) for s in before)
    assert after and not any(torch.allclose(edited[s], bare[s], atol=1e-5) for s in after)
    for layer in range(lm.n_layers):
        at = {kind: edited[Site(layer, kind)] for kind in STREAM_KINDS}
        torch.testing.assert_close(at["resid_pre"] + at["attn_out"], at["resid_mid"], rtol=1e-4, atol=1e-4)
        if edit.site != Site(layer, "resid_post"):
            torch.testing.assert_close(
                at["resid_mid"] + at["mlp_out"], at["resid_post"], rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("kind", STREAM_KINDS)
def test_closed_gates_and_no_edits_are_bitwise_nothing(lm: LanguageModel, make_edit: Make, kind: str) -> None:
    bare, inside = logits_and_sites(lm, IDS, ONES, all_sites(lm))
    words = hf_generate(lm, IDS, ONES)
    closed = make_edit(lm, f"layers.0.{kind}", gate=gate(lm, f"layers.0.{kind}", threshold=np.inf))
    never = make_edit(lm, f"layers.0.{kind}", threshold=np.full(2, np.inf))
    for edits in ([], [closed], [never], [closed, never]):
        with applied(lm, edits) as run:
            logits, sites = logits_and_sites(lm, IDS, ONES, all_sites(lm))
            assert torch.equal(logits.view(torch.int32), bare.view(torch.int32))
            assert all(torch.equal(sites[s].view(torch.int32), inside[s].view(torch.int32)) for s in sites)
            assert torch.equal(hf_generate(lm, IDS, ONES), words)
        assert all(count.fired == 0 for count in run.counts)
        assert [c.gated for c in run.counts] == [6 if e.gate else 0 for e in edits]
        assert [c.considered for c in run.counts] == [0 if e.gate else 6 * 6 + 3 * (NEW - 1) for e in edits]


@pytest.mark.parametrize("positions", ["all", "prompt", "reply"])
@pytest.mark.parametrize("kind", STREAM_KINDS)
def test_generation_with_a_cache_equals_full_passes_without_one(
    lm: LanguageModel, make_edit: Make, kind: str, positions: str
) -> None:
    edits = [
        make_edit(lm, f"layers.0.{kind}", "clamp", positions=positions, name="a"),
        make_edit(lm, f"layers.1.{kind}", "add", positions="all", seed=1, name="b"),
    ]
    mask = ONES.clone()
    mask[1, :2] = 0  # left padding
    with applied(lm, edits) as run:
        said = hf_generate(lm, IDS, mask)
    cached = run.considered, run.fired

    ids = IDS
    for step in range(NEW):
        full = torch.cat([mask, torch.ones(3, step, dtype=torch.long)], dim=1)
        reply = torch.zeros_like(ids)
        reply[:, IDS.shape[1] :] = 1
        with applied(lm, edits, reply_mask=reply) as run:
            logits, _ = logits_and_sites(lm, ids, full)
        ids = torch.cat([ids, said[:, step : step + 1]], dim=1)
        chosen = logits[:, -1].clone()
        chosen[:, list(lm.eos_ids)] = -torch.inf  # as min_new_tokens does
        gap = chosen.amax(dim=1) - chosen.gather(1, said[:, step : step + 1])[:, 0]
        assert (gap < 1e-3).all(), f"token {step} is not what the edited model would say"
    np.testing.assert_array_equal(run.considered, cached[0])
    np.testing.assert_array_equal(run.fired, cached[1])
    tokens = {"all": (12, 10), "prompt": (6, 4), "reply": (6, 6)}[positions]
    assert cached[0][0].tolist() == [tokens[0], tokens[1], tokens[0]]
    assert not torch.equal(said, hf_generate(lm, IDS, mask)), "the edits were to change the words"


def test_every_decoded_token_is_edited(lm: LanguageModel, make_edit: Make) -> None:
    """Under an edit of the reply alone, the layer's output before and after it at each decoded token."""
    edit = make_edit(lm, "layers.1.resid_post", "add", threshold=np.full(2, -np.inf), positions="reply")
    seen: list[Tensor] = []
    outer = lm.layout.layers[1].register_forward_hook(lambda _, __, out: seen.append(out.clone()))
    try:
        with applied(lm, [edit]) as run:
            late = lm.layout.layers[1].register_forward_hook(lambda _, __, out: seen.append(out.clone()))
            hf_generate(lm, IDS, ONES)
            late.remove()
    finally:
        outer.remove()
    before, after = seen[::2], seen[1::2]
    assert len(before) == NEW and torch.equal(before[0], after[0])
    for x, y in zip(before[1:], after[1:], strict=True):
        np.testing.assert_allclose(y.numpy(), apply_reference(x.numpy(), edit)[0], rtol=1e-5, atol=1e-4)
    assert run.counts[0].considered == run.counts[0].fired == 3 * (NEW - 1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_pads_are_neither_edited_nor_counted(lm: LanguageModel, make_edit: Make, side: str) -> None:
    edit = make_edit(lm, "layers.0.resid_mid")
    with applied(lm, [edit]) as run:
        alone = read_sites(lm, IDS[:1, :4], ONES[:1, :4], all_sites(lm))
    counted = run.fired[0, 0]
    mask, ids = ONES.clone(), IDS.clone()
    pads = slice(0, 2) if side == "left" else slice(4, 6)
    real = slice(2, 6) if side == "left" else slice(0, 4)
    mask[0, pads], ids[0, real], ids[0, pads] = 0, IDS[0, :4], lm.pad_id
    bare = read_sites(lm, ids, mask, [edit.site])[edit.site]
    with applied(lm, [edit]) as run:
        found = read_sites(lm, ids, mask, all_sites(lm))
    for site, x in found.items():
        torch.testing.assert_close(x[0, real], alone[site][0], rtol=1e-4, atol=1e-4)
    assert torch.equal(found[edit.site][0, pads], bare[0, pads])
    assert run.considered[0].tolist() == [4, 6, 6] and run.fired[0, 0] == counted


@pytest.mark.parametrize("site", ["layers.0.resid_mid", "layers.1.resid_pre", "layers.1.resid_mid"])
@pytest.mark.parametrize("positions", ["all", "reply"])
def test_a_gate_is_decided_once_on_the_last_prompt_token(
    lm: LanguageModel, make_edit: Make, site: str, positions: str
) -> None:
    mask, ids = ONES.clone(), IDS.clone()
    mask[2, :3] = 0
    ask = gate(lm, site, threshold=0.0)
    scores = read_sites(lm, ids, mask, [ask.site])[ask.site][:, -1].numpy() @ ask.weight
    ask = replace(ask, threshold=float(np.sort(scores)[1]) - 1e-3)  # two of three open
    opened = scores > ask.threshold
    edit = make_edit(lm, "layers.1.resid_mid", gate=ask, positions=positions, name="gated")
    bare = hf_generate(lm, ids, mask)
    with applied(lm, [edit, replace(edit, gate=None, name="free")]) as run:
        hf_generate(lm, ids, mask)
    with applied(lm, [edit]) as run:
        said = hf_generate(lm, ids, mask)
    assert run.open[0].tolist() == opened.tolist() and opened.sum() == 2
    assert torch.equal(said[~opened], bare[~opened]) and not torch.equal(said[opened], bare[opened])
    assert run.counts[0].gated == 1 and run.counts[0].sequences == 3
    prompt = mask.sum(dim=1).numpy() if positions == "all" else 0
    assert run.considered[0].tolist() == np.where(opened, prompt + NEW - 1, 0).tolist()
    assert [counts[0].gated for counts in run.by_sequence()] == (~opened).astype(int).tolist()
    # The last prompt token also under right padding.
    right, shifted = ONES.clone(), IDS.clone()
    right[2, 3:], shifted[2, :3] = 0, IDS[2, 3:]
    with applied(lm, [edit]) as run:
        lm.model(**lm.inputs(shifted, right))
    assert run.open[0].tolist() == opened.tolist()


def test_a_gate_may_look_deeper_than_an_edit_of_the_reply(lm: LanguageModel, make_edit: Make) -> None:
    deep = gate(lm, "layers.1.resid_post", threshold=-np.inf)
    early = make_edit(lm, "layers.0.resid_pre", gate=deep, positions="reply")
    with applied(lm, [early]) as run:
        hf_generate(lm, IDS, ONES)
    assert run.considered.tolist() == [[NEW - 1] * 3]
    with pytest.raises(UserError, match="is read after"), applied(lm, [replace(early, positions="all")]):
        pass
    with pytest.raises(UserError, match="is read after"), applied(lm, [early], reply_mask=ONES):
        lm.model(IDS)


def test_edits_at_one_site_are_applied_in_the_order_given(lm: LanguageModel, make_edit: Make) -> None:
    first, second = (make_edit(lm, "layers.0.resid_mid", "clamp", seed=s) for s in (0, 1))
    inner = make_edit(lm, "layers.0.attn_out", "add", seed=2)
    bare = read_sites(lm, IDS, ONES, [Site(0, "attn_out"), Site(0, "resid_pre")])
    attn = apply_reference(bare[Site(0, "attn_out")].numpy(), inner)[0]
    x = bare[Site(0, "resid_pre")].numpy() + attn
    for edit in (first, second):
        x = apply_reference(x, edit)[0]
    with applied(lm, [first, second, inner]):
        found = read_sites(lm, IDS, ONES, [Site(0, "resid_mid")])[Site(0, "resid_mid")]
    np.testing.assert_allclose(found.numpy(), x, rtol=1e-4, atol=1e-3)


def test_counts_add_up_over_batches_and_stop_at_the_end_of_a_sequence(
    lm: LanguageModel, make_edit: Make
) -> None:
    edit = make_edit(lm, "layers.0.resid_pre", "add", threshold=np.full(2, -np.inf), positions="reply")
    eos = lm.eos_ids[0]
    with applied(lm, [edit]) as run:
        for ending in (1, 3):
            cache = lm.model(IDS, use_cache=True).past_key_values
            for step in range(5):
                token = torch.full((3, 1), 30)
                token[0] = eos if step == ending else 30  # what is fed after the end is padding
                cache = lm.model(token, past_key_values=cache, use_cache=True).past_key_values
            assert run.considered.tolist() == run.fired.tolist() == [[ending, 5, 5]]
    assert (run.counts[0].considered, run.counts[0].fired, run.counts[0].sequences) == (24, 24, 6)


def test_half_precision(tiny_llama: object, make_edit: Make) -> None:
    from unbraid.model.load import load_model

    lm = load_model(str(tiny_llama), dtype="bfloat16")
    edit = make_edit(lm, "layers.1.resid_post", "clip", value=0.2)
    bare = read_sites(lm, IDS, ONES, [edit.site])[edit.site]
    with applied(lm, [edit]):
        found = read_sites(lm, IDS, ONES, [edit.site])[edit.site]
    expected, _ = apply_reference(bare.float().numpy(), edit)
    assert found.dtype == torch.bfloat16
    np.testing.assert_allclose(found.float().numpy(), expected, rtol=2e-2, atol=2e-2)


def test_what_cannot_be_edited_is_refused(lm: LanguageModel, make_edit: Make) -> None:
    edit = make_edit(lm, "layers.1.resid_post", positions="reply")
    for bad, message in [
        (replace(edit, site=Site(9, "resid_post")), r"layers\.9\.resid_post does not exist"),
        (replace(edit, probe=np.ones((2, 3)), write=np.ones((2, 3))), "3 dimensions"),
        (replace(edit, gate=Gate(edit.site, np.ones(3), 0.0)), "3 dimensions"),
    ]:
        with pytest.raises(UserError, match=message), applied(lm, [bad]):
            pytest.fail("entered")
    cache = lm.model(IDS, use_cache=True).past_key_values
    with pytest.raises(UserError, match="middle of a cached generation"), applied(lm, [edit]):
        lm.model(IDS[:, :1], past_key_values=cache)
    with applied(lm, [edit]), pytest.raises(UserError, match="neither prompt nor reply"):
        cache = lm.model(IDS, use_cache=True).past_key_values
        lm.model(IDS[:, :2], past_key_values=cache)
    with applied(lm, [edit]), pytest.raises(UserError, match="2-D attention mask"):
        lm.model(IDS, attention_mask=torch.ones(3, 1, 6, 6))


def test_hooks_are_removed_after_an_error(lm: LanguageModel, make_edit: Make) -> None:
    bare = lm.model(IDS).logits
    with pytest.raises(RuntimeError, match="stop"), applied(lm, [make_edit(lm, "layers.0.resid_mid")]):
        raise RuntimeError("stop")
    assert torch.equal(lm.model(IDS).logits, bare)
