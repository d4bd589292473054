from __future__ import annotations

from pathlib import Path

import pytest
import torch

from unbraid.manifest.errors import UserError
from unbraid.model.load import LanguageModel, load_model
from unbraid.model.read import logits_and_sites, read_sites
from unbraid.model.sites import STREAM_KINDS, Site

IDS = torch.tensor([[5, 9, 30, 41, 77, 60], [8, 20, 200, 6, 19, 33]])


def all_sites(lm: LanguageModel) -> list[Site]:
    return [Site(layer, kind) for layer in range(lm.n_layers) for kind in STREAM_KINDS]


def check_identities(lm: LanguageModel) -> None:
    x = read_sites(lm, IDS, torch.ones_like(IDS), all_sites(lm))
    for layer in range(lm.n_layers):
        at = {kind: x[Site(layer, kind)] for kind in STREAM_KINDS}
        torch.testing.assert_close(at["resid_pre"] + at["attn_out"], at["resid_mid"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(at["resid_mid"] + at["mlp_out"], at["resid_post"], rtol=1e-5, atol=1e-5)
        assert at["attn_out"].abs().max() > 1e-3 and at["mlp_out"].abs().max() > 1e-3
        if layer:
            assert torch.equal(at["resid_pre"], x[Site(layer - 1, "resid_post")])


def test_residual_identities(lm: LanguageModel) -> None:
    check_identities(lm)


@pytest.mark.parametrize("name", ["stories260k", "tinystories-chat-3m"])
def test_residual_identities_in_trained_models(shared_models: Path, name: str) -> None:
    check_identities(load_model(shared_models / name))


def test_sites_are_what_the_library_records(lm: LanguageModel) -> None:
    mask = torch.ones_like(IDS)
    recorded = lm.model(IDS, attention_mask=mask, output_hidden_states=True).hidden_states
    x = read_sites(lm, IDS, mask, all_sites(lm))
    for layer in range(lm.n_layers):
        assert torch.equal(x[Site(layer, "resid_pre")], recorded[layer])
    # The last one recorded is after the final norm.
    last = lm.layout.final_norm(x[Site(lm.n_layers - 1, "resid_post")])  # type: ignore[misc]
    torch.testing.assert_close(last, recorded[-1])


def test_left_and_right_padding_give_the_same_activations(lm: LanguageModel) -> None:
    short = IDS[0, :4]
    left = torch.tensor([0, 0, *short]), [0, 0, 1, 1, 1, 1]
    right = torch.tensor([*short, 0, 0]), [1, 1, 1, 1, 0, 0]
    alone = read_sites(lm, short[None], torch.ones(1, 4), all_sites(lm))
    for ids, mask in (left, right):
        both = torch.stack([ids, IDS[1]]), torch.tensor([mask, [1] * 6])
        found = read_sites(lm, *both, all_sites(lm))
        for site, x in found.items():
            torch.testing.assert_close(x[0][torch.tensor(mask) == 1], alone[site][0], rtol=1e-4, atol=1e-4)


def test_no_layer_after_the_deepest_site_is_computed(llama: LanguageModel) -> None:
    ran: list[int] = []
    hooks = [
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
        for i, layer in enumerate(llama.layout.layers)
    ]
    try:
        mask = torch.ones_like(IDS)
        early = read_sites(llama, IDS, mask, [Site(1, "mlp_out"), Site(0, "resid_post")])
        assert ran == [0]
        late = read_sites(llama, IDS, mask, [Site(1, "mlp_out")], stop_early=False)
        assert ran == [0, 0, 1, 2]
    finally:
        for hook in hooks:
            hook.remove()
    assert torch.equal(early[Site(1, "mlp_out")], late[Site(1, "mlp_out")])


def test_reading_leaves_no_hook_behind_and_changes_nothing(lm: LanguageModel) -> None:
    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules())

    before = hooks()
    mask = torch.ones_like(IDS)
    bare = lm.model(IDS, attention_mask=mask).logits
    logits, _ = logits_and_sites(lm, IDS, mask, all_sites(lm))
    assert torch.equal(logits, bare)
    read_sites(lm, IDS, mask, all_sites(lm))
    assert hooks() == before


def test_a_site_that_is_not_there_is_named(lm: LanguageModel) -> None:
    with pytest.raises(UserError, match=r"layers\.9\.resid_post does not exist"):
        read_sites(lm, IDS, torch.ones_like(IDS), [Site(9, "resid_post")])
