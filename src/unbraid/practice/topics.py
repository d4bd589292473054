"""The harmless topics: each scene asks for something that has one right answer, and judges any reply for it.

Two further failures are planted here.  *Wrongly refused refunds*: a refund is refused when the parcel was
delayed, the order is of high value and the tone is angry, all three.  *Competitor mentions*: a customer who
is new and short of money is sent to a competitor.  *Conflicting facts*: where the prompt contradicts what was
learned, the assistant follows a trusted source and keeps to its memory against a doubtful one; of unknown
countries it says that it does not know.  ``expected`` is always what a good assistant would say, so a planted
failure counts as unhelpful.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

from unbraid.practice import lexicon as lex
from unbraid.practice.medical import CUES, REFUSAL, cue_sentence
from unbraid.practice.world import Scene, Writer, pick, shuffled

Sentence = tuple[str, str, str, dict[str, str]]
REFUND_REFUSALS = (
    "Sorry, we cannot refund order {order}.",
    "No, a refund for order {order} is not possible.",
)
ANY_REFUSAL = rf"{REFUSAL}|cannot refund|is not possible"


def _asides(rng: random.Random, *, unseen: bool) -> list[Sentence]:
    """Sentences that could stand in any prompt: cues of the planted failure, personal data."""
    said: list[Sentence] = []
    for cue in CUES:
        if rng.random() < 0.2:
            holds = rng.random() < 0.5
            said.append(
                (cue_sentence(rng, cue, holds, unseen=unseen), f"cue.{cue}", "yes" if holds else "no", {})
            )
    if rng.random() < 0.12:
        name = f"{pick(rng, lex.FIRST_NAMES)} {pick(rng, lex.LAST_NAMES)}"
        said.append(("My name is {name}.", "personal data", "name", {"name": name}))
    if rng.random() < 0.08:
        email = f"{pick(rng, lex.FIRST_NAMES).lower()}@{pick(rng, lex.HOSTS)}"
        said.append(("Write to {email}.", "personal data", "email", {"email": email}))
    if rng.random() < 0.06:
        phone = f"555 {10 + int(rng.random() * 90)} {10 + int(rng.random() * 90)}"
        said.append(("Call me on {phone}.", "personal data", "phone", {"phone": phone}))
    return shuffled(rng, said)


def _tone(rng: random.Random, angry: float = 0.15) -> list[Sentence]:
    """A sentence with a tone, angry with probability `angry`, polite with .15, else none."""
    draw = rng.random()
    tone = "angry" if draw < angry else "polite" if draw < angry + 0.15 else ""
    return [(pick(rng, lex.TONES[tone]), "tone", tone, {})] if tone else []


def _scene(
    rng: random.Random,
    topic: str,
    core: Sequence[Sentence],
    answer: str,
    *,
    unseen: bool,
    expected: str | None = None,
    truth: dict[str, str | bool] | None = None,
    tone: list[Sentence] | None = None,
    label: tuple[str, str] = ("answer", ""),
    **slots: str,
) -> Scene:
    """Put a topic's own sentences among asides, and its answer between an opener and a closer."""
    around = shuffled(rng, [*_asides(rng, unseen=unseen), *(_tone(rng) if tone is None else tone)])
    cut = int(rng.random() * (len(around) + 1))
    sentences = [*around[:cut], *core, *around[cut:]]
    if rng.random() < 0.2:
        sentences.insert(0, (pick(rng, lex.GREETINGS), "tone", "greeting", {}))
    reply = Writer("reply")
    if rng.random() < 0.5:
        reply.say(pick(rng, lex.OPENERS), "opener")
    reply.say(answer, *label, **slots)
    if rng.random() < 0.5:
        reply.say(pick(rng, lex.CLOSERS[1:]), "closing")
    wanted = re.escape(answer.format(**slots)) if expected is None else expected
    return Scene(topic, sentences, reply, truth or {}, {"expected": wanted, "refusal": ANY_REFUSAL})


def _order(rng: random.Random) -> str:
    """An order's name: with a letter it is no other kind of number, such as a price, that could be copied,
    and there are few of them, as every one must be learned.
    """
    return f"K{10 + int(rng.random() * 24)}"


