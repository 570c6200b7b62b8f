"""Weights that something other than the optimizer writes between its steps: how much of each step that
undoes.

A few entries of the two largest matrices of each optimizer are kept from one step to the next: reading them
costs some microseconds. A write through `.data` leaves no version, so the values themselves are compared.
With u the optimizer's update of these entries and b what was written after it: undone = −⟨b, u⟩/⟨u, u⟩, and
|b|/|u|.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from clinometer.monitoring.measure.watched_tensors import WatchedTensors

_TENSORS = 2
_ENTRIES = 64
_CLIPPED = 0.9
"""Share of the written entries that end at one size: then they were clipped to it."""


class Write(NamedTuple):
    """What was written to the weights since the optimizer's last step."""

    undone: float
    times: float
    """|b| / |u|."""
    projected: bool
    """All written entries end at one size (clipped), or each tensor is scaled as a whole (normalised)."""
    names: tuple[int, ...]
    """Indices of the tensors that were read."""


class WritesBetween:
    """Samples of one optimizer's weights around its steps."""

    def __init__(self, owned: Sequence[WatchedTensors]) -> None:
        able = [w for w in owned if (t := w.ref()) is not None and _is_able(t)]
        able.sort(key=lambda w: (len(w.shape) < 2, -w.numel))
        self._chosen = able[:_TENSORS]
        self._before: list[Tensor] | None = None
        self._after: list[Tensor] | None = None

    def step_begins(self) -> Write | None:
        """What was written since the last step; None for nothing, or nothing that can be compared."""
        now, before, after = self._samples(), self._before, self._after
        self._before = now
        if now is None or before is None or after is None:
            return None
        if all(torch.equal(a, b) for a, b in zip(now, after, strict=True)):
            return None
        u, b = (
            [x.double() - y.double() for x, y in zip(a, c, strict=True)]
            for a, c in ((after, before), (now, after))
        )
        length = sum(float(x @ x) for x in u)
        if not length > 0:
            return None
        undone = -sum(float(x @ y) for x, y in zip(b, u, strict=True)) / length
        written = [x[y != 0].abs() for x, y in zip(now, b, strict=True)]
        ends = torch.cat(written) if written else torch.empty(0)
        clipped = bool(ends.numel()) and float((ends == ends.max()).double().mean()) > _CLIPPED
        scaled = all(_is_along(y, x) for x, y in zip(after, b, strict=True))
        times = (sum(float(x @ x) for x in b) / length) ** 0.5
        return Write(undone, times, clipped or scaled, tuple(w.index for w in self._chosen))

    def step_ended(self) -> None:
        self._after = self._samples()

    def _samples(self) -> list[Tensor] | None:
        found: list[Tensor] = []
        for one in self._chosen:
            tensor = one.ref()
            if tensor is None:
                return None
            flat = tensor.detach().reshape(-1)
            found.append(flat[:: max(1, flat.numel() // _ENTRIES)][:_ENTRIES].clone())
        return found or None


def _is_along(change: Tensor, old: Tensor) -> bool:
    """Whether a change is the tensor itself times a number, within rounding; nothing changed is one too."""
    old = old.double()
    share = float(change @ old) / (float(old @ old) or 1.0)
    return float((change - share * old).norm()) <= 1e-3 * float(change.norm())


def _is_able(tensor: Tensor) -> bool:
    return (
        tensor.is_cpu
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and tensor.is_floating_point()
        and tensor.requires_grad
    )
