"""Descriptions of planted concepts fit the places where the generator says that the concepts stand."""

from __future__ import annotations

from itertools import islice

from unbraid.practice.corpus import conversations
from unbraid.practice.descriptions import describe


def test_every_description_quotes_what_the_world_says() -> None:
    hits: dict[str, list[bool]] = {}
    for conversation in islice(conversations("fit", seed=5, advice_share=0.4), 400):
        for message, concept, start, end in conversation.concepts():
            if (text := describe(concept)) is not None:
                said = conversation.messages[message]["content"][start:end].lower()
                quoted = [part.lower() for part in text.split('"')[1::2]]
                hits.setdefault(concept, []).append(any(part in said for part in quoted))
    assert len(hits) > 150
    # Unknown countries have made-up names, which no list can hold.
    wrong = {c: hit for c, hit in hits.items() if not all(hit) and c.split("=")[0] != "country"}
    assert not wrong, sorted(wrong)


def test_concepts_that_differ_have_descriptions_that_differ() -> None:
    assert describe("tone=angry") != describe("tone=polite")
    assert describe("drug=Zolvane") != describe("drug")
    assert describe("answer") is None and describe("no such concept") is None
    assert describe("drug=Zolvane") == 'the name of a medicine: "Zolvane"'
