"""Pinned weights: one entry of one tensor, every step of it written down in full."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from clinometer.gradients.subject import UnknownName
from clinometer.messages import InputError
from clinometer.monitoring.roster import Roster, Watched

_STATE = ("exp_avg", "exp_avg_sq", "momentum_buffer")


class Pins:
    """The pinned entries and what this step said of them; numbers are exact float32, kept as float64."""

    def __init__(self) -> None:
        self._pins: dict[tuple[int, tuple[int, ...]], Watched] = {}
        self._rows: dict[tuple[int, tuple[int, ...]], dict[str, Any]] = {}
        self._raw: dict[tuple[int, tuple[int, ...]], Tensor] = {}

    def add(self, roster: Roster, name: str, index: tuple[int, ...]) -> None:
        watched = next((w for w in roster.watched if w.name == name), None)
        if watched is None:
            raise UnknownName(name, [w.name for w in roster.watched])
        shape = watched.shape
        if len(index) != len(shape) or any(not 0 <= i < n for i, n in zip(index, shape, strict=True)):
            raise InputError("watch.pin_index", name=name, index=list(index), shape=list(shape))
        self._pins[watched.index, index] = watched

    def before_clipping(self) -> None:
        """The gradients are about to be scaled: keep those that count."""
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
                row["grad"] = self._raw.pop(key, None)
                if row["grad"] is None:
                    row["grad"] = _entry(tensor.grad, key[1])
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
        for row in self._rows.values():
            plain = {k: float(v) if isinstance(v, Tensor) else v for k, v in row.items()}
            plain["lr"] = None if plain["lr"] is None else float(plain["lr"])
            plain["weight_decay"] = float(plain["weight_decay"])
            rows.append({**plain, "clip": clip})
        self._rows, self._raw = {}, {}
        return rows


def _entry(tensor: Tensor, index: tuple[int, ...]) -> Tensor:
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    return tensor.detach()[index].clone()
