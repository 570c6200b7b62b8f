"""Sentences that fit a terminal: broken between words, or between wide characters, never inside a word."""

from __future__ import annotations

import re
from typing import Any
from unicodedata import combining, east_asian_width

NEVER_FIRST = "，。；：、！？）》”’」』】…%·"
NEVER_LAST = "（《“‘「『【"


def fold(text: str, width: int) -> str:
    """`text` in lines of at most `width` columns.

    A line that begins with a space is a command to copy: it stays whole, and the terminal folds it.
    """
    return "\n".join(line if line[:1] == " " else _folded(line, width) for line in text.split("\n"))


def tell(console: Any, text: str, style: str = "") -> None:
    """Print on a rich console: folded on a terminal, as it is elsewhere."""
    shown = fold(text, console.width) if console.is_terminal else text
    console.print(shown, style=style, markup=False, highlight=False, soft_wrap=True)


def _folded(text: str, width: int) -> str:
    lines, line, used, gap = [], "", 0, ""
    for unit in _units(text):
        if unit.isspace():
            gap = unit
            continue
        size = _columns(unit)
        if line and used + len(gap) + size > width:
            lines.append(line)
            line, used, gap = "", 0, ""
        line, used, gap = line + gap + unit, used + len(gap) + size, ""
    return "\n".join([*lines, line])


def _units(text: str) -> list[str]:
    """Words, runs of spaces, and wide characters with their punctuation."""
    units: list[str] = []
    for piece in re.findall(r"\s+|\S", text):
        if units and _stay_together(units[-1][-1], piece[0]):
            units[-1] += piece
        else:
            units.append(piece)
    return units


def _stay_together(before: str, after: str) -> bool:
    if before.isspace() or after.isspace():
        return False
    if after in NEVER_FIRST or before in NEVER_LAST:
        return True
    return not (_wide(before) or _wide(after))


def _columns(text: str) -> int:
    return sum(0 if combining(c) else 2 if _wide(c) else 1 for c in text)


def _wide(character: str) -> bool:
    return east_asian_width(character) in "WF"
