"""Which array is which site is said by its name where that is unambiguous, or else by the user."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from unbraid.activations.matching import ImportOptions, Matching, site_of
from unbraid.manifest.errors import UserError


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("layers.3.resid_post", "layers.3.resid_post"),
        ("blocks.3.hook_resid_post", "layers.3.resid_post"),
        ("blocks.3.hook_mlp_out", "layers.3.mlp_out"),
        ("blocks.3.attn.hook_z", "layers.3.attn_z"),
        ("ln_final.hook_out", "final_norm"),
        ("model.layers.3", "layers.3.resid_post"),
        ("transformer.h.3", "layers.3.resid_post"),
        ("model.layers[3].output[0]", "layers.3.resid_post"),
        ("transformer.h.3.output", "layers.3.resid_post"),
        ("model.layers.3.self_attn", None),  # what is added to the stream in most families, but not in all
        ("transformer.h[3].mlp.output", None),
        ("model.layers.3.input", None),
        ("blocks.3.ln1.hook_normalized", None),
        ("blocks.3.hook_mlp_in", None),
        ("hidden_states.3", None),
        ("acts", None),
    ],
)
def test_names_of_sites(name: str, site: str | None) -> None:
    found = site_of(name)
    assert (found and str(found)) == site


def plan(
    folder: Path, arrays: dict[str, Tensor], sites: tuple[str, ...] = (), options: ImportOptions | None = None
) -> Matching:
    save_file({name: x.clone() for name, x in arrays.items()}, folder / "a.safetensors")
    return Matching([folder / "a.safetensors"], sites, options or ImportOptions())


POST, OUT = "blocks.1.hook_resid_post", "blocks.1.hook_mlp_out"


def test_all_arrays_named_after_sites_are_taken(tmp_path: Path) -> None:
    acts = {name: torch.zeros(2, 3, 4) for name in (POST, OUT, "blocks.1.ln1.hook_scale")}
    found = plan(tmp_path, acts | {"tokens": torch.zeros(2, 3, dtype=torch.int64)})
    assert {str(site): column.name for site, column in found.sites.items()} == {
        "layers.1.resid_post": POST,
        "layers.1.mlp_out": OUT,
    }
    assert found.tokens is not None and found.mask is None
    assert found.left_out == ["blocks.1.ln1.hook_scale"] and found.unknown(None) == ["model", "tokenizer"]
    assert (found.rows, found.documents, found.context) == (6, 2, 3)


def test_a_site_is_chosen_by_name_by_array_or_as_the_only_one(tmp_path: Path) -> None:
    x = torch.zeros(6, 4)
    by_name = plan(tmp_path, {POST: x, OUT: x}, (OUT,))
    assert list(map(str, by_name.sites)) == ["layers.1.mlp_out"] and by_name.left_out == [POST]
    by_array = plan(tmp_path, {"x": x, "y": x}, ("layers.2.resid_mid=y",))
    assert by_array.sites.popitem()[1].name == "y"
    only = plan(tmp_path, {"x": x}, ("layers.2.resid_mid",))
    assert only.sites.popitem()[1].name == "x"
    file = plan(tmp_path, {"x": x, "y": x}, (f"layers.2.resid_mid={tmp_path / 'a.safetensors'}#y",))
    assert file.sites.popitem()[1].name == "y"
    assert only.unknown(None) == ["model", "tokenizer", "tokens", "documents"]


def test_heads_stand_side_by_side(tmp_path: Path) -> None:
    z = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    found = plan(tmp_path, {"blocks.0.attn.hook_z": z, "blocks.0.hook_resid_pre": torch.zeros(2, 3, 20)})
    column = {str(site): column for site, column in found.sites.items()}["layers.0.attn_z"]
    assert column.width == 20 and torch.equal(column.read(1, 5), z.reshape(6, 20)[1:5])


INTS = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arrays", "sites", "options", "says"),
    [
        ({"x": torch.zeros(6, 4)}, (), {}, r"no array is named after a site; .*the arrays are x"),
        ({"model.layers.1.mlp": torch.zeros(6, 4)}, (), {}, "the arrays are model.layers.1.mlp"),
        ({POST: torch.zeros(4)}, (), {}, r"shape \(4,\) where \(batch, positions, d\) or \(n, d\) is meant"),
        ({POST: torch.zeros(1, 2, 3, 4)}, (), {}, "is meant"),
        ({POST: torch.zeros(0, 4)}, (), {}, "has no rows"),
        ({POST: INTS}, (), {}, "holds int64, which activations are not"),
        ({"blocks.1.attn.hook_z": torch.zeros(2, 3, 4)}, (), {}, r"may be \(n, heads, d_head\)"),
        ({POST: torch.zeros(6, 4), OUT: torch.zeros(5, 4)}, (), {}, "has 6 rows but .* has 5"),
        (
            {POST: torch.zeros(2, 3, 4), OUT: torch.zeros(3, 2, 4)},
            (),
            {},
            r"is \[2, 3\] but .* is \[3, 2\], batch by",
        ),
        ({POST: torch.zeros(6, 4), "tokens": INTS[0]}, (), {}, r"tokens \(tokens\) has 3 rows but .* has 6"),
        ({POST: torch.zeros(2, 3, 4), "mask": torch.zeros(2, 3)}, (), {}, "mask holds float32, not whole"),
        (
            {POST: torch.zeros(6, 4)},
            (),
            {"tokens": "ids"},
            f"--tokens ids is neither .* the arrays are {POST}",
        ),
        ({POST: torch.zeros(6, 4)}, (), {"drop_tokens": (0,)}, "--drop-tokens needs the tokens"),
        ({POST: torch.zeros(6, 4)}, ("layers.1.mlp_out=z",), {}, f"neither .*; the arrays are {POST}"),
        ({POST: torch.zeros(6, 4)}, (OUT, POST), {}, "no array is named after layers.1.mlp_out"),
        ({POST: torch.zeros(6, 4)}, (POST, POST), {}, "given twice"),
        ({POST: torch.zeros(6, 4)}, ("layers.x=" + POST,), {}, "'layers.x' is not known"),
        (
            {POST: torch.zeros(6, 4), "model.layers.1": torch.zeros(6, 4)},
            (),
            {},
            "several arrays are named after layers.1.resid_post; write --site layers.1.resid_post=NAME",
        ),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    tmp_path: Path, arrays: dict[str, Tensor], sites: tuple[str, ...], options: dict[str, object], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        plan(tmp_path, arrays, sites, ImportOptions(**options))  # type: ignore[arg-type]


def test_an_array_in_two_files_and_parts_that_differ_are_refused(tmp_path: Path) -> None:
    for name, width in (("1", 4), ("2", 5)):
        save_file({POST: torch.zeros(6, width)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match=f"both hold {POST}; give their folder"):
        Matching([tmp_path / "1.safetensors", tmp_path / "2.safetensors"], (), ImportOptions())
    with pytest.raises(UserError, match=r"is float32 \(6, 5\) but float32 \(6, 4\) in"):
        Matching([tmp_path], (), ImportOptions())
    save_file({"a": torch.zeros(6, 4), "b": torch.zeros(6, 4)}, tmp_path / "3.safetensors")
    with pytest.raises(UserError, match=r"does not name one array; write .*#NAME with one of a, b"):
        Matching([], (f"layers.1.mlp_in={tmp_path / '3.safetensors'}",), ImportOptions())
