"""On the practice assistant, a word of a topic finds a latent of that topic, and so do two sets of texts."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from unbraid.activations.capture import capture
from unbraid.activations.documents import Document
from unbraid.activations.reading import CaptureConfig
from unbraid.features.find import find
from unbraid.features.index import IndexConfig, build_index
from unbraid.features.scores import document_scores
from unbraid.features.search import Search
from unbraid.model import Site, load_model
from unbraid.practice.assistant import folder
from unbraid.practice.corpus import conversations
from unbraid.stats.effects import auroc
from unbraid.training.config import TrainConfig
from unbraid.training.trainer import train

SITE = Site.parse("layers.2.resid_post")
# A word that only texts of this topic hold.
WORDS = {
    "code": "function",
    "travel": "noon",
    "refund": "refund",
    "recipes": "salt",
    "shipping delay": "tracker",
    "facts": "capital",
    "competitor": "choice",
}


class World:
    """An autoencoder with its index on some conversations, and what it says of others."""

    def __init__(self, out: Path, seed: int) -> None:
        self.lm = load_model(folder())
        seen, held = (
            [
                (c.topic, Document.of_messages(c.messages, id=c.id))
                for c in islice(conversations(split, seed=s), n)
            ]
            for split, s, n in (("fit", 5, 300), ("test", 6, 150))
        )
        store = capture(self.lm, [d for _, d in seen], CaptureConfig(sites=(SITE,)), out / "acts")
        self.sae = train(
            store,
            SITE,
            TrainConfig(d_sae=256, k=8, steps=120, batch_size=1024, lr=2e-3, seed=seed),
            out / "sae",
        )
        self.index = build_index(
            self.sae,
            self.lm,
            [d for _, d in seen],
            IndexConfig(),
            out / "index",
            sae_id="practice",
            site=SITE,
        )
        self.topics = np.array([topic for topic, _ in held])
        self.ids = [document.id for _, document in held]
        self.scores = document_scores(
            self.sae, self.lm, [d for _, d in held], SITE, positions="all"
        ).latents.toarray()

    def auroc(self, latent: int, topic: str) -> float:
        """How well a latent's mean activation tells the topic's held-out texts from all others."""
        return float(auroc(self.scores[:, latent], self.topics == topic))


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> list[World]:
    return [World(tmp_path_factory.mktemp("world"), seed) for seed in range(3)]


@pytest.fixture(scope="module")
def world(worlds: list[World]) -> World:
    return worlds[0]


def test_a_word_of_a_topic_finds_a_latent_of_it(worlds: list[World]) -> None:
    # Of three autoencoders: one alone holds five to seven of the topics in a latent that its word finds,
    # and which, a processor's rounding of its training decides.
    found, others = [], []
    for world in worlds:
        search = Search(world.index)
        hits = {topic: [hit.latent for hit in search.text(word, 5)] for topic, word in WORDS.items()}
        for topic, latents in hits.items():
            tells = {t: max((world.auroc(j, t) for j in latents), default=0.0) for t in WORDS}
            found.append(tells.pop(topic))
            others += tells.values()
    share, by_chance = (np.mean(np.array(values) >= 0.9) for values in (found, others))
    print(np.round(found, 3), "of another topic", round(float(by_chance), 3))
    assert share >= 0.7, found
    # Not because any five latents would do: the same ones seldom tell another topic.
    assert by_chance < share / 2, others


def test_a_pasted_text_of_a_topic_finds_a_latent_of_it(world: World) -> None:
    search = Search(world.index)
    texts = {"recipes": "Add the salt and stir the dish well.", "code": "def f(xs): return sorted(xs)"}
    for topic, text in texts.items():
        hits = search.activation(world.sae, world.lm, text, 5)
        best = max(world.auroc(hit.latent, topic) for hit in hits)
        print(topic, round(best, 3))
        assert best >= 0.9


def test_two_sets_of_texts_find_a_latent_of_the_topic(world: World) -> None:
    for topic in ("refund", "recipes"):
        mine = world.topics == topic
        ids = [world.ids[i] for i in (*np.flatnonzero(mine), *np.flatnonzero(~mine))]
        found = find(world.scores[mine], world.scores[~mine], ids)
        assert found.latents and max(latent.auroc.value for latent in found.latents) >= 0.9
