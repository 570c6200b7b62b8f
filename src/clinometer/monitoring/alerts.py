"""Alerts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Alerts:
    def __init__(self, tell: Callable[[dict[str, Any]], None]) -> None:
        self._tell = tell
        self._all: list[dict[str, Any]] = []

    def all(self) -> list[dict[str, Any]]:
        return self._all

    def look(self, row: Any, roster: Any) -> None: ...
