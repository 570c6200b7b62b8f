"""Where two runs of the same closure first differ."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from clinometer.gradients.report.places import Where, user_frame


class _Fingerprints(TorchFunctionMode):
    """One number for the result of every call; at the second run the first that differs is located."""

    def __init__(self) -> None:
        super().__init__()
        self._first: list[tuple[str, float]] = []
        self._position: int | None = None
        self.where: Where | None = None
        self.found = False

    def again(self) -> None:
        self._position = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name == "__get__" or self.found:
            return out
        mark = (name, _sum(out))
        if self._position is None:
            self._first.append(mark)
        else:
            place, self._position = self._position, self._position + 1
            if place >= len(self._first) or not _same(self._first[place], mark):
                self.found = True
                self.where = user_frame(sys._getframe(1), op=name)
        return out


def first_difference(run: Callable[[], Tensor], mode: AbstractContextManager[Any]) -> Where | None:
    """The first call of torch whose result is not what it was in the run before; None if none is."""
    marks = _Fingerprints()
    with mode, marks:
        run()
    marks.again()
    with mode, marks:
        run()
    return marks.where


def _sum(out: Any) -> float:
    if isinstance(out, Tensor):
        if out.is_meta or out.layout is not torch.strided or not out.numel() or out.is_quantized:
            return float(out.numel())
        values = out.detach()
        values = torch.view_as_real(values.resolve_conj()) if values.is_complex() else values
        values = values.to(torch.float64).reshape(-1)
        # Weighted, so that another order of the same numbers counts as different.
        return float(values @ torch.linspace(1, 2, values.numel(), dtype=torch.float64, device=values.device))
    if isinstance(out, bool | int | float):
        return float(out)
    if isinstance(out, tuple | list):
        return sum(_sum(item) * (i + 1) for i, item in enumerate(out))
    return 0.0


def _same(a: tuple[str, float], b: tuple[str, float]) -> bool:
    if a[0] != b[0]:
        return False
    return a[1] == b[1] or (a[1] != a[1] and b[1] != b[1]) or abs(a[1] - b[1]) <= 1e-12 * abs(a[1])
