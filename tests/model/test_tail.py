"""What comes after a site, run on its own, against the whole model."""

from __future__ import annotations

import pytest
import torch

from unbraid.manifest.errors import UserError
from unbraid.model.load import LanguageModel
from unbraid.model.read import logits_and_sites, read_sites
from unbraid.model.replace import replaced
from unbraid.model.sites import Site
from unbraid.model.tail import Tail

IDS = torch.tensor([[5, 9, 30, 7, 12], [8, 3, 40, 2, 6]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
CHOSEN = torch.tensor([[0, 1, 1, 0, 1], [0, 1, 1, 0, 0]]).bool()
SITES = ["layers.0.resid_pre", "layers.1.resid_pre", "layers.1.attn_out", "layers.1.resid_mid",
         "layers.1.mlp_out", "layers.0.resid_post", "layers.1.resid_post", "final_norm"]  # fmt: skip


@pytest.mark.parametrize("name", SITES)
def test_the_tail_is_the_model(lm: LanguageModel, name: str) -> None:
    site = Site.parse(name)
    tail = Tail(lm, site)
    assert tail.splits and tail.resumes == (tail.first > 0)
    stream = read_sites(lm, IDS, MASK, [tail.entry])[tail.entry]
    clean, _ = logits_and_sites(lm, IDS, MASK)
    torch.testing.assert_close(tail.logits(tail.states(IDS, MASK, stream))[MASK.bool()], clean[MASK.bool()])
    with replaced(lm, site, lambda x: 1 - x, CHOSEN):
        expected, _ = logits_and_sites(lm, IDS, MASK)
        found = tail.logits(tail.states(IDS, MASK, stream))
        torch.testing.assert_close(found[MASK.bool()], expected[MASK.bool()])
    assert not torch.allclose(expected, clean, atol=1e-3)
    after, _ = logits_and_sites(lm, IDS, MASK)  # the layers run again
    assert torch.equal(after, clean)


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("layers.1.resid_pre", True),
        ("layers.1.resid_post", True),
        ("layers.1.attn_out", False),
        ("layers.1.mlp_out", False),
        ("final_norm", True),
    ],
)
def test_what_passes_by_a_site_is_found_out(lm: LanguageModel, name: str, whole: bool) -> None:
    assert Tail(lm, Site.parse(name)).whole is whole


def test_no_layer_before_the_site_runs(lm: LanguageModel) -> None:
    tail = Tail(lm, Site.parse("layers.1.resid_pre"))
    stream = read_sites(lm, IDS, MASK, [tail.entry])[tail.entry]
    ran: list[str] = []
    hooks = [
        layer.mlp.register_forward_hook(lambda *_, name=str(i): ran.append(name))
        for i, layer in enumerate(lm.layout.layers)
    ]
    tail.states(IDS, MASK, stream)
    for hook in hooks:
        hook.remove()
    assert ran == [str(i) for i in range(1, lm.n_layers)]


def test_a_model_whose_logits_are_more_than_an_unembedding_is_run_whole(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = type(lm.model).forward

    def capped(self: object, *args: object, **kwargs: object) -> object:
        out = forward(self, *args, **kwargs)  # type: ignore[arg-type]
        out.logits = 5 * torch.tanh(out.logits / 5)
        return out

    monkeypatch.setattr(type(lm.model), "forward", capped)
    tail = Tail(lm, Site.parse("layers.0.resid_post"))
    assert not tail.splits and tail.resumes
    stream = read_sites(lm, IDS, MASK, [tail.entry])[tail.entry]
    clean, _ = logits_and_sites(lm, IDS, MASK)
    torch.testing.assert_close(tail.logits(tail.states(IDS, MASK, stream))[MASK.bool()], clean[MASK.bool()])
    assert clean.abs().max() <= 5


def test_a_layer_that_cannot_be_left_out_is_run(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    first = lm.layout.layers[0]
    seen: list[torch.Tensor] = []

    def later(_: object, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return (
            output + seen.pop() if isinstance(output, torch.Tensor) else (output[0] + seen.pop(), *output[1:])
        )

    # What the first MLP puts out is added once more after the last layer: it passes by every site between.
    hooks = [
        first.mlp.register_forward_hook(lambda _, __, output: seen.append(output)),
        lm.layout.layers[-1].register_forward_hook(later),
    ]
    try:
        tail = Tail(lm, Site.parse("layers.0.resid_post"))
        assert not tail.resumes and not tail.whole
        clean, _ = logits_and_sites(lm, IDS, MASK)
        torch.testing.assert_close(tail.logits(tail.states(IDS, MASK, None)), clean)
    finally:
        for hook in hooks:
            hook.remove()


def test_what_is_not_there_is_refused(lm: LanguageModel) -> None:
    with pytest.raises(UserError, match=r"layers\.9"):
        Tail(lm, Site.parse("layers.9.resid_post"))