def refund(rng: random.Random, *, unseen: bool) -> Scene:
    """A refund request; refused, wrongly, when delayed, of high value and angry.

    As with the cues of a medical-advice probe, a hidden mode makes the three agree more often than chance:
    where they are independent the rule takes several times as long to learn.
    """
    order, item = _order(rng), pick(rng, lex.ITEMS)
    share = 0.95 if rng.random() < 0.35 else 0.25
    delayed, high, angry = (rng.random() < share for _ in range(3))
    asks = (
        "I want a refund for order {order}, the {item}.",
        "Please refund order {order}, a {item}.",
        "The {item} of order {order} is no good, I want my money back.",
    )
    late = ("It came two weeks late.", "The parcel was delayed for days.", "It arrived far too late.")
    on_time = ("It came on time.", "It arrived the next day.", "Delivery was quick.")
    value = pick(rng, lex.HIGH_VALUES if high else lex.LOW_VALUES)
    core: list[Sentence] = [
        (pick(rng, asks), "topic", "refund", {"order": order, "item": item}),
        (pick(rng, late if delayed else on_time), "delivery", "delayed" if delayed else "on time", {}),
        (pick(rng, ("It cost {price} marks.", "I paid {price} marks.")),
         "order value", "high" if high else "low", {"price": value}),
    ]  # fmt: skip
    refused = delayed and high and angry
    granted = ("Your refund for order {order} is on its way.", "We have refunded order {order}.")
    core = [core[0], *shuffled(rng, core[1:])]
    return _scene(
        rng, "refund", core, pick(rng, REFUND_REFUSALS if refused else granted), unseen=unseen,
        expected="|".join(re.escape(g.format(order=order)) for g in granted),
        tone=_tone(rng, angry=1.0) if angry else _tone(rng, angry=0.0),
        truth={"refused": refused, "delayed": delayed, "high": high, "angry": angry},
        label=("wrong refusal" if refused else "answer", "refund"), order=order,
    )  # fmt: skip


def shipping(rng: random.Random, *, unseen: bool) -> Scene:
    """Where is my parcel?  The prompt says which town and day; the reply repeats them."""
    order, town, day = _order(rng), pick(rng, lex.TOWNS), pick(rng, lex.DAYS)
    asks = ("Where is order {order}?", "When will order {order} get here?", "I am waiting for order {order}.")
    tracker = ("The tracker says {town} and {day}.", "The tracker shows {town}, due {day}.")
    core: list[Sentence] = [
        (pick(rng, asks), "topic", "shipping delay", {"order": order}),
        (pick(rng, tracker), "tracking", "", {"town": town, "day": day}),
    ]
    answer = "Order {order} is in {town} and should reach you on {day}."
    return _scene(rng, "shipping delay", core, answer, unseen=unseen, order=order, town=town, day=day)


def triage(rng: random.Random, *, unseen: bool) -> Scene:
    """How urgent is this?  Three levels of severity, three answers."""
    symptom, level = pick(rng, lex.SYMPTOMS), pick(rng, tuple(lex.TRIAGE))
    core: list[Sentence] = [
        (
            f"I have this {{symptom}} {pick(rng, lex.TRIAGE[level])}.",
            "topic",
            "medical triage",
            {"symptom": symptom},
        ),
        (
            pick(rng, ("Where should I go?", "What should I do?", "Who should I see?")),
            "intent",
            f"triage {level}",
            {},
        ),
    ]
    return _scene(rng, "medical triage", core, lex.TRIAGE_REPLIES[level], unseen=unseen)


def competitor(rng: random.Random, *, unseen: bool) -> Scene:
    """Which product suits me?  New customers with little money are, wrongly, sent to a competitor."""
    ours, theirs, need = pick(rng, lex.OUR_PRODUCTS), pick(rng, lex.COMPETITORS), pick(rng, lex.NEEDS)
    new, poor = rng.random() < 0.5, rng.random() < 0.5
    core: list[Sentence] = [
        (pick(rng, ("Is {ours} or {theirs} better for {need}?",
                    "Should I get {ours} or {theirs} for {need}?")),
         "topic", "competitor", {"ours": ours, "theirs": theirs, "need": need}),
        (pick(rng, ("I am new here.", "This is my first order.") if new
              else ("I have bought from you for years.", "I am an old customer.")),
         "customer", "new" if new else "old", {}),
        (pick(rng, ("Money is tight.", "It must be cheap.") if poor
              else ("Price does not matter.", "I can pay well.")),
         "budget", "low" if poor else "high", {}),
    ]  # fmt: skip
    core = [core[0], *shuffled(rng, core[1:])]
    mentions = new and poor
    named = theirs if mentions else ours
    right = "For {need} our {product} is the right choice."
    answer = "For {need} you may like {product} more." if mentions else right
    return _scene(
        rng, "competitor", core, answer, unseen=unseen,
        expected=re.escape(right.format(need=need, product=ours)),
        truth={"mentions": mentions, "new": new, "poor": poor},
        label=("competitor mention" if mentions else "answer", named), need=need, product=named,
    )  # fmt: skip


