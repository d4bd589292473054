"""Replacing an activation by a function of it."""

from __future__ import annotations

import pytest
import torch

from unbraid.manifest.errors import UserError
from unbraid.model.load import LanguageModel
from unbraid.model.read import logits_and_sites, read_sites
from unbraid.model.replace import replaced
from unbraid.model.sites import STREAM_KINDS, Site

IDS = torch.tensor([[5, 9, 30, 7, 12], [8, 3, 40, 2, 6]])
MASK = torch.ones_like(IDS)
CHOSEN = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 1, 1, 0]]).bool()


@pytest.mark.parametrize("kind", STREAM_KINDS)
def test_the_site_reads_what_was_put_there(lm: LanguageModel, kind: str) -> None:
    site = Site.parse(f"layers.1.{kind}")
    before = read_sites(lm, IDS, MASK, [site])[site]
    clean, _ = logits_and_sites(lm, IDS, MASK)
    seen: list[torch.Tensor] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return 1 - x

    with replaced(lm, site, function, CHOSEN):
        logits, sites = logits_and_sites(lm, IDS, MASK, [site])
    torch.testing.assert_close(seen[0], before[CHOSEN])
    changed = sites[site]
    torch.testing.assert_close(changed[CHOSEN], 1 - before[CHOSEN], rtol=1e-4, atol=1e-4)
    assert torch.equal(changed[~CHOSEN], before[~CHOSEN])
    assert not torch.allclose(logits[CHOSEN], clean[CHOSEN], atol=1e-3)
    assert torch.equal(logits[:, 0], clean[:, 0])  # nothing was changed at or before the first token


def test_the_same_value_back_changes_nothing_and_no_hook_stays(lm: LanguageModel) -> None:
    site = Site.parse("layers.0.resid_post")
    clean, _ = logits_and_sites(lm, IDS, MASK)
    with replaced(lm, site, lambda x: x.clone(), CHOSEN):
        same, _ = logits_and_sites(lm, IDS, MASK)
    assert torch.equal(same, clean)
    with pytest.raises(RuntimeError, match="broken"), replaced(lm, site, torch.zeros_like, CHOSEN):
        raise RuntimeError("broken")
    after, _ = logits_and_sites(lm, IDS, MASK)
    assert torch.equal(after, clean)


def test_a_site_that_does_not_exist_is_refused(lm: LanguageModel) -> None:
    site = Site.parse("layers.7.resid_post")
    with pytest.raises(UserError, match=r"layers\.7"), replaced(lm, site, torch.zeros_like, CHOSEN):
        pass
