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
        return 1 + int(next((float(self.state[k]) for k in ("step", "t") if k in self.state), 0))


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


def wide(tensor: Tensor) -> Tensor:
    """float64, complex numbers as pairs; on the CPU where the device has no float64."""
    tensor = tensor.detach()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.to("cpu" if tensor.device.type == "mps" else tensor.device, torch.float64)
