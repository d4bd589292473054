"""Personal data out of documents before anything is tokenised or stored; it is counted, never kept.

What finds it: e-mail addresses and cards by Presidio's recognisers (Luhn's checksum for cards), phone numbers
by phonenumbers (Google's numbering plans), keys by detect-secrets' patterns. Names are found where a sentence
introduces them and, if a spaCy model is named, where it sees a person; addresses by the patterns below. No
model is downloaded and nothing is looked up on the network. `benchmarks/scrub.py` measures what is missed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unbraid.activations.documents import Document
from unbraid.manifest.errors import UserError

KINDS = ("EMAIL", "PHONE", "NAME", "CARD", "ADDRESS", "KEY")
LIBRARIES = ("presidio-analyzer", "phonenumbers", "detect-secrets")
REGIONS = ("US", "GB", "AU", "IN", "DE", "FR", "BR")
"""Whose national numbers are known; a number with + and a country's code is known everywhere."""

Found = tuple[int, int, str]
"""Characters [start, end) and the kind of what they are."""

# A phone number has at least seven digits near each other; looking closer is slow.
SEVEN_DIGITS = re.compile(r"\d(?:[^\w\n]{0,3}\d){6}")
# Numbers that no numbering plan has are taken as well where the words before them speak of a phone.
CALLED = re.compile(
    r"\b(?:phone|call|tel|telephone|mobile|cell|fax|dial|ring|text|whatsapp|number)\b\W", re.I
)
CALLED_WITHIN = 30
LOCAL_PART, DOMAIN = 64, 256
"""Characters of an e-mail address before and after its @, at most (RFC 5321)."""

_WORD = r"(?:[A-Z]\.|[^\W\d_a-zß-öø-ÿ][^\W\d_]*(?:['’-][^\W\d_]+)*)"  # begins with no small letter
_PARTS = r"(?:(?:van|von|de|da|del|di|bin|al|la|le|der|den|el) ){0,2}"
_NAME = rf"{_WORD}(?: {_PARTS}{_WORD}){{0,3}}"
_TWO = rf"{_WORD}(?: {_PARTS}{_WORD}){{1,3}}"
NAMES = tuple(
    re.compile(pattern)
    for pattern in (
        rf"(?i:\b(?:my (?:full |first |last )?name is|my name's|named|name:|signed,?|called)) ({_NAME})",
        rf"\b(?:[Mm]r|[Mm]rs|[Mm]s|[Mm]iss|[Dd]r|[Pp]rof|[Ss]ir|[Mm]adam)\.? ({_NAME})",
        rf"(?i:\b(?:i am|i['’]m|this is|it is|here is|ask for|contact|speak (?:to|with)|attn:?|from:?|to:))"
        rf" ({_TWO})",
        rf"(?i:\b(?:regards|sincerely|yours|cheers|thanks|thank you)),?\s*\n\s*({_NAME})",
        rf"(?:^|\n)(?:Dear|Hi|Hello|Hey) (?!Sir|Madam|Team|All|Everyone|There|Customer|Friend)"
        rf"({_NAME})(?=[,!\n])",
    )
)

_STREET = (
    "Street|St|Avenue|Ave|Road|Rd|Lane|Ln|Drive|Dr|Boulevard|Blvd|Court|Ct|Place|Pl|Square|Sq|Terrace|Ter|Way|"
    "Highway|Hwy|Parkway|Pkwy|Close|Crescent|Grove|Gardens|Mews|Row|Walk|Alley|Circle|Cir|Trail|Trl|Plaza"
)
_UNIT = r"(?:,? (?:Apt|Apartment|Suite|Ste|Unit|Flat|Floor|Room|#)\.? ?\w+)?"
_CODE = (
    r"(?:[A-Z]{2,3},? \d{4,5}(?:-\d{4})?|[A-Z]{1,2}\d[A-Z\d]? ?\d[A-Z]{2}|[A-Z]{2},? [A-Z]\d[A-Z] ?\d[A-Z]\d)"
)
_TOWN = rf"(?:(?:,|\n|, \n)\s?{_WORD}(?: {_WORD}){{0,2}}(?:,|\n)?\s?(?:{_CODE})?)?"
ADDRESSES = tuple(
    re.compile(pattern)
    for pattern in (
        rf"\b\d{{1,5}}[A-Za-z]?(?:[/-]\d{{1,4}})? (?:{_WORD} ){{1,3}}(?:{_STREET})\b\.?{_UNIT}{_TOWN}",
        # A number, words, a town and a postal code, whatever the street is called.
        rf"\b(?:(?:Flat|Studio|Unit|Apt) \w+,? )?\d{{1,5}}[A-Za-z]?(?:[/-]\d{{1,4}})?"
        rf" {_WORD}(?: {_WORD}){{0,3}}{_UNIT}(?:,|\n|, \n)\s?{_WORD}(?: {_WORD}){{0,2}}"
        rf"(?:,|\n|, \n)\s?{_CODE}",
        r"\b[A-ZÄÖÜ][\w-]{0,40}(?:straße|strasse|str\.|weg|allee|gasse|platz|ring) \d{1,4}[a-z]?"
        r"(?:,? \d{5} [A-ZÄÖÜ]\w+)?",
        r"\b(?i:p\.? ?o\.? box) \d{1,6}",
    )
)
# Newer tokens than detect-secrets knows: short words for the issuer, then many letters and digits.
TOKEN = re.compile(
    r"\b(?:AIza[\w-]{35}|hf_[A-Za-z0-9]{30,}|(?:[A-Za-z]\w{1,11}[_-]){1,3}(?=[A-Za-z_]{0,40}\d)[A-Za-z0-9_]{20,})"
)
KEY_BLOCK = re.compile(
    r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY[A-Z ]*-----.*?(?:-----END [A-Z0-9 ]+-----|\Z)", re.S
)


