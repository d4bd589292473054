"""A label is a hypothesis: somebody proposes it, somebody accepts or rejects it, and all of it is kept.

Everything that people or models write is untrusted: it is bounded, on one line and free of control characters
before it is stored, and whoever shows it escapes it.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast, get_args

from unbraid.manifest.errors import UserError
from unbraid.manifest.identity import canonical_json, sha256_bytes

Verdict = Literal["accepted", "rejected", "needs work"]
Status = Literal["proposed", "accepted", "rejected", "needs work"]
VERDICTS: tuple[str, ...] = get_args(Verdict)
STATUSES: tuple[str, ...] = get_args(Status)

LONGEST_TEXT = 500
"""Characters of a label."""
LONGEST_WHY = 2000
"""Characters of a review's reason."""
LONGEST_NAME = 120
"""Characters of a person's, a model's, a kind's or a list's name."""
LONGEST_SCORES = 65_536
"""Characters of a label's scores as JSON."""


@dataclass(frozen=True)
class Review:
    """What somebody decided about a label."""

    label: str
    """Id of the label."""
    verdict: Verdict
    """accepted, rejected or needs work."""
    by: str
    """Who decided."""
    why: str
    """The reason; may be empty where the label was accepted."""
    at: str
    """When, in UTC, as 2026-01-31T12:00:00.000000Z."""

    @property
    def id(self) -> str:
        """Hash of everything in it: the same review loaded twice is one."""
        return sha256_bytes(canonical_json(asdict(self)))[:16]

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {"id": self.id, **asdict(self)}


@dataclass(frozen=True)
class Label:
    """What somebody, or something, says that a latent is about."""

    sae: str
    """Id of the autoencoder that the latent belongs to."""
    latent: int
    """Number of the latent."""
    text: str
    """What it is about, in one line."""
    by: str
    """Who proposed it: a person, or the tool."""
    kind: str
    """How it was made: lexical, llm, person, imported …"""
    model: str | None
    """The language model that wrote it, if one did."""
    at: str
    """When, in UTC."""
    scores: Mapping[str, Any] | None = None
    """The latest scores, by scorer; none where it was not scored."""
    reviews: tuple[Review, ...] = ()
    """What was decided about it, oldest first."""

    @property
    def id(self) -> str:
        """Hash of what was proposed, by whom and when: the same label loaded twice is one."""
        proposed = (self.sae, self.latent, self.text, self.by, self.kind, self.model, self.at)
        return sha256_bytes(canonical_json(proposed))[:16]

    @property
    def status(self) -> Status:
        """The latest verdict, or proposed where nobody has decided yet."""
        return self.reviews[-1].verdict if self.reviews else "proposed"

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "id": self.id,
            **{name: value for name, value in vars(self).items() if name != "reviews"},
            "status": self.status,
            "reviews": [review.as_dict() for review in self.reviews],
        }


def clean(text: str, what: str, longest: int, *, empty: bool = False) -> str:
    """One line of text without leading, trailing or repeated blanks.

    Raises UserError, naming `what`, where it is empty, longer than `longest` characters, or holds a control
    character, half a surrogate pair, or a mark that turns the direction of the text around it.
    """
    line = " ".join(text.split())
    if not line and not empty:
        raise UserError(f"{what} is empty; write something")
    if len(line) > longest:
        raise UserError(f"{what} has {len(line):,} characters; write at most {longest:,}")
    for character in line:
        if unicodedata.category(character) in ("Cc", "Cs") or unicodedata.bidirectional(character) in _TURNS:
            raise UserError(f"{what} holds the control character U+{ord(character):04X}; leave it out")
    return line


_TURNS = frozenset(("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"))


def checked_verdict(verdict: str) -> Verdict:
    """The verdict; raises UserError where there is no such one."""
    if verdict not in VERDICTS:
        raise UserError(f"there is no verdict {verdict!r}; choose one of {', '.join(VERDICTS)}")
    return cast(Verdict, verdict)


def checked_status(status: str) -> Status:
    """The status; raises UserError where there is no such one."""
    if status not in STATUSES:
        raise UserError(f"there is no status {status[:40]!r}; choose one of {', '.join(STATUSES)}")
    return cast(Status, status)


def checked_scores(scores: Mapping[str, Any]) -> str:
    """Scores as canonical JSON; raises UserError where they are no JSON object, hold NaN or are too long."""
    try:
        text = json.dumps(scores, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"the scores of a label must be finite JSON values ({error})") from error
    if not isinstance(cast(object, scores), Mapping) or len(text) > LONGEST_SCORES:
        raise UserError(f"the scores of a label must be an object of at most {LONGEST_SCORES:,} characters")
    return text


def checked_latent(latent: Any) -> int:
    """The latent's number; raises UserError where it is none."""
    if isinstance(latent, bool) or not isinstance(latent, int) or not 0 <= latent < 2**53:
        raise UserError(f"{latent!r} is no latent; give a whole number from 0")
    return latent


def score_of(label: Label, scorer: str) -> float | None:
    """The value of one score of a label; None where it was not measured."""
    found = (label.scores or {}).get(scorer)
    value = cast("Mapping[str, object]", found).get("value") if isinstance(found, Mapping) else found
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)
