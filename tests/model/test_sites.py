from __future__ import annotations

import pytest

from unbraid.manifest.errors import UserError
from unbraid.model.sites import KINDS, Site

NAMES = [kind if kind == "final_norm" else f"layers.12.{kind}" for kind in KINDS]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stack", ["", "encoder.", "decoder."])
def test_a_site_is_read_as_it_is_written(name: str, stack: str) -> None:
    site = Site.parse(stack + name)
    assert str(site) == stack + name and site.stack == stack.removesuffix(".")


@pytest.mark.parametrize("name", NAMES)
def test_transformer_lens_names_are_the_same_places_or_refused(name: str) -> None:
    site = Site.parse(name)
    if site.kind == "cross_out":
        with pytest.raises(UserError, match="no hook that means"):
            _ = site.transformer_lens
    else:
        assert Site.parse(site.transformer_lens) == site
    with pytest.raises(UserError, match="no hook that means"):
        _ = Site.parse(f"encoder.{name}").transformer_lens


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("model.layers.2", "layers.2.resid_post"),
        ("transformer.h.2", "layers.2.resid_post"),
        ("model.layers.2.mlp", "layers.2.mlp_out"),
        ("transformer.h.0.attn", "layers.0.attn_out"),
        ("model.layers.7.self_attn", "layers.7.attn_out"),
        ("model.decoder.layers.7", "layers.7.resid_post"),
        ("blocks.3.attn.hook_z", "layers.3.attn_z"),
        ("blocks.3.mlp.hook_in", "layers.3.mlp_in"),
        ("ln_final.hook_out", "final_norm"),
    ],
)
def test_names_of_others(name: str, site: str) -> None:
    assert str(Site.parse(name)) == site


@pytest.mark.parametrize(
    "name",
    [
        "layers.2.resid_psot",
        "blocks.x.hook_resid_pre",
        "",
        "layers.-1.resid_pre",
        "2",
        "layers.2.final_norm",
        "resid_pre",
        # In TransformerLens the stream before the MLP's norm, and a norm's value before its own scale.
        "blocks.2.hook_mlp_in",
        "blocks.2.ln2.hook_normalized",
        "ln_final.hook_normalized",
        "blocks.2.hook_attn_z",
        # One stack or two? The layers of an encoder alone have no prefix.
        "encoder.layer.2",
    ],
)
def test_an_unknown_name_lists_the_kinds(name: str) -> None:
    with pytest.raises(UserError, match="resid_pre, attn_z, attn_out"):
        Site.parse(name)


def test_depth_is_the_order_of_computation() -> None:
    names = [f"layers.{layer}.{kind}" for layer in range(3) for kind in KINDS[:-1]] + ["final_norm"]
    names = ["encoder." + name for name in names] + ["decoder." + name for name in names]
    assert sorted(map(Site.parse, reversed(names)), key=lambda s: s.depth) == [Site.parse(n) for n in names]
