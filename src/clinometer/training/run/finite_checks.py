"""Whether weights and optimizer state are finite numbers, before they are kept.

A NaN in a moment is in the weight after one step and in every loss after two; a moment that is infinite
holds its weight still without a sign. A checkpoint of either would take the place of the last good one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clinometer.distributed.sharded_tensors import local
from clinometer.messages import InputError
from clinometer.training.ranks.world import World

STATE_KEYS = ("exp_avg", "exp_avg_sq", "momentum_buffer", "step")
"""Of the optimizers that a run can have; all ranks compare the same list."""


@dataclass(frozen=True)
class Spoilt:
    """A tensor of the run that is not finite: its weight's name and, of the optimizer's, the key."""

    name: str
    key: str = ""

    @property
    def described(self) -> str:
        return f"{self.name}.{self.key}" if self.key else self.name


class NotFinite(InputError):
    """A weight or a moment is not finite: the run must not be saved."""


@torch.no_grad()
def not_finite(tensors: Mapping[Any, Tensor]) -> list[Any]:
    """The keys of the tensors that hold a NaN or an infinity: each is read once, a device waited for once.

    A sum over a NaN or an infinity is never finite. One that is not may have overflowed, so only then is
    each entry looked at.
    """
    sums: dict[torch.device, tuple[list[Any], list[Tensor]]] = {}
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            keys, held = sums.setdefault(tensor.device, ([], []))
            keys.append(key)
            held.append(tensor.sum().double() if tensor.device.type != "mps" else tensor.sum())
    suspects = [
        key
        for keys, held in sums.values()
        for key, finite in zip(keys, torch.stack(held).isfinite().tolist(), strict=True)
        if not finite
    ]
    return [key for key in suspects if not bool(torch.isfinite(tensors[key]).all())]


def first_spoilt(
    named: Iterable[tuple[str, Tensor]], optimizers: Iterable[torch.optim.Optimizer], world: World
) -> Spoilt | None:
    """The first tensor of the model or its optimizers that is not finite on any rank, the same on each.

    Of several ranks a collective: every one calls. A moment is reported before its weight.
    """
    parameters = dict(named)
    states = {id(p): state for optimizer in optimizers for p, state in optimizer.state.items()}
    held: dict[Spoilt, Tensor] = {}
    places: list[Spoilt] = []
    for key in (*STATE_KEYS, ""):
        for name, parameter in parameters.items():
            places.append(Spoilt(name, key))
            value = states.get(id(parameter), {}).get(key) if key else parameter.detach()
            if isinstance(value, Tensor):
                held[places[-1]] = local(value)
    bad = set(not_finite(held))
    if world.alone:
        return next((place for place in places if place in bad), None)
    counts = world.sum([float(place in bad) for place in places])
    return next((place for place, count in zip(places, counts, strict=True) if count), None)