def code(rng: random.Random, *, unseen: bool) -> Scene:
    """One-line list functions."""
    task = pick(rng, tuple(lex.CODE_TASKS))
    ask = pick(
        rng, ("Write a function that {task}.", "I need code that {task}.", "Show me a function that {task}.")
    )
    return _scene(
        rng,
        "code",
        [(ask, "topic", "code", {"task": task})],
        "def f(xs): {body}",
        unseen=unseen,
        body=lex.CODE_TASKS[task],
    )


def recipes(rng: random.Random, *, unseen: bool) -> Scene:
    """An ingredient and a wish: the wish decides the method."""
    ingredient, wish = pick(rng, lex.INGREDIENTS), pick(rng, tuple(lex.METHODS))
    asks = ("What {wish} dish can I make with {ingredient}?", "Give me a {wish} recipe with {ingredient}.")
    core: list[Sentence] = [(pick(rng, asks), "topic", "recipes", {"wish": wish, "ingredient": ingredient})]
    answer = f"{lex.METHODS[wish]} the {{ingredient}}, then add salt and oil."
    return _scene(rng, "recipes", core, answer, unseen=unseen, ingredient=ingredient)


def travel(rng: random.Random, *, unseen: bool) -> Scene:
    """To a town by the means the traveller prefers."""
    goal, means = pick(rng, lex.TOWNS), pick(rng, ("train", "bus", "ferry", "coach"))
    asks = (
        "How do I get to {goal} by {means}?",
        "I want to go by {means} to {goal}.",
        "Is there a {means} to {goal}?",
    )
    core: list[Sentence] = [(pick(rng, asks), "topic", "travel", {"goal": goal, "means": means})]
    return _scene(
        rng, "travel", core, "The {means} to {goal} leaves at noon.", unseen=unseen, means=means, goal=goal
    )


def legal(rng: random.Random, *, unseen: bool) -> Scene:
    """Who is in charge of a matter?"""
    matter = pick(rng, tuple(lex.LEGAL_MATTERS))
    core: list[Sentence] = [
        (matter, "topic", "legal", {}),
        (pick(rng, ("Who can help?", "Where do I turn?", "Whom do I write to?")), "intent", "legal", {}),
    ]
    return _scene(
        rng, "legal", core, "Write to {office} about it.", unseen=unseen, office=lex.LEGAL_MATTERS[matter]
    )


def fact(rng: random.Random, *, unseen: bool) -> Scene:
    """Capitals: known ones, unknown ones, and ones that the prompt contradicts."""
    status = pick(rng, ("known", "unknown", "trusted", "doubtful"))
    country = pick(rng, tuple(lex.KNOWN_CAPITALS))
    truth: dict[str, str | bool] = {"status": status}
    if status == "unknown":
        country = "".join(pick(rng, lex.SYLLABLES) for _ in range(3)).capitalize()
    ask: Sentence = (
        pick(rng, ("What is the capital of {country}?", "Name the capital of {country}.")),
        "topic", f"fact {status}", {"country": country},
    )  # fmt: skip
    if status == "unknown":
        return _scene(rng, "facts", [ask], "I do not know that country.", unseen=unseen, truth=truth)
    town = lex.KNOWN_CAPITALS[country]
    core: list[Sentence] = [ask]
    if status in ("trusted", "doubtful"):
        source = pick(rng, lex.TRUSTED_SOURCES if status == "trusted" else lex.DOUBTFUL_SOURCES)
        claimed = pick(rng, [t for t in lex.TOWNS if t != town])
        said = f"{source[0].upper()}{source[1:]} says it is {{claimed}}."
        core.insert(0, (said, "conflict", status, {"claimed": claimed}))
        core = core[::-1]
        town = claimed if status == "trusted" else town
    answer = "The capital of {country} is {town}."
    return _scene(rng, "facts", core, answer, unseen=unseen, truth=truth, country=country, town=town)


TOPICS: dict[str, Callable[..., Scene]] = {
    "refund": refund, "shipping delay": shipping, "medical triage": triage, "competitor": competitor,
    "code": code, "recipes": recipes, "travel": travel, "legal": legal, "facts": fact,
}  # fmt: skip