@dataclass(frozen=True)
class Scrubbed:
    """A text without the personal data that was found in it."""

    text: str
    """The text with placeholders such as <EMAIL>."""
    found: tuple[Found, ...]
    """Where they stand for what, in the text as it was, in order, without overlaps."""

    def move(self, start: int, end: int) -> tuple[int, int]:
        """A span [start, end) of the text as it was, in the new one, with the placeholders it touches."""
        shift, low, high = 0, start, end
        for a, b, kind in self.found:
            mark = len(_mark(kind))
            if b <= start:
                low = start + shift + mark - (b - a)
            elif a <= start:
                low = a + shift
            if b <= end:
                high = end + shift + mark - (b - a)
            elif a < end:
                high = a + shift + mark
            shift += mark - (b - a)
        return low, high


class Scrubber:
    """Finds and replaces personal data, and counts it by kind."""

    def __init__(self, model: str | None = None) -> None:
        """`model`: an installed spaCy pipeline, by name or folder, whose persons are names too.

        Raises UserError, saying how to install it, when a library or the pipeline is missing.
        """
        try:
            self.versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
            self._finders = _finders()
        except ImportError as error:
            raise UserError(
                "--scrub needs further packages; install them with: pip install 'unbraid[scrub]'"
            ) from error
        if model is not None:
            people, self.versions[model] = _people(model)
            self._finders.append(people)
        self.counts: Counter[str] = Counter({kind: 0 for kind in KINDS})
        """Pieces replaced so far, by kind."""

    def scrub(self, text: str) -> Scrubbed:
        """Replace what is found in a text; where two finds overlap, the longer one names both."""
        merged: list[Found] = []
        for start, end, kind in sorted(piece for find in self._finders for piece in find(text)):
            if merged and start < merged[-1][1]:
                a, b, before = merged[-1]
                merged[-1] = (a, max(b, end), kind if end - start > b - a else before)
            else:
                merged.append((start, end, kind))
        parts: list[str] = []
        cursor = 0
        for start, end, kind in merged:
            parts += [text[cursor:start], _mark(kind)]
            cursor = end
        return Scrubbed("".join([*parts, text[cursor:]]), tuple(merged))

    def documents(self, documents: Iterable[Document]) -> Iterator[Document]:
        """The documents without personal data, focus and masks moved with the text, each counted."""
        for document in documents:
            yield self._document(document)

    def _document(self, document: Document) -> Document:
        messages = document.messages
        contents = [document.text or ""] if messages is None else [m["content"] for m in messages]
        pieces = [self.scrub(content) for content in contents]
        self.counts.update(kind for piece in pieces for _, _, kind in piece.found)
        # The hash of a text would vouch for what was taken out, so it is made anew; and a file's own id may
        # be somebody's address.
        hashed = (
            Document.of_text(contents[0]) if messages is None else Document.of_messages(messages)
        ).id == document.id
        more: dict[str, Any] = {
            "id": None if hashed or self.scrub(document.id).found else document.id,
            "focus": None if document.focus is None else pieces[-1].move(*document.focus),
            "mask": [(n, *pieces[n].move(start, end)) for n, start, end in document.mask],
            "stratum": None if document.stratum is None else self.scrub(document.stratum).text,
        }
        if messages is None:
            return Document.of_text(pieces[0].text, **more)
        new = [{"role": m["role"], "content": p.text} for m, p in zip(messages, pieces, strict=True)]
        return Document.of_messages(new, **more)

    def facts(self) -> dict[str, Any]:
        """For the manifest: how often each kind was found, and by which versions."""
        return {"found": dict(self.counts), "with": self.versions}


