"""Cutting a long text into pieces that encode, one by one, to the ids of the whole.

The GPT-2 pattern (Radford et al. 2019, `encoder.py`) splits a text into words and never merges across them:

    's|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+

Independent of the text further away, two places are word boundaries:
before white space that follows something else, since no alternative spans both; and
before a punctuation mark that follows a letter, since every alternative that takes the letter ends there.
The piece on the left then ends in no white space, so the look-ahead cannot tell that the rest is missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

# The classes are narrow on purpose: Python's Unicode tables and the encoders' need not be of one year.
_BOUNDARY = re.compile(r"(?<=\S)(?=[ \n\r\t])|(?<=[A-Za-z一-龥])(?=[，。！？；：、,.;:!?])")
_WINDOW = 128


def last_safe_cut(text: str, special_tokens: Sequence[str] = (), end: int | None = None) -> int:
    """The last index in (0, end) where a cut leaves the ids of `text` as they are, or 0 if there is none."""
    end = len(text) if end is None else end
    window = _WINDOW
    while end > 0:
        start = max(0, end - window)
        # One character of context: a look-behind does not see before `pos` of a slice.
        block = text[max(0, start - 1) : end + 1]
        shift = max(0, start - 1)
        for match in reversed(list(_BOUNDARY.finditer(block))):
            cut = match.start() + shift
            if 0 < cut < end and not _inside_special(text, cut, special_tokens):
                return cut
        end = start
        window *= 2
    return 0


def safe_pieces(
    chunks: Iterable[str], special_tokens: Sequence[str] = (), *, characters: int = 1 << 20
) -> Iterator[str]:
    """The text of `chunks` again, in pieces of about `characters` that may be encoded separately.

    Where no safe place exists the piece grows until there is one, so ids never depend on the cutting.
    """
    margin = max((len(token) for token in special_tokens), default=1)
    waiting: list[str] = []
    held = 0
    wanted = characters
    for chunk in chunks:
        waiting.append(chunk)
        held += len(chunk)
        while held >= wanted + margin:
            text = "".join(waiting)
            # A special token that begins before the cut may still be arriving: stay clear of the end.
            cut = _first_cut_after(text, special_tokens, characters, held - margin)
            if cut == 0:
                waiting, wanted = [text], held * 2
                break
            yield text[:cut]
            waiting, held, wanted = [text[cut:]], held - cut, characters
    if held:
        yield "".join(waiting)


def _first_cut_after(text: str, special_tokens: Sequence[str], characters: int, end: int) -> int:
    """The last cut within `characters`, else the last one before `end`."""
    near = last_safe_cut(text, special_tokens, min(characters, end))
    return near or last_safe_cut(text, special_tokens, end)


def _inside_special(text: str, cut: int, special_tokens: Sequence[str]) -> bool:
    for token in special_tokens:
        start = text.find(token, max(0, cut - len(token) + 1), cut + len(token) - 1)
        if 0 <= start < cut:
            return True
    return False
