"""Rare strata are favoured by a rule that needs no second pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from unbraid.activations.documents import Document
from unbraid.activations.strata import MOST_STRATA, Strata
from unbraid.manifest.errors import UserError


def documents(names: list[str]) -> Iterator[Document]:
    return (Document.of_text(f"text {n}", stratum=name) for n, name in enumerate(names))


def mixed(**counts: int) -> list[str]:
    names = [name for name, count in counts.items() for _ in range(count)]
    return [str(name) for name in np.random.default_rng(0).permutation(names)]


def test_strata_count_by_the_root_of_their_size() -> None:
    strata = Strata(25, seed=0)
    kept = Counter(d.stratum for d in strata.sample(documents(mixed(huge=40_000, large=2_500, rare=25))))
    assert kept == Counter(strata.kept) and kept["rare"] == 25
    for name, size in (("large", 2_500), ("huge", 40_000)):
        chances = np.sqrt(np.minimum(1, 25 / np.arange(1, size + 1)))
        deviation = np.sqrt((chances * (1 - chances)).sum())
        assert abs(kept[name] - chances.sum()) < 4 * deviation
        assert chances.sum() == pytest.approx(2 * (25 * size) ** 0.5, rel=0.1)
    assert strata.facts()["huge"] == {"read": 40_000, "kept": kept["huge"]}
    assert list(strata.facts()) == ["huge", "large", "rare"]


def test_one_strata_choice_does_not_depend_on_the_others() -> None:
    names = mixed(a=300, b=200)
    together = [d.text for d in Strata(5, seed=1).sample(documents(names)) if d.stratum == "a"]
    alone = (d for d in documents(names) if d.stratum == "a")
    assert [d.text for d in Strata(5, seed=1).sample(alone)] == together
    assert [d.text for d in Strata(5, seed=2).sample(documents(names)) if d.stratum == "a"] != together


def test_a_small_corpus_is_taken_as_it_is() -> None:
    names = mixed(a=7, b=9)
    assert [d.stratum for d in Strata(9, seed=0).sample(documents(names))] == names


def test_what_are_no_strata_is_refused() -> None:
    with pytest.raises(UserError, match="has no field stratum"):
        list(Strata(1, seed=0).sample([Document.of_text("a", id="me")]))
    with pytest.raises(UserError, match="is the field stratum what you mean"):
        list(Strata(1, seed=0).sample(documents([str(n) for n in range(MOST_STRATA + 1)])))
