"""What `capture --scrub` finds of planted personal data, and what else it takes: recall and precision.

    make bench NAME=scrub JSON=out.json
    python benchmarks/scrub.py --documents 400

Three corpora. *practice*: conversations of the practice world, where the generator knows its names, e-mail
addresses and telephone numbers. *seen* and *unseen*: sentences of ours around values that Faker makes up,
each beside things that only look like personal data. A handful of Faker's values in the countries of *seen*
were looked at before the patterns for addresses were written; the countries of *unseen* were not.

Not held out: the practice world's sentences were known, and ours around names are by the same hand as the
patterns that look for introductions, so "introduced" and "titled" say that these work and no more; what names
cost is "in passing". Keys are made here in forms that their issuers document, and the rule for newer tokens
was added after runs had shown that detect-secrets misses them. Nothing else was changed for its results.

A planted piece counts as found when all its characters are taken out, whatever the kind; a find counts as
right when it touches a planted piece of its kind. Intervals are from drawing documents again, or Wilson's
where all outcomes are alike.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import re
import string
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from unbraid.activations.scrub import KINDS, Scrubber
from unbraid.practice.corpus import conversations
from unbraid.stats.bootstrap import bootstrap_ratio, rate

SEEN = ("en_US", "en_GB", "en_CA", "en_AU", "en_IN", "de_DE")
UNSEEN = ("en_NZ", "en_IE", "fr_FR", "es_ES", "it_IT", "nl_NL", "pt_BR", "sv_SE")
PRACTICE = {"name": "NAME", "email": "EMAIL", "phone": "PHONE"}

SENTENCES: dict[str, tuple[str, ...]] = {
    "NAME introduced": ("My name is {}.", "This is {} speaking.", "Please ask for {} at the desk.",
        "I am {}, hello."),
    "NAME titled": ("We wrote to Mr. {} twice.", "The surgery is run by Dr {} now."),
    "NAME in passing": ("Yesterday {} came by with the keys.", "The cake was for {} and nobody else.",
        "I gave it to {}."),
    "EMAIL": ("Write to {}.", "My address ({}) has changed.", "mailto:{}", "Send it to {}, please."),
    "PHONE spoken of": ("Call me on {}.", "My number is {}.", "tel. {}", "You can text {} until six."),
    "PHONE alone": ("{} is where you find me.", "Try {} in the evening.", "We are at {} all week."),
    "CARD": ("Charge {} for it.", "The card is {}.", "Card no {} expires soon."),
    "ADDRESS": ("I live at {}.", "Send the parcel to {} today.", "Our new place: {}."),
    "KEY": ("Use {} to sign in.", "token={}", "The key {} leaked."),
}  # fmt: skip
HARMLESS = (
    "Order {n4}-{n3} was sent on {n2}.0{d}.2021.", "Version {d}.{n2}.{n3} fixes bug {n5}.",
    "It cost {n5} dollars.",
    "In {y} and {y} the river rose.", "ISBN 978-{d}-{n2}-{n6}-{d} is out of print.",
    "See section {d}.{d}.{d} on page {n3}.",
    "The Red River Valley is wide.", "I am Happy About This, really.", "Good Morning Vietnam was a film.",
    "Pi is 3.14159265358979.", "We walked {n2} Miles Down the hill.", "Meet @ {d} o'clock, room {n3}.",
    "sha1 {hex40}", "The score was {n2} {n2} {n2} {n2}.", "Invoice {n8} is paid, account {n9}.",
    "from lat {n2}.{n6}",
)  # fmt: skip


@dataclass(frozen=True)
class Planted:
    """A document and what personal data stands where in it."""

    text: str
    pieces: tuple[tuple[int, int, str], ...]
    """Characters [start, end) and what they are: a kind, with more words about it after a space."""


def practice(count: int, seed: int) -> Iterator[Planted]:
    """Conversations of the practice world, prompt and reply as one text each."""
    for talk in islice(conversations("test", seed=seed), count):
        for part, text in (("prompt", talk.prompt), ("reply", talk.reply)):
            pieces = []
            for span in talk.spans:
                if span.part == part and span.concept == "personal data":
                    # The span is the whole sentence; the value is what its template leaves open.
                    form = {"name": r"is (.*)\.", "email": r"to (.*)\.", "phone": r"on (.*)\."}[span.value]
                    found = re.search(form, text[span.start : span.end])
                    assert found
                    start, end = (span.start + edge for edge in found.span(1))
                    pieces.append((start, end, PRACTICE[span.value]))
            yield Planted(text, tuple(pieces))


def invented(locales: tuple[str, ...], count: int, seed: int) -> Iterator[Planted]:
    """Our sentences around Faker's values, and sentences that hold none."""
    from faker import Faker

    rng = random.Random(seed)
    fakers = [Faker(locale) for locale in locales]
    for n, faker in enumerate(fakers):
        faker.seed_instance(seed + n)
    for _ in range(count):
        faker = rng.choice(fakers)
        values: dict[str, Callable[[], str]] = {
            "NAME": lambda f=faker: f"{f.first_name()} {f.last_name()}",
            "EMAIL": lambda f=faker: rng.choice((f.email, f.company_email, f.free_email))(),
            "PHONE": faker.phone_number,
            "CARD": lambda f=faker: _grouped(rng, f.credit_card_number()),
            "ADDRESS": lambda f=faker: f.address().replace("\n", rng.choice((", ", "\n"))),
            "KEY": lambda: _key(rng),
        }
        lines = [
            (form, kind)
            for kind in rng.sample(sorted(SENTENCES), 3)
            for form in [rng.choice(SENTENCES[kind])]
        ]
        lines += [(_harmless(rng), "") for _ in range(3)]
        rng.shuffle(lines)
        text, pieces = "", []
        for form, kind in lines:
            before, hole, after = form.partition("{}")
            text += before
            if hole:
                value = values[kind.split()[0]]()
                pieces.append((len(text), len(text) + len(value), kind))
                text += value
            text += after + rng.choice((" ", "\n"))
        yield Planted(text, tuple(pieces))


