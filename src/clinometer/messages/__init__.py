"""Every sentence that Clinometer shows to a person, in each language.

A language is a file of this folder: `en.toml`, `zh.toml`, and any other `<code>.toml`, with the same keys and
the same placeholders; its table [language] has its name and locale. A sentence that a file lacks is shown in
English. Code raises or reports a *key* with values, and the sentence is made when it is read:

    raise InputError("model.heads", d_model=100, num_heads=3)
    say("run.done", steps=2000)

A place may choose words by a number: "{steps} {steps|step|steps}" is "1 step", "2,000 steps".
"""

from __future__ import annotations

import os
import re
import shlex
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from string import Formatter
from typing import Any

_FILES = [file.name for file in files(__name__).iterdir() if file.name.endswith(".toml")]
LANGUAGES = ("en", *sorted({name.removesuffix(".toml") for name in _FILES} - {"en"}))
"""The codes of the languages that have a file, English first."""

_chosen: str | None = None


def set_language(name: str | None) -> None:
    """Fix the language of this process; `None` returns to the environment's choice."""
    global _chosen
    if name is not None and name not in LANGUAGES:
        raise InputError("messages.language", given=name, known=", ".join(LANGUAGES))
    _chosen = name


def current_language() -> str:
    """`set_language`'s choice, else CLINOMETER_LANG, else the locale, else "en"."""
    if _chosen is not None:
        return _chosen
    for variable in ("CLINOMETER_LANG", "LC_ALL", "LC_MESSAGES", "LANG"):
        value = os.environ.get(variable)
        if value:
            return _nearest(value)
    return "en"


def _nearest(locale: str) -> str:
    """The language of a locale such as zh_CN.UTF-8: the longest code that it begins with, else "en"."""
    wanted = locale.lower().replace("_", "-")
    fitting = [code for code in LANGUAGES if re.match(rf"{re.escape(code.lower())}(?![a-z])", wanted)]
    return max(fitting, key=len, default="en")


@cache
def sentences(language: str) -> dict[str, str]:
    """All sentences of one language, by dotted key."""
    return {key: text for first in _tables("en") for key, text in _below(language, first).items()}


def language_value(language: str, name: str) -> str:
    """The `name`, `tag` (of HTML) or `locale` in the file of a language; its code if there is none."""
    return _own(language, "language").get(f"language.{name}", language)


def say(key: str, language: str | None = None, /, **values: Any) -> str:
    """The sentence `key` with `values` in its places, in `language` (default: `current_language()`)."""
    known = _below(language or current_language(), key.partition(".")[0])
    return _SENTENCE.vformat(known[key], (), values)


@cache
def _tables(language: str) -> dict[str, str]:
    """The file's tables as text, by the first part of their names: a command reads those it speaks from."""
    text = files(__name__).joinpath(f"{language}.toml").read_text(encoding="utf-8")
    tables: dict[str, str] = {}
    for table in re.split(r"^(?=\[)", text, flags=re.MULTILINE)[1:]:
        first = re.split(r"[].]", table[1:], maxsplit=1)[0]
        tables[first] = tables.get(first, "") + table
    return tables


@cache
def _below(language: str, first: str) -> dict[str, str]:
    """The sentences of a table; English where the language has none."""
    own = _own(language, first)
    return own if language == "en" else {**_own("en", first), **own}


@cache
def _own(language: str, first: str) -> dict[str, str]:
    return dict(_flatten(tomllib.loads(_tables(language).get(first, ""))))


def one_or_many(place: str, values: Mapping[str, Any]) -> str | None:
    """The word a place "steps|step|steps" chooses: the first when `steps` reads "1"; None for a bare name."""
    name, *words = place.split("|")
    if not words:
        return None
    one, many = words
    return one if str(values[name]) == "1" else many


class _Sentence(Formatter):
    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        chosen = one_or_many(field_name, kwargs)
        return super().get_field(field_name, args, kwargs) if chosen is None else (chosen, field_name)

    def convert_field(self, value: Any, conversion: Any) -> Any:
        """`{path!q}` stands in a command to copy: quoted for the shell if it has to be."""
        return shlex.quote(str(value)) if conversion == "q" else super().convert_field(value, conversion)


_SENTENCE = _Sentence()


class InputError(ValueError):
    """Something given from outside cannot be used; says what, the value, and the remedy.

    The command line prints it as one paragraph and exits with 2.
    """

    def __init__(self, key: str, /, **values: Any) -> None:
        super().__init__(key, values)
        self.key = key
        self.values = values

    def __str__(self) -> str:
        return say(self.key, **self.values)

    def render(self, language: str) -> str:
        return say(self.key, language, **self.values)


def _flatten(table: dict[str, Any], prefix: str = "") -> Any:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
