"""A file of settings: read with every key and type checked, so that a mistake is named with its line."""

from __future__ import annotations

import difflib
import re
import tomllib
from pathlib import Path
from typing import Any, get_type_hints

from clinometer.messages import InputError
from clinometer.training.settings.config import SECTIONS

_LONGEST = 1 << 18
"""Bytes; ours have three thousand."""
_DEEPEST = 100
"""Dots in a line: tomllib keeps every beginning of a dotted key, n² / 2 names for n parts."""
_MOST_DIGITS = 4_300
"""Of a number: what Python itself is willing to read or write."""


def read_toml(path: Path) -> dict[str, dict[str, Any]]:
    """The file's sections, every key known and every value of its field's type; nothing filled in.

    Raises `InputError` with the file and the line of what is wrong.
    """
    try:
        if path.stat().st_size > _LONGEST:
            raise InputError("config.too_long", path=path, size=path.stat().st_size, limit=_LONGEST)
        text = path.read_text(encoding="utf-8-sig")
    except IsADirectoryError:
        raise InputError("config.folder", path=path) from None
    except UnicodeDecodeError as error:
        raise InputError("config.not_utf8", path=path, offset=error.start) from None
    except OSError as error:
        raise InputError("config.unreadable", path=path, reason=error.strerror) from None
    try:
        _require_shallow(text)
        table = tomllib.loads(text)
        _require_small(table)
    except (ValueError, RecursionError) as error:
        raise InputError("config.not_toml", path=path, reason=error) from None

    for section, values in table.items():
        if section not in SECTIONS:
            raise _unknown(path, text, None, section, list(SECTIONS))
        if not isinstance(values, dict):
            line = _line_of(text, None, section)
            raise InputError("config.section", path=path, line=line, section=section, value=values)
        hints = get_type_hints(SECTIONS[section])
        for key, value in values.items():
            if key not in hints:
                raise _unknown(path, text, section, key, list(hints))
            if not _fits(value, hints[key]):
                raise InputError(
                    "config.type",
                    path=path,
                    line=_line_of(text, section, key),
                    field=f"{section}.{key}",
                    value=value,
                    wanted=_spell(hints[key]),
                )
    return table


def _require_shallow(text: str) -> None:
    for number, line in enumerate(text.splitlines(), 1):
        if line.count(".") > _DEEPEST:
            raise ValueError(f"more than {_DEEPEST} dots (at line {number})")
        if re.search(rf"\d[\d_]{{{_MOST_DIGITS}}}", line):
            raise ValueError(f"a number of more than {_MOST_DIGITS} digits (at line {number})")


def _require_small(value: Any) -> None:
    """Numbers in hexadecimal can be read at any length, and then not be written in a message."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _require_small(item)
    elif isinstance(value, int) and value.bit_length() > 3 * _MOST_DIGITS:
        raise ValueError(f"a number of {value.bit_length()} bits")


def _unknown(path: Path, text: str, section: str | None, key: str, known: list[str]) -> InputError:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not near and section is None:  # a field written outside its section
        near = [f"[{name}] {key}" for name, cls in SECTIONS.items() if key in get_type_hints(cls)]
    return InputError(
        "config.unknown_near" if near else "config.unknown",
        path=path,
        line=_line_of(text, section, key),
        key=key if section is None else f"{section}.{key}",
        near=near[0] if near else "",
        known=", ".join(known),
    )


def _line_of(text: str, section: str | None, key: str) -> int:
    """The 1-based line where `key` (in `[section]`, or `section.key`) is written; 1 if it is not found."""
    current, pattern = None, re.compile(rf"""\s*["']?{re.escape(key)}["']?\s*[=.]""")
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*\[\s*([^\]]+?)\s*\]", line)
        if header:
            current = header[1].strip("\"' ")
            if section is None and current.split(".")[0] == key:
                return number
        elif (current == section and pattern.match(line)) or (
            current is None
            and section
            and re.match(rf"\s*{re.escape(section)}\s*\.\s*{re.escape(key)}\s*=", line)
        ):
            return number
    return 1


def _fits(value: Any, hint: Any) -> bool:
    text = str(hint)
    if isinstance(value, bool):
        return "bool" in text
    if hint is int or text == "int | None":
        return isinstance(value, int)
    if hint is float or text == "float | None":
        return isinstance(value, int | float)
    if "tuple[" in text:
        wanted = text.count("float")
        return isinstance(value, list) and len(value) == wanted and all(_fits(v, float) for v in value)
    return isinstance(value, str)


def _spell(hint: Any) -> str:
    if "tuple[" in str(hint):
        return "[8, 1, 4, 8192]" if str(hint).count("float") == 4 else "[0.9, 0.95]"
    text = str(hint).replace("typing.", "").replace("<class '", "").replace("'>", "").replace(" | None", "")
    return text.removeprefix("Literal")
