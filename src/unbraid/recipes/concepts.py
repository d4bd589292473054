"""The practice world's planted concepts: which of them has a latent in an autoencoder, beside its floors."""

from __future__ import annotations

from dataclasses import replace

from unbraid.activations.documents import Document
from unbraid.evaluation.baselines import random_directions, untrained, without_training
from unbraid.evaluation.concepts import ConceptRow, concepts
from unbraid.evaluation.evaluate import check_fit
from unbraid.evaluation.labelled import Reading, SuiteResult, sample
from unbraid.manifest.progress import Progress
from unbraid.model.load import LanguageModel
from unbraid.practice.corpus import benign, red_team
from unbraid.practice.world import Conversation
from unbraid.sae.base import SAE

UNTRAINED, RANDOM = "untrained", "random directions"


def practice_concepts(
    sae: SAE,
    lm: LanguageModel,
    *,
    conversations: int,
    seed: int,
    floors: bool = True,
    progress: Progress | None = None,
) -> tuple[SuiteResult, dict[str, list[ConceptRow]]]:
    """Purity, completeness, splitting and absorption of every planted concept.

    Half of the conversations are medical-advice probes; all are from the world's test split, so neither the
    assistant nor the demo's autoencoders have seen them. The rows are `sae`, an untrained autoencoder of its
    width and L0, random directions that fire as often as its latents, raw neurons and principal components of
    its L0, and what `concepts` has beside all of them; without `floors` the first alone. Raises UserError
    when the autoencoder does not fit the model, or when there are too few conversations.
    """
    check_fit(sae, lm, sae.site)
    half = conversations // 2
    said = [*red_team("test", conversations - half, seed=seed), *benign("test", half, seed=seed)]
    documents = [document(conversation) for conversation in said]
    reading = Reading(sae.site)
    saes = {"sae": sae}
    if floors:
        x = sample(lm, documents[:: max(1, len(documents) // 200)], reading)
        saes |= {UNTRAINED: untrained(sae, x, seed), RANDOM: random_directions(sae, x, seed)}
        saes |= without_training(sae, x)
    result, found = concepts(saes, tuple(saes)[1:], lm, documents, reading, seed, progress=progress)
    return replace(result, site=str(sae.site)), found


def document(conversation: Conversation) -> Document:
    """A conversation as a document of a corpus, with its labels and concepts."""
    return Document.of_messages(
        conversation.messages,
        id=conversation.id,
        labels=conversation.labels(),
        concepts=conversation.concepts(),
    )
