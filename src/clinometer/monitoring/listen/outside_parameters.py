"""Parameters that the loss depends on, that are not watched, and that no step moves: those of a criterion.

The graph of the first backward ends in them. Some steps later each of them that has a gradient, the value it
had, and no optimizer of this process is reported. Only parameters: a plain tensor that asks for a gradient
may be an input.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clinometer.gradients.optimizers.identity import holds_any
from clinometer.monitoring.measure.watched_tensors import Roster, leaves_of
from clinometer.torch_internals.modules import own_parameters

_ENTRIES = 64


class OutsideParameter(NamedTuple):
    """A parameter that gets a gradient and that nothing moves."""

    name: str
    """The class of the module that holds it, and its name there."""
    training: bool


class OutsideParameters:
    """The parameters at the end of the first graph that are not watched."""

    def __init__(self) -> None:
        self._found: list[tuple[weakref.ref[Tensor], Tensor]] | None = None

    def look(self, losses: Iterable[Tensor], roster: Roster) -> None:
        """Read the first graph that reaches the watched tensors."""
        if self._found is not None:
            return
        leaves = leaves_of(losses)
        if any(roster.find(leaf) is not None for leaf in leaves):
            outside = [
                leaf for leaf in leaves if isinstance(leaf, nn.Parameter) and roster.find(leaf) is None
            ]
            self._found = [(weakref.ref(leaf), _sample(leaf)) for leaf in outside]

    def still(self) -> list[OutsideParameter]:
        """Those that have a gradient, their old values and no optimizer; asked once."""
        found, self._found = self._found or [], []
        living = [(tensor, old) for reference, old in found if (tensor := reference()) is not None]
        able = {id(t): t for t, old in living if t.grad is not None and torch.equal(_sample(t), old)}
        if not able:
            return []
        names: dict[int, OutsideParameter] = {}
        for thing in gc.get_objects():
            # Its type, not isinstance: that would ask lazy proxies for their class and wake them up.
            if issubclass(type(thing), torch.optim.Optimizer) and holds_any(thing, able):
                for key in holds_any(thing, able):
                    able.pop(key)
            elif issubclass(type(thing), nn.Module):
                for name, parameter in own_parameters(thing).items():
                    if id(parameter) in able:
                        names[id(parameter)] = OutsideParameter(
                            f"{type(thing).__name__}.{name}", thing.training
                        )
        return [names.get(key, OutsideParameter(_shape(tensor), True)) for key, tensor in able.items()]


def _sample(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1)[:_ENTRIES].clone()


def _shape(tensor: Any) -> str:
    return "×".join(map(str, tensor.shape)) or "1"
