"""Tensors that are a parameter still: moved about, scaled, joined, or made of parameters alone."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from clinometer.gradients.attribute.call_kinds import name_of
from clinometer.gradients.attribute.contraction import Placement
from clinometer.gradients.attribute.parameter_functions import ELEMENTWISE, ParameterFunction, function_of
from clinometer.gradients.sandbox.code_origin import is_instrument
from clinometer.gradients.sandbox.tensors import tensors_in
from clinometer.torch_internals.frames import is_parametrization


class ParameterViews:
    """Which tensors of a forward hold entries of which parameters, and where."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._known: dict[int, tuple[Tensor, Placement]] = {
            id(tensor): (tensor, Placement(name)) for name, tensor in tensors.items()
        }
        self._also: dict[int, list[Placement]] = {}
        self._whole: dict[str, Tensor] = {}

    def __contains__(self, tensor: Tensor) -> bool:
        return id(tensor) in self._known

    def placement(self, tensor: Tensor) -> Placement:
        return self._known[id(tensor)][1]

    def others(self, tensor: Tensor) -> list[Placement]:
        """Of a tensor made of several parameters, those after the first."""
        return self._also.get(id(tensor), [])

    def placements(self, tensor: Tensor) -> list[Placement]:
        return [self.placement(tensor), *self._also.get(id(tensor), ())]

    def know(self, tensor: Tensor, *placements: Placement) -> None:
        if tensor.requires_grad and id(tensor) not in self._known:  # else no gradient comes back
            self._known[id(tensor)] = (tensor, placements[0])
            if len(placements) > 1:
                self._also[id(tensor)] = list(placements[1:])

    def scaled(self, w: Tensor, out: Tensor, factor: float) -> bool:
        if out.shape != w.shape:
            return False
        self.know(out, *(replace(p, scale=p.scale * factor) for p in self.placements(w)))
        return True

    def view(self, func: Any, tensor: Tensor, args: Any, kwargs: Any, out: Any) -> bool:
        name = name_of(func)
        placement = self.placement(tensor)
        if isinstance(placement, ParameterFunction) or self.others(tensor):
            outs = [(out, None)] if isinstance(out, Tensor) else [(o, i) for i, o in enumerate(out)]
            return all(self.derive(func, name, [tensor], args, kwargs, out=o, part=i) for o, i in outs)
        with torch.no_grad():
            moved = func(self._positions(tensor), *args[1:], **kwargs)
        pairs = [(out, moved)] if isinstance(out, Tensor) else list(zip(out, moved, strict=True))
        for made, positions in pairs:
            self.know(made, Placement(placement.name, positions, placement.scale))
        return True

    def join(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
        given = list(args[0] if args else kwargs.get("tensors", ()))
        ours = [t for t in given if t in self]
        names = {self.placement(t).name for t in ours}
        if any(isinstance(self.placement(t), ParameterFunction) or self.others(t) for t in ours):
            return self.derive(func, "cat", list({id(t): t for t in ours}.values()), args, kwargs, out=out)
        for name in names:
            parts, scales = [], set()
            for tensor in given:
                mine = tensor in self and self.placement(tensor).name == name
                if mine:
                    parts.append(self._positions(tensor).long())
                    scales.add(self.placement(tensor).scale)
                else:
                    parts.append(torch.full(tensor.shape, -1, dtype=torch.int64, device=tensor.device))
            if len(scales) != 1 or len(names) != 1:
                return False
            with torch.no_grad():
                joined = func(parts, *args[1:], **{k: v for k, v in kwargs.items() if k != "tensors"})
            self.know(out, Placement(name, joined, scales.pop()))
        return True

    def derive(
        self,
        func: Any,
        name: str,
        known: list[Tensor],
        args: Any,
        kwargs: Any,
        *,
        out: Tensor,
        part: Any = None,
    ) -> bool:
        """Whether `out` is made of parameters alone, not spread over positions: then it is a weight too."""
        ours = {id(t) for t in known}
        others = [t for t in tensors_in(args, kwargs) if id(t) not in ours]
        if any(t.requires_grad and not t.is_leaf for t in others) or out.is_complex():
            return False
        most = sum(t.numel() for t in [*known, *(t for t in others if t.requires_grad)])
        if (out.numel() > most and not is_parametrizing()) or any(t.is_complex() for t in known):
            return False
        derived = []
        for tensor in known:
            function = function_of(func, args, kwargs, tensor, part)
            alone = name in ELEMENTWISE and out.shape == tensor.shape
            for placement in self.placements(tensor):
                primal = tensor.detach().clone()
                derived.append(
                    ParameterFunction(placement.name, None, 1.0, placement, function, primal, alone)
                )
        self.know(out, *derived)
        return True

    def _positions(self, tensor: Tensor) -> Tensor:
        placement = self.placement(tensor)
        if placement.positions is not None:
            return placement.positions
        if placement.name not in self._whole:
            kind = torch.int32 if tensor.numel() < 2**31 else torch.int64
            positions = torch.arange(tensor.numel(), dtype=kind, device=tensor.device)
            self._whole[placement.name] = positions.view(tensor.shape)
        return self._whole[placement.name]


def is_parametrizing() -> bool:
    """Whether the call comes from torch's own parametrizations: all they make of weights is a weight."""
    frame: Any = sys._getframe(1)
    while frame is not None and is_instrument(frame.f_code.co_filename):
        frame = frame.f_back
    return is_parametrization(frame)
