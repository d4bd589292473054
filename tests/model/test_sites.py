from __future__ import annotations

import pytest

from unbraid.manifest.errors import UserError
from unbraid.model.sites import KINDS, Site


@pytest.mark.parametrize("kind", KINDS)
def test_every_spelling_of_a_site_is_the_same_place(kind: str) -> None:
    site = Site.parse(f"layers.12.{kind}")
    assert str(site) == f"layers.12.{kind}"
    assert Site.parse(str(site)) == Site.parse(site.transformer_lens) == site


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("model.layers.2", "layers.2.resid_post"),
        ("transformer.h.2", "layers.2.resid_post"),
        ("model.layers.2.mlp", "layers.2.mlp_out"),
        ("transformer.h.0.attn", "layers.0.attn_out"),
        ("model.layers.7.self_attn", "layers.7.attn_out"),
    ],
)
def test_hugging_face_module_names(name: str, site: str) -> None:
    assert str(Site.parse(name)) == site


@pytest.mark.parametrize(
    "name", ["layers.2.resid_psot", "blocks.x.hook_resid_pre", "", "layers.-1.resid_pre", "2"]
)
def test_an_unknown_name_lists_the_kinds(name: str) -> None:
    with pytest.raises(UserError, match="resid_pre, attn_out, resid_mid, mlp_out, resid_post"):
        Site.parse(name)


def test_depth_is_the_order_of_computation() -> None:
    names = [f"layers.{layer}.{kind}" for layer in range(3) for kind in KINDS]
    assert sorted(map(Site.parse, reversed(names)), key=lambda s: s.depth) == [Site.parse(n) for n in names]
