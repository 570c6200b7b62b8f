"""The tokens of a batch, read one at a time."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clinometer.gradients.report.formatting import cell_width
from clinometer.messages import InputError

_COLUMNS = 24


class Text:
    """The tokens of the batch and how to read them."""

    def __init__(self, tokens: Any, decode: Callable[[int], str] | None) -> None:
        self.ids: Tensor | None = None
        self._decode = decode
        self._read: dict[int, str] = {}
        if tokens is not None:
            try:
                self.ids = torch.as_tensor(tokens).detach().cpu()
            except (TypeError, ValueError) as error:
                raise InputError("attribution.tokens", type=type(tokens).__name__) from error

    @property
    def shape(self) -> tuple[int, ...] | None:
        return None if self.ids is None else tuple(self.ids.shape)

    @property
    def readable(self) -> bool:
        """Whether a way to text was given."""
        return self._decode is not None and self.ids is not None

    def at(self, position: tuple[int, ...]) -> str:
        """The token's text as one line, "#1234" without a way to text, "" without tokens."""
        if self.ids is None:
            return ""
        token = int(self.ids[position])
        if self._decode is None:
            return f"#{token}"
        if token not in self._read:
            self._read[token] = _one_line(str(self._decode(token)))
        return self._read[token]


def _one_line(text: str) -> str:
    shown = "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") else c
        for c in text
    )
    while cell_width(shown) > _COLUMNS:
        shown = shown[: len(shown) - 2] + "…" if not shown.endswith("…") else shown[:-2] + "…"
    return shown
