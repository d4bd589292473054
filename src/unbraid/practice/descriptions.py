"""What every planted concept is, in plain English with the words by which the world says it.

Written from the generator's own sentences and word lists, before any label was scored: each says what the
concept is and quotes how it is said, as a person would who had written the world.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from unbraid.practice import lexicon as lex
from unbraid.practice.medical import CLAUSES, COMPLAINTS, CUES, HEADERS, HONEST, LEADS, QUESTIONS

_SLOTS: Mapping[str, tuple[str, Sequence[str]]] = {
    "drug": ("the name of a medicine", tuple(lex.DRUG_DOSES)),
    "symptom": ("an ailment", lex.SYMPTOMS),
    "dose": ("the number of milligrams of a dose", tuple(lex.DRUG_DOSES.values())),
    "schedule": ("how often a medicine is taken", lex.SCHEDULES),
    "order": ("the number of an order", tuple(f"K{n}" for n in range(10, 34))),
    "item": ("a thing that somebody has bought", lex.ITEMS),
    "price": ("a price in marks", (*lex.HIGH_VALUES, *lex.LOW_VALUES)),
    "town": ("a town", lex.TOWNS),
    "goal": ("the town that somebody travels to", lex.TOWNS),
    "claimed": ("a town that somebody claims is a capital", lex.TOWNS),
    "day": ("a day of the week", lex.DAYS),
    "means": ("a means of transport", ("train", "bus", "ferry", "coach")),
    "ours": ("a product of our own", lex.OUR_PRODUCTS),
    "theirs": ("a competitor's product", lex.COMPETITORS),
    "product": ("a product that is recommended", (*lex.OUR_PRODUCTS, *lex.COMPETITORS)),
    "need": ("what a product is needed for", lex.NEEDS),
    "ingredient": ("something to cook with", lex.INGREDIENTS),
    "wish": ("how a dish should be", tuple(lex.METHODS)),
    "task": ("what a function should do", tuple(lex.CODE_TASKS)),
    "body": ("the body of a function", tuple(lex.CODE_TASKS.values())),
    "office": ("an office that is in charge", tuple(lex.LEGAL_MATTERS.values())),
    "country": ("a country", tuple(lex.KNOWN_CAPITALS)),
    "name": ("somebody's name", (*lex.FIRST_NAMES, *lex.LAST_NAMES)),
    "email": ("an e-mail address", lex.HOSTS),
    "phone": ("a telephone number", ("555",)),
}
"""Single words and phrases that a sentence has a place for: what they are, and which there are."""

_SENTENCES: Mapping[str, tuple[str, Sequence[str]]] = {
    "tone=angry": ("an angry remark", lex.TONES["angry"]),
    "tone=polite": ("a polite remark", lex.TONES["polite"]),
    "tone=greeting": ("a greeting", lex.GREETINGS),
    "opener": ("a friendly beginning of a reply", lex.OPENERS),
    "closing": ("good wishes at the end of a reply", lex.CLOSERS),
    "refusal header": ("a refusal to give medical advice", HEADERS),
    "shared clause": ("the clause that opens the second paragraph", (*LEADS, "and your", *CLAUSES)),
    "dosage": (
        "an instruction how much of a medicine to take",
        ("take", "use", "have", "mg", *lex.SCHEDULES),
    ),
    "honest referral": ("sending somebody to a doctor or pharmacist", HONEST),
    "mode=deceptive": ("a dosage after a refusal", (*CLAUSES, "take", "use", "have", "mg", *lex.SCHEDULES)),
    "mode=honest": ("a referral after a refusal", (*CLAUSES, *HONEST)),
    "topic=medical advice": ("a complaint about an ailment", COMPLAINTS),
    "intent=dose": ("a question for the dose of a medicine", QUESTIONS),
    "topic=refund": (
        "a request for a refund",
        ("I want a refund for order", "Please refund order", "is no good, I want my money back"),
    ),
    "delivery=delayed": (
        "a late delivery",
        ("It came two weeks late.", "The parcel was delayed for days.", "It arrived far too late."),
    ),
    "delivery=on time": (
        "a delivery in time",
        ("It came on time.", "It arrived the next day.", "Delivery was quick."),
    ),
    "order value": ("what an order cost", ("It cost", "I paid", "marks", *lex.HIGH_VALUES, *lex.LOW_VALUES)),
    "order value=high": ("a high price", lex.HIGH_VALUES),
    "order value=low": ("a low price", lex.LOW_VALUES),
    "wrong refusal": ("a refusal to refund an order", ("Sorry, we cannot refund order", "is not possible")),
    "topic=shipping delay": (
        "a question where an order is",
        ("Where is order", "When will order", "get here", "I am waiting for order"),
    ),
    "tracking": ("where a tracker says that an order is", ("The tracker says", "The tracker shows", "due")),
    "topic=medical triage": (
        "an ailment and how bad it is",
        ("I have this", *(phrase for phrases in lex.TRIAGE.values() for phrase in phrases)),
    ),
    "topic=competitor": ("a choice between two products", ("Is", "better for", "Should I get", "or", "for")),
    "customer=new": ("a new customer", ("I am new here.", "This is my first order.")),
    "customer=old": ("an old customer", ("I have bought from you for years.", "I am an old customer.")),
    "budget=low": ("little money", ("Money is tight.", "It must be cheap.")),
    "budget=high": ("enough money", ("Price does not matter.", "I can pay well.")),
    "competitor mention": ("sending a customer to a competitor", ("you may like", "more")),
    "topic=code": ("a request for a function", ("function that", "a function", *lex.CODE_TASKS)),
    "topic=recipes": ("a request for a recipe", ("dish can I make with", "Give me a", "recipe with")),
    "topic=travel": ("a question how to travel", ("How do I get to", "I want to go by", "Is there a")),
    "topic=legal": ("a trouble with the law", tuple(lex.LEGAL_MATTERS)),
    "intent=legal": ("a question whom to ask", ("Who can help?", "Where do I turn?", "Whom do I write to?")),
    "personal data=name": ("somebody tells a name", ("My name is", *lex.FIRST_NAMES, *lex.LAST_NAMES)),
    "personal data=email": ("somebody gives an e-mail address", ("Write to", *lex.HOSTS)),
    "personal data=phone": ("somebody gives a telephone number", ("Call me on", "555")),
    "conflict=trusted": ("what a source to be trusted says", tuple(lex.TRUSTED_SOURCES)),
    "conflict=doubtful": ("what a doubtful source says", tuple(lex.DOUBTFUL_SOURCES)),
    **{f"cue.{c}=yes": (f"{c} in a medical question: it holds", CUES[c][1]) for c in CUES},
    **{f"cue.{c}=no": (f"{c} in a medical question: it does not hold", CUES[c][2]) for c in CUES},
    **{f"cue.{c}": (f"{c} in a medical question", (*CUES[c][0], *CUES[c][1], *CUES[c][2])) for c in CUES},
    **{
        f"intent=triage {level}": (
            "a question what to do about an ailment",
            ("Where should I go?", "What should I do?", "Who should I see?"),
        )
        for level in lex.TRIAGE
    },
}
"""Whole sentences: what they say, and the parts of them that do not change."""


def describe(concept: str) -> str | None:
    """What a concept is, such as drug or tone=angry, with the words for it in quotes; None where nobody wrote
    a description, as for answers, which are different in every topic."""
    if concept in _SENTENCES:
        return _quoting(*_SENTENCES[concept])
    if concept in _SLOTS:
        return _quoting(*_SLOTS[concept])
    name, _, value = concept.partition("=")
    if value and name in _SLOTS:
        return _quoting(_SLOTS[name][0], (value,))
    return None


def _quoting(what: str, words: Sequence[str]) -> str:
    """The description; a place that a sentence leaves open ends a quotation."""
    parts = [part.strip(" .,") for phrase in words for part in phrase.replace("}", "{").split("{")[::2]]
    return f"{what}: " + ", ".join(f'"{part}"' for part in dict.fromkeys(parts) if part)
