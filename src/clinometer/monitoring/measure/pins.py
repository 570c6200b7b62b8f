"""Pinned weights: single entries of tensors, of which every step is recorded in full."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from clinometer.distributed.sharded_tensors import is_sharded, local, place_here
from clinometer.gradients.sandbox.subject import UnknownName
from clinometer.messages import InputError, say
from clinometer.monitoring.measure.watched_tensors import Roster, WatchedTensors

_STATE = ("exp_avg", "exp_avg_sq", "momentum_buffer")
_NUMBERS = ("before", "grad", "after", *(f"{name}_{when}" for name in _STATE for when in ("before", "after")))
MOST = 16
"""Pins of a sharded run: the vector of every step has room for so many."""


class Pins:
    """The pinned entries and their numbers in this step: exact float32 values, recorded as float64."""

    def __init__(self) -> None:
        self._pins: dict[tuple[int, tuple[int, ...]], WatchedTensors] = {}
        self._rows: dict[tuple[int, tuple[int, ...]], dict[str, Any]] = {}
        self._raw: dict[tuple[int, tuple[int, ...]], Tensor | None] = {}
        self._agreed: np.ndarray | None = None
        self._warned = False

    def add(self, roster: Roster, name: str, index: tuple[int, ...]) -> None:
        watched = next((w for w in roster.watched if w.name == name), None)
        if watched is None:
            raise UnknownName(name, [w.name for w in roster.watched])
        shape = watched.shape
        if len(index) != len(shape) or any(not 0 <= i < n for i, n in zip(index, shape, strict=True)):
            raise InputError("watch.pin_index", name=name, index=list(index), shape=list(shape))
        if is_sharded(watched.ref()) and len(self._pins) == MOST:
            raise InputError("watch.ranks.pins", most=MOST)
        self._pins[watched.index, index] = watched

    def forget(self) -> None:
        """A step begins: gradients copied in a step that was not measured are dropped."""
        self._raw = {}

    def before_clipping(self) -> None:
        """Copy the pinned entries of the gradients before clipping changes them."""
        for key, watched in self._pins.items():
            tensor = watched.ref()
            if tensor is not None and tensor.grad is not None and key not in self._raw:
                self._raw[key] = _entry(tensor.grad, key[1])

    def before(self, optimizer: Optimizer) -> None:
        if not self._pins:
            return
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for key, watched in self._pins.items():
            tensor = watched.ref()
            if tensor is None or id(tensor) not in groups:
                continue
            group, state = groups[id(tensor)], optimizer.state.get(tensor, {})
            row: dict[str, Any] = {"tensor": key[0], "index": list(key[1]), "before": _entry(tensor, key[1])}
            if tensor.grad is not None:
                row["grad"] = self._raw.pop(key) if key in self._raw else _entry(tensor.grad, key[1])
            for name in _STATE:
                if isinstance(state.get(name), Tensor) and state[name].shape == tensor.shape:
                    row[f"{name}_before"] = _entry(state[name], key[1])
            row["lr"], row["weight_decay"] = group.get("lr"), group.get("weight_decay", 0.0)
            self._rows[key] = row

    def after(self, optimizer: Optimizer) -> None:
        for key, row in self._rows.items():
            tensor = self._pins[key].ref()
            if tensor is None or not any(
                tensor is p for group in optimizer.param_groups for p in group["params"]
            ):
                continue
            row["after"] = _entry(tensor, key[1])
            state = optimizer.state.get(tensor, {})
            for name in _STATE:
                if isinstance(state.get(name), Tensor) and state[name].shape == tensor.shape:
                    row[f"{name}_after"] = _entry(state[name], key[1])

    def take(self, clip: float) -> list[dict[str, Any]]:
        """This step's rows as plain numbers; from a device they are read here, a step late."""
        rows = []
        for key, row in self._rows.items():
            plain = {k: float(v) if isinstance(v, Tensor) else v for k, v in row.items()}
            if self._agreed is not None:
                place = list(self._pins).index(key)
                numbers = zip(_NUMBERS, *self._agreed[place], strict=True)
                plain |= {name: value for name, value, known in numbers if known}
            plain["lr"] = None if plain["lr"] is None else float(plain["lr"])
            plain["weight_decay"] = float(plain["weight_decay"])
            rows.append({**plain, "clip": clip})
        self._rows, self._raw, self._agreed = {}, {}, None
        return rows

    # Of a sharded tensor one rank has the entry, and sends it to the others.

    def mark(self) -> float:
        """A number that differs if another rank has other pins."""
        return float(zlib.crc32(repr(list(self._pins)).encode()))

    def numbers(self, counts: Sequence[bool]) -> np.ndarray:
        """[MOST, 2, kinds of numbers]: the numbers of entries on this rank, and 1 for each that exists."""
        found = np.zeros((MOST, 2, len(_NUMBERS)))
        for place, key in enumerate(list(self._pins)[:MOST]):
            if not counts[key[0]]:
                continue
            row = self._rows.get(key, {})
            for number, name in enumerate(_NUMBERS):
                value = row.get(name)
                if value is not None:
                    found[place, :, number] = float(value), 1.0
        return found

    def agree(self, numbers: np.ndarray, same: bool) -> None:
        """Take the numbers of all ranks; if the ranks have different pins, the step has no rows."""
        self._agreed = numbers
        if not same:
            self._rows = {}
            if not self._warned:
                self._warned = True
                warnings.warn(say("watch.ranks.pins_differ"), RuntimeWarning, stacklevel=2)


def _entry(tensor: Tensor, index: tuple[int, ...]) -> Tensor | None:
    """One entry, or None of a sharded tensor if another rank has it."""
    if is_sharded(tensor):
        place = place_here(tensor, index)
        tensor = local(tensor)
        if place is None:
            return None
        index = place
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    return tensor.detach()[index].clone()
