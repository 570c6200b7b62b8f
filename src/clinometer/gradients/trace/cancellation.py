"""Terms of order one whose sum is zero or of rounding size: a gradient that cancels, exactly or not.

In a node's own backward, such as a softmax's y ∘ (g − ⟨y, g⟩), the terms are not seen. They are measured.
Each entry of the arriving gradient g is scaled by a number of its own, u and 2 − u. A backward J is linear:
J(u ∘ g) + J((2 − u) ∘ g) = 2 J(g), however small J(g) is; where it is the rounding left of larger terms, this
does not hold. Nor is it true where J(u ∘ g) is larger by more than the precision of the numbers. Where J(g)
is exactly zero, J(u ∘ g) is zero too if the function is flat, but not if terms cancel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clinometer.gradients.sandbox.tensors import largest
from clinometer.gradients.trace.graph import Node, is_custom, operation
from clinometer.torch_internals.nodes import run_node

ROUNDINGS = 8
"""A remainder of more roundings of its terms than this may be a true gradient."""
_SUSPECTS = 512
_COARSE = 1e-4
"""In types whose rounding is larger, a true gradient cannot be told from a remainder."""
_NOISE = 0.25
"""A gradient whose rounding is this part of it is called a remainder."""
_LINEAR = 1e-2
_EXACT = 1e-3
"""A gradient that is so linear is true; no second look is needed."""
_SEEDS = (1, 2, 3)
_NEVER_RUN = ("CopySlices", "CheckpointFunction")


@dataclass(frozen=True)
class Remainder:
    """What is left of terms that cancel."""

    size: float
    """The largest absolute value of the sum; 0 if they cancel exactly."""
    term: float
    """The largest absolute value of a term."""


def rounding_of(gradient: Tensor | None) -> float:
    """The relative rounding of a gradient's type; 0 for types in which a remainder cannot be told."""
    if gradient is None or not gradient.is_floating_point():
        return 0.0
    eps = torch.finfo(gradient.dtype).eps
    return eps if eps < _COARSE else 0.0


def is_suspect(size: float | None, arrived: float, eps: float, roundings: float = ROUNDINGS) -> bool:
    """Whether what a node handed on is so small beside what arrived that it is worth a closer look."""
    return size is not None and 0 < size <= _SUSPECTS * roundings * eps * arrived


def is_remainder(size: float, term: float, eps: float, roundings: float = ROUNDINGS) -> bool:
    """Whether a sum is zero or of rounding size beside its terms."""
    return size <= roundings * eps * term and term > 0


def remainder(
    node: Node,
    position: int,
    handed_on: Tensor,
    out: Sequence[Tensor | None],
    roundings: float = ROUNDINGS,
) -> Remainder | None:
    """Returns what is left where the terms of a node's backward cancel; None where they do not."""
    if is_custom(node) or operation(node) in _NEVER_RUN or not handed_on.numel():
        return None
    arrived = next((g for g in out if g is not None), None)
    gradients = [handed_on, *(g for g in out if g is not None)]
    if not all(g.is_floating_point() and g.layout is torch.strided for g in gradients):
        return None
    size, term, most = largest(handed_on) or 0.0, 0.0, 0.0
    linear = max(_LINEAR, 16 * torch.finfo(handed_on.dtype).eps)
    for seed in _SEEDS:
        first = _handed_on(node, position, out, seed, opposite=False)
        second = _handed_on(node, position, out, seed, opposite=True)
        if first is None or second is None:
            return None
        term = max(term, largest(first) or 0.0)
        noise = largest(first + second - 2 * handed_on) or 0.0
        most = max(most, noise)
        small = is_remainder(size, term, rounding_of(handed_on), roundings)
        if (size == 0 and not noise < linear * term) or (0 < noise < _EXACT * size and not small):
            return None
    small = is_remainder(size, term, rounding_of(handed_on), roundings)
    cancels = size == 0 or small or _NOISE * size < most
    return Remainder(size, max(term, largest(arrived) or 0.0)) if cancels and most < math.inf else None


def _handed_on(
    node: Node, position: int, out: Sequence[Tensor | None], seed: int, *, opposite: bool
) -> Tensor | None:
    handed = run_node(node, [None if g is None else g * _scale(g, seed, opposite) for g in out])
    return handed[position] if handed is not None and position < len(handed) else None


def _scale(gradient: Tensor, seed: int, opposite: bool) -> Tensor:
    scale = 0.5 + torch.rand(gradient.shape, generator=torch.Generator().manual_seed(seed))
    return (2 - scale if opposite else scale).to(gradient.device, gradient.dtype)
