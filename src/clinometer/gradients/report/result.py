"""What every result shares: an entry by name, and text, console, HTML and JSON from one document."""

from __future__ import annotations

import dataclasses
import math
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from os import PathLike, fspath
from typing import Any

import torch
from torch import Tensor

from clinometer.gradients.report.document import Document, to_html, to_rich, to_text
from clinometer.gradients.sandbox.subject import UnknownName
from clinometer.messages import LANGUAGES, InputError


class Result(ABC):
    """A result; a subclass says its entries, its document and its facts.

    It should hold no model and no graph, so that keeping a result keeps nothing else alive.
    """

    @abstractmethod
    def entries(self) -> Mapping[str, Any]:
        """What `result[name]` looks in: one entry a tensor, in the order of every list."""

    @abstractmethod
    def document(self, language: str | None = None) -> Document:
        """What a person sees."""

    @abstractmethod
    def facts(self) -> Mapping[str, Any]:
        """What a machine reads; `to_dict` makes it ready for JSON."""

    def other_names(self) -> Mapping[str, str]:
        """Names that may be used besides those of `entries`: `Subject.canonical`."""
        return {}

    def __getitem__(self, name: str) -> Any:
        """The entry of one tensor, by any of its names; raises UnknownName, a KeyError."""
        entries = self.entries()
        found = name if name in entries else self.other_names().get(name)
        if found is None or found not in entries:
            raise UnknownName(name, entries)
        return entries[found]

    def __contains__(self, name: object) -> bool:
        entries = self.entries()
        return name in entries or self.other_names().get(str(name)) in entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries())

    def __len__(self) -> int:
        return len(self.entries())

    def __bool__(self) -> bool:
        return True

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON: numbers that are not finite are the strings "NaN", "Infinity", "-Infinity"."""
        return jsonable(self.facts())

    def render(self, language: str | None = None, width: int | None = None) -> str:
        """Text in `language` (default: the current one), wrapped at `width` (default: the terminal's).

        Raises InputError for an unknown language.
        """
        if language is not None and language not in LANGUAGES:
            raise InputError("messages.language", given=language, known=", ".join(LANGUAGES))
        return to_text(self.document(language), width or _terminal_width())

    def __str__(self) -> str:
        return self.render()

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        yield from to_rich(self.document(), options.max_width)

    def _repr_html_(self) -> str:
        return to_html(self.document())


def jsonable(value: Any) -> Any:
    """`value` of nothing but dicts, lists, strings, finite numbers, booleans and None.

    Objects with `to_dict` and dataclasses become dicts, tensors numbers or lists, complex numbers
    {"real", "imag"}; anything else its `str`.
    """
    if isinstance(value, Enum):
        return jsonable(value.value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        value = float(value)
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, complex):
        return {"real": jsonable(value.real), "imag": jsonable(value.imag)}
    if isinstance(value, Tensor):
        return jsonable(value.detach().tolist())
    if callable(getattr(value, "to_dict", None)):
        return jsonable(value.to_dict())
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return jsonable(value.tolist())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: jsonable(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, PathLike):
        return fspath(value)
    if isinstance(value, Iterable):
        return [jsonable(item) for item in value]
    return str(value)


def _terminal_width() -> int:
    return min(120, max(60, shutil.get_terminal_size((100, 24)).columns))
