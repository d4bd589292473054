"""First-letter absorption by its definition, and on a tiny vocabulary."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from unbraid.activations.documents import Document
from unbraid.evaluation.absorption import absorbed, cosines
from unbraid.evaluation.first_letter import (
    DEFINITIONS,
    absorption_first_letter,
    absorption_fraction,
    full_absorption,
    main_latents,
    vocabulary,
)
from unbraid.evaluation.labelled import Reading, split_documents, tasks
from unbraid.manifest.errors import UserError
from unbraid.model.load import LanguageModel
from unbraid.model.sites import Site
from unbraid.sae.base import SAE

from .planted import labelled

READING = Reading(Site.parse("layers.1.resid_post"))


def _plain(dense: np.ndarray, main: list[int], projection: float, aligned: np.ndarray) -> tuple[bool, float]:
    """One word, latent by latent."""
    carried = [float(v * c) for v, c in zip(dense, aligned, strict=True)]
    best = max(range(len(carried)), key=lambda j: carried[j])
    full = (
        all(dense[j] == 0 for j in main) and carried[best] > 0 and aligned[best] >= 0.025
        and projection > 0 and carried[best] >= 0.4 * projection
    )  # fmt: skip
    own = sum(carried[j] for j in main)
    others = sorted(
        (carried[j] for j in range(len(carried)) if j not in main and aligned[j] >= 0.1 and carried[j] > 0),
        reverse=True,
    )
    lent = sum(others[:3])
    if projection <= 0 or own >= projection or lent < 0.4 * projection:
        return full, 0.0
    if own <= 0:
        return full, 1.0
    taken = min(lent, projection - own)
    return full, taken / (taken + own)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), width=st.integers(1, 6), count=st.integers(1, 3))
def test_both_scores_are_those_of_each_word_by_itself(seed: int, width: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    dense = np.maximum(rng.normal(size=(20, width)), 0)
    aligned, projection = rng.uniform(-0.5, 1, size=width), rng.normal(size=20) + 0.7
    main = rng.permutation(width)[: min(count, width)].astype(np.int64)
    full = full_absorption(dense, main, projection, aligned)
    fraction = absorption_fraction(dense, main, projection, aligned)
    for i in range(20):
        expected = _plain(dense[i], main.tolist(), float(projection[i]), aligned)
        assert bool(full[i]) == expected[0] and fraction[i] == pytest.approx(expected[1])


def test_a_planted_absorption_is_seen() -> None:
    aligned = np.array([1.0, 0.8, 0.0])
    projection = np.ones(4)
    dense = np.array([[1.0, 0, 5], [0, 1.0, 5], [0, 0, 5], [0.5, 0.5, 0]])
    main = np.array([0])
    assert full_absorption(dense, main, projection, aligned).tolist() == [False, True, False, False]
    found = absorption_fraction(dense, main, projection, aligned)
    np.testing.assert_allclose(found, [0, 1, 0, 0.4 / 0.9])
    none = absorbed(projection, np.zeros((4, 0)), np.zeros((4, 0), dtype=np.int64), aligned)
    assert none.tolist() == [False] * 4


def test_the_more_words_the_main_latent_leaves_to_another_the_higher_both_scores() -> None:
    rng = np.random.default_rng(0)
    words, strength = 50, rng.uniform(1, 2, 50)
    main, aligned = np.array([0]), np.array([1.0, 0.9, 0.0])
    scores: list[tuple[float, float]] = []
    for share in (0.0, 0.2, 0.5, 1.0):
        taken = np.arange(words) < share * words
        dense = np.stack([strength * ~taken, strength * taken, rng.uniform(0, 1, words)], axis=1)
        full = full_absorption(dense, main, strength, aligned)
        fraction = absorption_fraction(dense, main, strength, aligned)
        scores.append((float(full.mean()), float(fraction.mean())))
        # Where the other latent points elsewhere, as in a permuted decoder, nothing is absorbed.
        elsewhere = np.array([1.0, 0.0, 0.0])
        assert not full_absorption(dense, main, strength, elsewhere).any()
        assert not absorption_fraction(dense, main, strength, elsewhere).any()
    assert [full for full, _ in scores] == [0.0, 0.2, 0.5, 1.0]
    assert np.diff([fraction for _, fraction in scores]).min() > 0 and scores[0][1] == 0


def test_main_latents_are_as_many_as_the_label_needs() -> None:
    documents = labelled(600, ("a", "b", "c"))
    rng = np.random.default_rng(0)
    yes = np.array([d.labels["colour"] == "a" for d in documents])
    half = rng.random(600) < 0.5
    codes = np.abs(rng.normal(size=(600, 12))) * 0.01
    codes[:, 4] += yes & half
    codes[:, 9] += yes & ~half
    task = tasks(documents, split_documents(documents, 0), 0)[0]
    assert set(main_latents(csr_array(codes), task)) == {4, 9}
    codes[:, 4] += yes & ~half
    assert main_latents(csr_array(codes), task).tolist() == [4]


def test_the_suite_runs_on_words_and_says_when_there_are_too_few(lm: LanguageModel, sae: SAE) -> None:
    endings = ("ed ball", "wo tablets", "ith water")
    words = [
        Document.of_text(f" {letter}{endings[place]} {i}", labels={"first letter": letter})
        for i in range(60) for place, letter in enumerate("rtw")
    ]  # fmt: skip
    found = absorption_first_letter({"sae": sae}, (), lm, READING, 0, words=words, resamples=50)
    assert set(found.rows["sae"]) == set(DEFINITIONS)
    for name, interval in found.rows["sae"].items():
        assert interval.low <= interval.value <= interval.high, name
        assert 0 <= interval.value <= (10 if name == "mean_num_split_features" else 1)
    assert found.rows["sae"]["mean_num_split_features"].value >= 1
    # A latent a letter that fires where the letter's probe is right leaves nothing to be absorbed.
    ideal = found.rows["letter probes"]
    assert ideal["mean_full_absorption_score"].value == ideal["mean_absorption_fraction_score"].value == 0
    assert "letter probes" in found.baselines
    letters = found.details["letters"]["letter probes"]
    assert [its["main"][0] for its in letters.values()] == list(range(len(letters)))
    few = vocabulary(lm)
    assert few and all(word.labels["first letter"] == (word.text or "")[1].lower() for word in few)
    with pytest.raises(UserError, match="too few to probe for first letters"):
        absorption_first_letter({"sae": sae}, (), lm, READING, 0)


def test_cosines_are_those_of_decoder_rows(sae: SAE) -> None:
    unit = np.eye(sae.config.d_in)[:3]
    rows = sae.W_dec.double().numpy()
    expected = rows[:, :3] / np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(cosines(sae, unit), expected, atol=1e-12)
