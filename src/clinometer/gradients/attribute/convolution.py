"""A convolution's weight, and what each position of its output adds to the weight's gradient.

    y[n, o, p] = Σ_{c, k} x[n, c, p·s + k·d − pad] · w[o, c, k]
    ∂L/∂w[o, c, k] = Σ over n and output positions p of δ[n, o, p] · x[n, c, p·s + k·d − pad]

A transposed convolution is the same with x and δ exchanged: its positions are those of its input.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from clinometer.gradients.attribute.axes import Axes
from clinometer.gradients.attribute.call_kinds import Arguments
from clinometer.gradients.attribute.contraction import Use

CONVOLUTIONS = {f"conv{n}d": n for n in (1, 2, 3)}
TRANSPOSED = {f"conv_transpose{n}d": n for n in (1, 2, 3)}
_FUNCTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(eq=False)
class Convolution(Use):
    """y = x ⋆ w, in one to three dimensions, with stride, padding, dilation and groups."""

    x: Tensor
    shape: tuple[int, ...]
    """(outer channels, inner channels a group, *kernel)."""
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool
    positions: tuple[int, ...]
    """(batch, *output positions); of a transposed one, its input's."""

    @property
    def lead(self) -> tuple[int, ...]:
        return self.positions

    def _outer_inner(self) -> tuple[Tensor, Tensor]:
        """The side with one number a position, and the side that the kernel slides over, padded."""
        assert self.delta is not None
        delta, x = self.delta.double(), self.x.double()
        outer, inner = (x, delta) if self.transposed else (delta, x)
        dims = len(self.stride)
        outer, inner = (t if t.dim() == dims + 2 else t.unsqueeze(0) for t in (outer, inner))
        if any(side for pair in self.padding for side in pair):
            inner = F.pad(inner, [side for pair in reversed(self.padding) for side in pair])
        return outer, inner

    def at(self, coordinate: tuple[int, ...]) -> Tensor:
        o, c, *kernel = coordinate
        outer, inner = self._outer_inner()
        group = o // (self.shape[0] // self.groups)
        where: list[Any] = [slice(None)]
        for k, stride, dilation, size in zip(
            kernel, self.stride, self.dilation, self.positions[1:], strict=True
        ):
            start = k * dilation
            where.append(slice(start, start + (size - 1) * stride + 1, stride))
        seen = inner[:, group * self.shape[1] + c]
        return outer[:, o] * seen[tuple(where)]

    def along(self, direction: Tensor) -> Tensor:
        outer, inner = self._outer_inner()
        return self.placement.scale * (outer * self._slide(inner, direction.double())).sum(1)

    def squared(self, mask: Tensor | None) -> Tensor:
        outer, inner = self._outer_inner()
        mask = inner.new_ones(self.shape) if mask is None else mask.double()
        return self.placement.scale**2 * (outer.square() * self._slide(inner.square(), mask)).sum(1)

    def _slide(self, inner: Tensor, kernel: Tensor) -> Tensor:
        function = _FUNCTIONS[len(self.stride)]
        out = function(inner, kernel, None, self.stride, 0, self.dilation, self.groups)
        return out[(slice(None), slice(None), *(slice(size) for size in self.positions[1:]))]


def convolution_of(name: str, get: Arguments, out: Tensor) -> dict[str, Any] | None:
    """What a Convolution is made of, from a call's arguments; None for a form that is not known here."""
    transposed = name in TRANSPOSED
    dims = TRANSPOSED[name] if transposed else CONVOLUTIONS[name]
    x, weight = get(0, "input"), get(1, "weight")
    if out.is_complex() or x.dim() not in (dims + 1, dims + 2):
        return None
    stride = _each(get(3, "stride"), dims, 1)
    dilation = _each(get(7 if transposed else 5, "dilation"), dims, 1)
    groups = get(6, "groups") or 1
    kernel = weight.shape[2:]
    padding = _padding(get(4, "padding"), kernel, dilation)
    outer = x if transposed else out
    batch = outer.shape[0] if outer.dim() == dims + 2 else 1
    return {
        "shape": tuple(weight.shape),
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "transposed": transposed,
        "positions": (batch, *outer.shape[-dims:]),
    }


def bias_axes(name: str, out: Tensor) -> Axes | None:
    """Of y = … + b over channels: its positions are the batch and the output positions."""
    dims = (CONVOLUTIONS | TRANSPOSED)[name]
    y = "abcde"[: out.dim()]
    channel = y[out.dim() - dims - 1]
    return Axes("", channel, y, y.replace(channel, ""))


def _each(value: Any, dims: int, default: int) -> tuple[int, ...]:
    value = default if value is None else value
    values = (value,) * dims if isinstance(value, int) else tuple(value)
    return values * dims if len(values) < dims else values


def _padding(value: Any, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[tuple[int, int], ...]:
    if value == "same":
        whole = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in whole)
    if value == "valid":
        value = 0
    return tuple(zip(*itertools.repeat(_each(value, len(kernel), 0), 2), strict=True))
