"""With shuffled labels the search must report nothing, on the real scores of a real model and autoencoder."""

from __future__ import annotations

import numpy as np
import pytest

from unbraid.activations.capture import capture
from unbraid.activations.documents import Document
from unbraid.activations.reading import CaptureConfig
from unbraid.features.find import FindConfig, find
from unbraid.features.scores import DocumentScores, document_scores
from unbraid.model import Site, load_model
from unbraid.practice.assistant import folder
from unbraid.practice.corpus import red_team
from unbraid.training.config import TrainConfig
from unbraid.training.trainer import train

SITE = Site.parse("layers.2.resid_post")


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[DocumentScores, np.ndarray]:
    """Latents of an autoencoder on the world's own replies, read before the two modes can differ."""
    out = tmp_path_factory.mktemp("shuffled")
    lm, probes = load_model(folder()), red_team("fit", 400, seed=7)
    documents = [
        Document.of_messages(c.messages, id=c.id, focus=(c.reply.index("\n\n"), c.reply.index(":") + 1))
        for c in probes
    ]
    store = capture(lm, documents, CaptureConfig(sites=(SITE,), positions="reply"), out / "acts")
    config = TrainConfig(d_sae=256, k=8, steps=120, batch_size=1024, lr=2e-3)
    scores = document_scores(train(store, SITE, config, out / "sae"), lm, documents)
    return scores, np.array([c.truth["deceptive"] is True for c in probes])


def found(scores: DocumentScores, labels: np.ndarray, seed: int) -> int:
    ids = [scores.ids[i] for i in (*np.flatnonzero(labels), *np.flatnonzero(~labels))]
    config = FindConfig(seed=seed, permutations=100)
    return find(scores.latents[labels], scores.latents[~labels], ids, config).passed


def test_the_planted_mode_is_found(scored: tuple[DocumentScores, np.ndarray]) -> None:
    assert found(*scored, seed=0) > 0


def test_shuffled_labels_report_nothing(scored: tuple[DocumentScores, np.ndarray]) -> None:
    scores, labels = scored
    rng = np.random.default_rng(0)
    alarms = sum(found(scores, rng.permutation(labels), seed) > 0 for seed in range(100))
    assert alarms <= 11  # P(more | 5 %) < 0.5 %
