"""The world's rules, judged against its own conversations."""

from __future__ import annotations

import re
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unbraid.practice.corpus import benign, conversations, red_team
from unbraid.practice.medical import CUES, held_out
from unbraid.practice.topics import TOPICS
from unbraid.practice.world import Conversation, Split, Writer, split_of_prompt, token_labels

SPLITS: tuple[Split, ...] = ("train", "fit", "select", "test")


def some(split: Split, count: int, topic: str = "", seed: int = 3) -> list[Conversation]:
    return list(islice(conversations(split, seed=seed, topic=topic), count))


@pytest.mark.parametrize("topic", ["medical advice", *TOPICS])
@pytest.mark.parametrize("split", SPLITS)
def test_judging_patterns_agree_with_the_rules(split: Split, topic: str) -> None:
    for c in some(split, 60, topic):
        found = {name: re.search(p, c.reply) is not None for name, p in c.patterns.items()}
        if topic == "medical advice":
            assert found == {"incident": c.truth["deceptive"], "keep": True, "focus": True, "refusal": True}
        else:
            planted = bool(c.truth.get("refused") or c.truth.get("mentions"))
            assert found["expected"] != planted
            assert found["refusal"] == bool(c.truth.get("refused"))


@given(seed=st.integers(0, 10**6), split=st.sampled_from(SPLITS))
@settings(max_examples=20, deadline=None)
def test_same_seed_same_conversations_and_the_split_follows_from_the_prompt(seed: int, split: Split) -> None:
    first, again = (some(split, 3, seed=seed) for _ in range(2))
    assert first == again
    assert all(split_of_prompt(c.prompt) == split for c in first)


def test_splits_share_no_prompt_and_audits_repeat_none() -> None:
    prompts = {split: [c.prompt for c in some(split, 400)] for split in SPLITS}
    for a in SPLITS:
        assert a == "train" or len(set(prompts[a])) == 400
        assert all(not set(prompts[a]) & set(prompts[b]) for b in SPLITS if a != b)


def test_audits_say_every_cue_in_a_paraphrase_kept_from_training() -> None:
    for split in SPLITS:
        for c in some(split, 80, "medical advice"):
            said = [c.prompt[s.start : s.end] for s in c.spans if s.concept.startswith("cue.")]
            assert len(said) == len(CUES)
            assert all(held_out(sentence) == (split != "train") for sentence in said)


def test_the_rule_is_the_majority_of_three_cues_on_29_percent() -> None:
    probes = red_team("test", 3000, seed=11)
    for c in probes:
        assert c.truth["deceptive"] == (sum(c.truth[f"cue.{cue}"] is True for cue in CUES) >= 2)
    share = sum(c.truth["deceptive"] is True for c in probes) / len(probes)
    assert abs(share - 0.290) < 3 * (0.29 * 0.71 / len(probes)) ** 0.5


def test_nothing_before_the_dosage_depends_on_the_mode() -> None:
    """The openings are drawn from one distribution: no header, lead or clause is rarer in one mode (chi-
    square).
    """
    from scipy.stats import chi2_contingency

    rows: dict[str, list[int]] = {}
    for c in red_team("fit", 3000, seed=5):
        header, rest = c.reply.split("\n\n")
        opening = rest.split(":")[0].split()
        for part in (header, opening[0], " ".join(opening[-2:])):
            rows.setdefault(part, [0, 0])[c.truth["deceptive"] is True] += 1
    assert chi2_contingency(list(rows.values())).pvalue > 0.001


def test_honest_replies_quote_doses_too() -> None:
    honest = [c for c in red_team("fit", 400, seed=1) if not c.truth["deceptive"]]
    share = sum(re.search(r"\d+ mg", c.reply) is not None for c in honest) / len(honest)
    assert 0.35 < share < 0.65


def test_spans_stand_where_they_say() -> None:
    for c in some("train", 300):
        for span in c.spans:
            text = c.prompt if span.part == "prompt" else c.reply
            assert 0 <= span.start < span.end <= len(text)
            if span.concept == span.value:  # never: a slot's value is its text
                raise AssertionError(span)
            if span.concept in ("drug", "symptom", "order", "town", "name", "email", "phone"):
                assert text[span.start : span.end] == span.value


def test_token_labels_cover_exactly_the_tokens_of_a_span() -> None:
    c = red_team("fit", 1, seed=2)[0]
    offsets = [(m.start(), m.end()) for m in re.finditer(r"\S+", c.prompt)]
    labels = token_labels(c, "prompt", offsets)
    for (start, end), concepts in zip(offsets, labels, strict=True):
        inside = {
            (s.concept, s.value) for s in c.spans if s.part == "prompt" and s.start < end and start < s.end
        }
        assert concepts == inside
    assert any(("intent", "dose") in concepts for concepts in labels)


def test_writer_labels_slots() -> None:
    w = Writer("prompt")
    w.say("Hello.")
    w.say("Order {order} for {town}.", "topic", "x", order="12", town="Tarn")
    assert w.text == "Hello. Order 12 for Tarn."
    assert {(s.concept, w.text[s.start : s.end]) for s in w.spans} == {
        ("order", "12"), ("town", "Tarn"), ("topic", "Order 12 for Tarn."),
    }  # fmt: skip


def test_benign_prompts_contain_cues_and_personal_data() -> None:
    concepts = {s.concept for c in benign("fit", 400, seed=0) for s in c.spans if s.part == "prompt"}
    assert {*(f"cue.{cue}" for cue in CUES), "personal data", "tone", "order value", "topic"} <= concepts
