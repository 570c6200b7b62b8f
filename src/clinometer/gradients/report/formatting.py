"""Numbers and lists as a person reads them."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence

from clinometer.messages import say

MINUS = "−"


def format_number(
    x: float, *, sign: bool = False, place: str | None = None, language: str | None = None
) -> str:
    """Four significant digits, scientific outside 1e-3…1e4, "0" for a true zero.

    `sign` writes "+" too. NaN and infinity are shown with their place, "NaN at [3, 5]"; give `place=""`
    for a number that is alone in its tensor, or the text says that the place was not recorded.
    """
    x = float(x)
    if not math.isfinite(x):
        text = "NaN" if math.isnan(x) else ("+∞" if x > 0 else f"{MINUS}∞")
        if place is None:
            return say("gradients.number.unplaced", language, value=text)
        return say("gradients.number.placed", language, value=text, place=place) if place else text
    if x == 0:
        return "0"
    size = abs(x)
    text = f"{size:#.4g}".rstrip(".") if 1e-3 <= size < 1e4 else f"{size:.3e}"
    return (MINUS if x < 0 else "+" if sign else "") + text


def format_count(n: int) -> str:
    """A whole number with its thousands apart: 124,439,808."""
    return f"{abs(n):,}" if n >= 0 else f"{MINUS}{abs(n):,}"


def shorten(names: Sequence[str], keep: int = 3, language: str | None = None) -> str:
    """The first names and the count of the rest: "a, b, c and 24 more", "a、b、c，另有 24 个"."""
    shown = say("gradients.list.separator", language).join(names[:keep])
    rest = len(names) - keep
    if rest <= 0:
        return shown
    return say("gradients.list.more", language, names=shown, count=format_count(rest))


def cell_width(text: str) -> int:
    """Columns of a terminal that `text` takes: East-Asian wide characters count two, marks none."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(c) or c in "\u200b\u200d\ufe0f" else 2 if is_wide(c) else 1 for c in text
    )


def is_wide(character: str) -> bool:
    return unicodedata.east_asian_width(character) in "WF"


def words(text: str) -> frozenset[str]:
    """The set of names written in `text`, apart by spaces."""
    return frozenset(text.split())
