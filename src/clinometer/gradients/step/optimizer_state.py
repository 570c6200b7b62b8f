"""What an optimizer held before a step, and what a replay of the step gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Number = Tensor | float


@dataclass(frozen=True)
class OptimizerState:
    """What an optimizer held for one tensor (or for some entries of it), in the dtypes it was held in."""

    theta: Tensor
    grad: Tensor
    state: Mapping[str, Any]
    options: Mapping[str, Any]
    counts_next: bool = False
    """Whether its count is that of the step that follows, as in `t = state.get("t", 1)`."""

    def option(self, *names: str, default: Any = None) -> Any:
        """A number or switch of the parameter's group, under the first of the names that is there."""
        for name in names:
            if name in self.options:
                value = self.options[name]
                return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        return default

    def number(self, *names: str, default: float = 0.0) -> float:
        return float(self.option(*names, default=default))

    @property
    def betas(self) -> tuple[float, float]:
        beta1, beta2 = self.option("betas", default=None) or (self.option("beta1"), self.option("beta2"))
        return float(beta1), float(beta2)

    @property
    def signed_grad(self) -> Tensor:
        """g in float64, turned round when the loss is to be raised."""
        return -wide(self.grad) if self.option("maximize") else wide(self.grad)

    def kept(self, *names: str) -> Tensor | None:
        """A tensor of the state in float64; None before the first step."""
        for name in names:
            if isinstance(value := self.state.get(name), Tensor):
                return wide(value)
        return None

    @property
    def t(self) -> int:
        """The count that includes this step."""
        count = count_in(self.state, self.options)
        return 1 if count is None else count if self.counts_next else count + 1


class Quantity(NamedTuple):
    """One line of the anatomy: what it is called, its sign, its value before and after, its formula."""

    key: str
    symbol: str
    before: Number | None
    after: Number
    formula: str = ""


@dataclass(frozen=True)
class ReplayedUpdate:
    """One step in float64."""

    quantities: tuple[Quantity, ...]
    update: Tensor
    decay: Tensor
    momentum: Tensor
    """What the old momentum alone would give of the update (of Muon's direction before it is made
    orthogonal, for that is where the two add up)."""
    fresh: Tensor
    """What this batch's gradient alone would give of it."""
    theta: Tensor
    """The weight after the step."""
    rounded: Tensor
    """How large the numbers are that the optimizer rounded on its way to the update."""
    numbers: Mapping[str, float]


def count_in(*holders: Mapping[str, Any]) -> int | None:
    """The number of steps taken that a state or a group holds; None if it holds none."""
    for holder in holders:
        for key in ("step", "t"):
            value = holder.get(key)
            if isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1):
                return int(value)
    return None


def or_zero(kept: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if kept is None else kept


def real_pairs(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs, in the dtype they have."""
    tensor = tensor.detach()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def wide(tensor: Tensor) -> Tensor:
    """float64, complex numbers as pairs; on the CPU where the device has no float64."""
    tensor = real_pairs(tensor)
    return tensor.to("cpu" if tensor.device.type == "mps" else tensor.device, torch.float64)
