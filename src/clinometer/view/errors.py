"""What an API call answers when it cannot answer: a status, a key and a sentence."""

from __future__ import annotations

from typing import Any

from clinometer.messages import InputError, say


class ApiError(Exception):
    """A call that cannot be served; becomes {"error": {"key", "text"}} with `status`."""

    def __init__(self, status: int, key: str, /, **values: Any) -> None:
        super().__init__(key, values)
        self.status = status
        self.key = key
        self.values = values
        self.more: dict[str, Any] = {}

    def body(self, language: str) -> dict[str, Any]:
        return {"error": {"key": self.key, "text": say(self.key, language, **self.values)}, **self.more}


def body_of(error: InputError, language: str) -> dict[str, Any]:
    """The same shape for what another room could not read."""
    return {"error": {"key": error.key, "text": error.render(language)}}
