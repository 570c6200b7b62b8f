"""Which of torch's optimizers an optimizer is: by the identity of its class, never by its name.

An optimizer is torch's if the `step` it takes is that of a class of torch.optim. A subclass with a `step`
of its own descends from torch's, and may do something else on purpose.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

TORCHS: frozenset[type] = frozenset(
    value
    for value in vars(torch.optim).values()
    if inspect.isclass(value) and issubclass(value, Optimizer) and value is not Optimizer
)
"""The classes of torch.optim."""

_PROPORTIONAL = ("AdamW", "Muon", "Adafactor", "SGD")
"""Whose weight decay takes a share of the weight itself; elsewhere the step divides it by the gradient's
size."""


def ancestor_of(optimizer: Any) -> type | None:
    """The nearest class of torch.optim that the optimizer's class is or descends from."""
    return next((cls for cls in type(optimizer).__mro__ if cls in TORCHS), None)


def has_own_step(optimizer: Any) -> bool:
    """Whether its `step` is another than that of the class of torch.optim it descends from."""
    definer = next((cls for cls in type(optimizer).__mro__ if "step" in vars(cls)), None)
    return definer not in TORCHS


def option(group: dict[str, Any], name: str, default: float = 0.0) -> float:
    """A number of a parameter group; NaN if it is none."""
    value = group.get(name, default)
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError):
        return float("nan")


def shrinks_by(optimizer: Any, group: dict[str, Any]) -> float | None:
    """The share of every weight that weight decay takes away in a step of this group; None if not known.

    It is lr λ where decay acts on the weight itself, and for SGD, whose momentum makes it more with time.
    Known for torch's classes only.
    """
    kind = None if has_own_step(optimizer) else ancestor_of(optimizer)
    if kind is None or not (kind.__name__ in _PROPORTIONAL or group.get("decoupled_weight_decay")):
        return None
    return option(group, "lr") * option(group, "weight_decay")


def tensors_of(*optimizers: Any) -> dict[int, Tensor]:
    """The tensors that optimizers hold, by id."""
    groups = [group for optimizer in optimizers for group in getattr(optimizer, "param_groups", ())]
    return {id(tensor): tensor for group in groups for tensor in group["params"]}


def holds_any(optimizer: Any, ids: Collection[int]) -> set[int]:
    """Which of these tensors, by id, an optimizer holds."""
    return {key for key in tensors_of(optimizer) if key in ids}
