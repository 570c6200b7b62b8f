"""The values of a URL, each within its bounds or rejected with a sentence."""

from __future__ import annotations

from typing import Any

from starlette.datastructures import QueryParams

from clinometer.messages import LANGUAGES
from clinometer.view.errors import ApiError

LAST_STEP = 2**53
"""JavaScript counts no further."""
WHOLE = {"type": "integer", "minimum": 0}
"""The JSON schema of a whole number."""


class Query:
    """One request's values; every reader raises `ApiError` 400 for what is out of bounds."""

    def __init__(self, values: QueryParams, default_language: str) -> None:
        self.values = values
        given = values.get("lang", default_language)
        self.language = given if given in LANGUAGES else default_language

    def whole(self, name: str, low: int, high: int, default: int | None = None) -> int | None:
        """A whole number from `low` to `high`."""
        text = self.values.get(name, "")
        if text == "":
            return default
        return self._whole(name, text, low, high)

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float | None:
        text = self.values.get(name, "")
        if text == "":
            return default
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise ApiError(400, "view.between", name=name, given=text[:60], low=low, high=high)
        return value

    def needed(self, name: str, low: int = 0, high: int = LAST_STEP) -> int:
        value = self.whole(name, low, high)
        if value is None:
            raise ApiError(400, "view.needed", name=name)
        return value

    def text(self, name: str, limit: int = 1_024) -> str:
        value = self.values.get(name, "")
        if not value:
            raise ApiError(400, "view.needed", name=name)
        if len(value) > limit:
            raise ApiError(400, "view.too_long", name=name, limit=limit)
        return value

    def choice(self, name: str, choices: Any, default: str | None = None) -> str:
        value = self.values.get(name, "") or default
        if value is None:
            raise ApiError(400, "view.needed", name=name)
        if value not in choices:
            raise ApiError(400, "view.choice", name=name, given=value[:60], choices=", ".join(choices))
        return value

    def wholes(self, name: str, limit: int, high: int = LAST_STEP) -> list[int]:
        """A comma list of whole numbers, empty where the name is absent."""
        text = self.values.get(name, "")
        if not text:
            return []
        parts = text.split(",")
        if len(parts) > limit:
            raise ApiError(400, "view.too_many", name=name, limit=limit)
        return [self._whole(name, part.strip(), 0, high) for part in parts]

    def texts(self, name: str, limit: int) -> list[str]:
        parts = [part for part in self.values.get(name, "").split(",") if part]
        if len(parts) > limit:
            raise ApiError(400, "view.too_many", name=name, limit=limit)
        return parts

    def steps(self) -> tuple[int | None, int | None]:
        """`from` and `to`."""
        first, last = self.whole("from", 0, LAST_STEP), self.whole("to", 0, LAST_STEP)
        if first is not None and last is not None and first > last:
            raise ApiError(400, "view.order", first=first, last=last)
        return first, last

    def range(self, name: str) -> tuple[int, int] | None:
        """`a,b`, half-open."""
        values = self.wholes(name, 2)
        if not values:
            return None
        if len(values) != 2 or values[0] >= values[1]:
            raise ApiError(400, "view.range", name=name, given=self.values.get(name, "")[:60])
        return values[0], values[1]

    def theme(self) -> str:
        return self.choice("theme", ("light", "dark"), "light")

    def _whole(self, name: str, text: str, low: int, high: int) -> int:
        digits = text.removeprefix("-")
        value = int(text) if digits.isascii() and digits.isdigit() and len(digits) <= 16 else None
        if value is None or not low <= value <= high:
            raise ApiError(400, "view.between", name=name, given=text[:60], low=low, high=high)
        return value