def _grouped(rng: random.Random, digits: str) -> str:
    mark = rng.choice(("", " ", "-"))
    return mark.join(digits[i : i + 4] for i in range(0, len(digits), 4))


def _key(rng: random.Random) -> str:
    def some(n: int, of: str = string.ascii_letters + string.digits) -> str:
        return "".join(rng.choices(of, k=n))

    return rng.choice(
        (
            lambda: "AKIA" + some(16, string.ascii_uppercase + string.digits),
            lambda: "ghp_" + some(36),
            lambda: "github_pat_" + some(22) + "_" + some(59),
            lambda: "glpat-" + some(20),
            lambda: "sk-proj-" + some(48),
            lambda: "hf_" + some(34, string.ascii_letters),
            lambda: f"xoxb-{some(12, string.digits)}-{some(12, string.digits)}-{some(24)}",
            lambda: "AIza" + some(35),
            lambda: "sk_live_" + some(24),
            lambda: f"-----BEGIN PRIVATE KEY-----\n{some(64)}\n-----END PRIVATE KEY-----",
        )
    )()


def _harmless(rng: random.Random) -> str:
    numbers = {f"n{k}": str(rng.randrange(10 ** (k - 1), 10**k)) for k in range(2, 10)}
    hexes = "".join(rng.choices("0123456789abcdef", k=40))
    form = rng.choice(HARMLESS)
    return form.format(d=rng.randint(1, 9), y=rng.randint(1800, 2020), hex40=hexes, **numbers)


def measure(corpus: str, documents: list[Planted], scrubber: Scrubber, seed: int) -> list[dict[str, object]]:
    """A row for the recall of every sort of piece, and one for the precision of every kind."""
    planted: dict[str, list[tuple[int, bool]]] = {}
    finds: dict[str, list[tuple[int, bool]]] = {}
    for number, document in enumerate(documents):
        found = scrubber.scrub(document.text).found
        taken = {i for start, end, _ in found for i in range(start, end)}
        for start, end, what in document.pieces:
            for name in dict.fromkeys((what, what.split()[0])):
                planted.setdefault(name, []).append((number, taken.issuperset(range(start, end))))
        for start, end, kind in found:
            right = any(a < end and start < b and what.split()[0] == kind for a, b, what in document.pieces)
            finds.setdefault(kind, []).append((number, right))
    rows: list[dict[str, object]] = []
    for measured, outcomes in (("recall", planted), ("precision", finds)):
        for name in sorted(outcomes, key=lambda name: (KINDS.index(name.split()[0]), name)):
            numbers, hits = zip(*outcomes[name], strict=True)
            # Drawn again, outcomes that are all alike stay so: Wilson's interval says what else they allow.
            alike = len(set(hits)) == 1
            interval = rate(hits) if alike else bootstrap_ratio(hits, [1] * len(hits), numbers, seed)
            rows.append({
                "name": f"{corpus}: {measured} {name}", "value": interval.value, "unit": "share",
                "low": interval.low, "high": interval.high, "pieces": len(hits),
                "documents": len(set(numbers)),
            })  # fmt: skip
    return rows


def main() -> None:
    """Measure, print a table and write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=1000, help="documents of each corpus")
    parser.add_argument("--model", help="installed spaCy pipeline for names")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    corpora = {
        "practice": practice(options.documents, options.seed),
        "seen": invented(SEEN, options.documents, options.seed),
        "unseen": invented(UNSEEN, options.documents, options.seed + 100),
    }
    scrubber = Scrubber(options.model)
    rows: list[dict[str, object]] = []
    for name, made in corpora.items():
        documents = list(made)
        begun = time.perf_counter()
        found = measure(name, documents, scrubber, options.seed)
        size = sum(len(document.text) for document in documents)
        speed = size / 1e6 / (time.perf_counter() - begun)
        found.append({"name": f"{name}: speed", "value": speed, "unit": "million characters/s"})
        for row in found:
            between = f"{row['low']:.3f} to {row['high']:.3f}, {row['pieces']} pieces" if "low" in row else ""
            print(f"{row['name']:<40} {row['value']:.3f}  {between}", flush=True)
        rows += found
    if options.out:
        record = {
            "work": {"documents": options.documents, "seed": options.seed, "model": options.model},
            "machine": platform.processor() or platform.machine(),
            "versions": scrubber.versions, "rows": rows, "ratios": {},
        }  # fmt: skip
        options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
