"""Text of unknown origin made fit to be shown: escaped, its hidden characters visible, its length bounded."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache

from markupsafe import Markup, escape

LONGEST_TOKEN = 80
"""Characters of a token that are shown; JSON has all of them."""
STACKED = 5
"""Tokens on either side of a firing in the narrowest view."""


def alpha(value: float, maximum: float) -> float:
    """Opacity of a token's highlight: 0.05 + 0.95·log10(1 + 9·a/max); 0 where the latent does not fire."""
    if not (value > 0 and maximum > 0):
        return 0.0
    return round(0.05 + 0.95 * math.log10(1 + 9 * min(value / maximum, 1.0)), 3)


_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Whatever `_visible_character` changes."""


def visible(text: str) -> str:
    """`text` with control characters as pictures, bidirectional overrides and lone surrogates replaced.

    One character for one, so that offsets into the text stay right.
    """
    if _HIDDEN.search(text) is None:
        return str.__str__(text)  # plain: a Markup that somebody slipped in is text to be escaped again
    return "".join(_visible_character(c) for c in text)


def _visible_character(c: str) -> str:
    code = ord(c)
    if code < 0x20 and c not in "\n\t":
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    # Overrides and embeddings make text read as what it is not; surrogates cannot be written as UTF-8.
    hidden = 0x80 <= code < 0xA0 or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069
    return "\ufffd" if hidden or 0xD800 <= code <= 0xDFFF else c


def clipped(text: str, limit: int = LONGEST_TOKEN) -> str:
    """`text` made visible, and cut after `limit` characters with a note of how long it is."""
    shown = visible(text[:limit])
    return shown if len(text) <= limit else f"{shown}… ({len(text):,} characters)"


def token_name(text: str, limit: int = LONGEST_TOKEN) -> str:
    """A token that stands by itself: spaces and line breaks drawn as signs, nothing for an empty one."""
    if not text:
        return "(empty)"
    signs = str.maketrans({"\n": "↵", "\t": "→", " ": "␣"})
    shown = visible(text[:limit]).translate(signs)
    return shown if len(text) <= limit else f"{shown}… ({len(text):,} characters)"


def number(value: float | None, digits: int = 3) -> str:
    """A number with a true minus sign, the fewer decimals the larger; a dash for what is not finite."""
    if value is None or not math.isfinite(value):
        return "–"
    if value and abs(value) < 10**-digits:
        text = f"{value:.{digits}g}"
    else:
        whole = math.floor(math.log10(abs(value))) if value else 0
        text = f"{value:,.{max(digits - max(whole, 0), 0)}f}"
    return text.replace("-", "−")


def share(value: float | None) -> str:
    """A share in per cent with three significant digits, and nothing smaller than a hundred-millionth."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0\u202f%"
    digits = min(max(2 - math.floor(math.log10(abs(100 * value))), 0), 6)
    return f"{100 * value:.{digits}f}\u202f%".replace("-", "−")


def shade(value: float, maximum: float) -> int:
    """The highlight's opacity in per cent, which is the number of its CSS class (see `shades`)."""
    return round(100 * alpha(value, maximum))


def shades() -> str:
    """A style sheet with a class for every opacity: pages hold no styles of their own."""
    return "".join(f".a{i}{{--a:{i / 100:g}}}\n" for i in range(1, 101))


@lru_cache(maxsize=16_384)
def _markup(token: str) -> str:
    """A token in running text; a page has thousands, and few different ones."""
    return str(escape(clipped(token))).replace("\n", '<i class="nl">↵</i><br>')


def marked_tokens(
    tokens: Sequence[str], values: Sequence[float | None], maximum: float, centre: int | None = None
) -> Markup:
    """Tokens in a row, each with its value, coloured by it; the text in three parts around `centre`.

    Those further than STACKED from the centre have the class `far`. A value of None is not known.
    """
    parts: list[list[str]] = [[], [], []]
    for i, (token, value) in enumerate(zip(tokens, values, strict=True)):
        classes = ["t"] if value is not None else ["t", "unknown"]
        if value is not None and (level := shade(value, maximum)):
            classes.append(f"a{level}")
        if centre is not None and abs(i - centre) > STACKED:
            classes.append("far")
        said = "" if value is None else f' data-v="{number(value) if value else 0}"'
        part = 0 if centre is None or i < centre else 1 if i == centre else 2
        parts[part].append(f'<span class="{" ".join(classes)}"{said}>{_markup(token)}</span>')
    if centre is None:
        return Markup("".join(parts[0]))
    names = ("before", "peak", "after")
    return Markup("").join(
        Markup('<span class="{}">{}</span>').format(name, Markup("".join(part)))
        for name, part in zip(names, parts, strict=True)
    )