def _mark(kind: str) -> str:
    return f"<{kind}>"


def _module(name: str) -> Any:
    # Not by an import statement: the type check must pass where the extra is not installed.
    return importlib.import_module(name)


def _finders() -> list[Callable[[str], Iterator[Found]]]:
    phonenumbers = _module("phonenumbers")
    recognizers = _module("presidio_analyzer.predefined_recognizers")
    by_type = _module("detect_secrets.core.plugins.util").get_mapping_from_secret_type_to_class()
    by_pattern = _module("detect_secrets.plugins.base").RegexBasedDetector
    logging.getLogger("presidio-analyzer").setLevel(logging.ERROR)
    # Presidio's own recogniser asks the network for the list of top-level domains, and passes over those that
    # are not public; its pattern takes time with the square of a text, so it sees one address at a time.
    email = re.compile(recognizers.EmailRecognizer.PATTERNS[0].regex)
    card = recognizers.CreditCardRecognizer(supported_entity="CARD")
    secrets: list[re.Pattern[str]] = [
        pattern
        for name, plugin in by_type.items()
        if issubclass(plugin, by_pattern) and name != "Public IP (ipv4)"
        for pattern in plugin().denylist
    ]

    def emails(text: str) -> Iterator[Found]:
        at, done = text.find("@"), 0
        while at >= 0:
            before = max(at - LOCAL_PART, done)
            for match in email.finditer(text[before : at + DOMAIN]):
                done = before + match.end()
                yield before + match.start(), done, "EMAIL"
            at = text.find("@", max(at + 1, done))

    def cards(text: str) -> Iterator[Found]:
        if SEVEN_DIGITS.search(text):
            yield from ((r.start, r.end, "CARD") for r in card.analyze(text, ["CARD"], None))

    def phones(text: str) -> Iterator[Found]:
        if not SEVEN_DIGITS.search(text):
            return
        for region in REGIONS:
            for match in phonenumbers.PhoneNumberMatcher(text, region, phonenumbers.Leniency.VALID):
                yield match.start, match.end, "PHONE"
        for match in phonenumbers.PhoneNumberMatcher(text, REGIONS[0], phonenumbers.Leniency.POSSIBLE):
            before = text[max(match.start - CALLED_WITHIN, 0) : match.start]
            if match.raw_string.startswith("+") or CALLED.search(before):
                yield match.start, match.end, "PHONE"

    def keys(text: str) -> Iterator[Found]:
        for pattern in (KEY_BLOCK, TOKEN, *secrets):
            for match in pattern.finditer(text):
                group = next((n for n in range(1, pattern.groups + 1) if match.group(n)), 0)
                yield match.start(group), match.end(group), "KEY"

    return [
        emails,
        cards,
        phones,
        keys,
        _patterns("NAME", NAMES),
        _patterns("ADDRESS", ADDRESSES),
    ]


def _patterns(kind: str, patterns: tuple[re.Pattern[str], ...]) -> Callable[[str], Iterator[Found]]:
    def find(text: str) -> Iterator[Found]:
        for pattern in patterns:
            for match in pattern.finditer(text):
                start, end = match.span(1 if pattern.groups else 0)
                yield start, start + len(text[start:end].rstrip(".,\n ")), kind

    return find


def _people(model: str) -> tuple[Callable[[str], Iterator[Found]], str]:
    """What finds a spaCy pipeline's persons, and the pipeline's version."""
    spacy = _module("spacy")
    if not (spacy.util.is_package(model) or Path(model).is_dir()):
        raise UserError(
            f"there is no spaCy pipeline {model}; install it with: python -m spacy download {model}, or leave"
            " out --scrub-model"
        )
    try:
        pipeline: Any = spacy.load(model)
    except Exception as error:  # a folder may hold anything
        raise UserError(
            f"{model} is no spaCy pipeline ({type(error).__name__}); check --scrub-model"
        ) from error

    def find(text: str) -> Iterator[Found]:
        for entity in pipeline(text).ents:
            if entity.label_ in ("PERSON", "PER"):
                yield entity.start_char, entity.end_char, "NAME"

    return find, str(pipeline.meta.get("version"))
