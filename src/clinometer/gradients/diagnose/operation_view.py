"""One operation of torch, and what arrived at it: the same view of a call of the forward and of a node.

A call has its arguments, a node what it saved; both under torch's own names ("self", "other", "exponent").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clinometer.gradients.report.finding import FAULT, Severity
from clinometer.gradients.sandbox.tensors import plain


@dataclass(frozen=True)
class Clue:
    """What a node that zeroed or spoilt a gradient looks like, or a call that made NaN or infinity."""

    cause: str
    variant: str = ""
    severity: Severity = FAULT
    values: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class OperationView:
    """An operation that made numbers that are not finite out of what arrived at it."""

    name: str
    """Without underscores, as `canonical` gives it: "logsoftmax"."""
    read: Callable[[str], Any]
    """An argument or a saved value by torch's name; None if there is none, or it may not be read."""
    result: Tensor
    """The result of a call; or the gradient that a node hands on."""
    arrived: Tensor | None = None
    """The gradient that came to a node; None for a call."""
    position: int = 0
    """Which input of a node `result` is the gradient of."""

    @property
    def backward(self) -> bool:
        return self.arrived is not None

    @property
    def spoilt(self) -> Tensor:
        """Which entries of `result` are not finite."""
        return ~torch.isfinite(self.result)

    @property
    def nan(self) -> bool:
        return bool(torch.isnan(self.result).any())

    @property
    def dtype(self) -> torch.dtype:
        return self.result.dtype

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def nothing_arrived(self) -> bool:
        """Whether the gradient is zero wherever this node made NaN of it."""
        if self.arrived is None or self.arrived.shape != self.result.shape:
            return False
        return bool((self.arrived[self.spoilt] == 0).all())

    def at(self, name: str) -> Tensor | None:
        """The values of an argument that belong to the spoilt entries, one after the other."""
        value = self.read(name)
        if isinstance(value, bool | int | float | complex):
            value = torch.tensor(value)
        if not isinstance(value, Tensor) or value.is_meta:
            return None
        value = plain(value).detach()
        try:
            shape = torch.broadcast_shapes(value.shape, self.result.shape)
            return value.expand(shape)[self.spoilt.expand(shape)]
        except (RuntimeError, IndexError):  # shapes that have nothing to do with each other
            return None

    def tensor(self, name: str) -> Tensor | None:
        """A whole argument, if it is a floating-point or complex tensor whose values can be read."""
        value = self.read(name)
        if not isinstance(value, Tensor) or value.is_meta or value.layout is not torch.strided:
            return None
        value = plain(value).detach()
        return value if value.is_floating_point() or value.is_complex() else None


def canonical(name: str) -> str:
    """An operation's name as rules know it: "LogSoftmax", "_log_softmax" and "log_softmax_" are one."""
    return name.replace("_", "").lower().removesuffix("forward")
