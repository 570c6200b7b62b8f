"""What a wrong backward was measured to be: nothing, a factor, the wrong matrix, or a sum that is not 0.

forward   backward(u) = J u, where Jᵀ u belongs: a missing transpose, a rotation that turns on
shift     f(x + c·1) = f(x), so 1ᵀ ∂/∂x = 0; a softmax's or cross-entropy's backward that breaks it
          has lost one of its two terms
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from clinometer.gradients.check.localise import pattern
from clinometer.gradients.check.numerics.perturbation import Probe

_ALIKE = 1e-6
"""Relative difference up to which a gradient is called the one it was compared with."""
_UNMOVED = 1e-9
"""Relative change of the value that a shift of size 1 may leave behind, by rounding."""


@dataclass(frozen=True)
class Hint:
    """What the gradient of one argument was measured to be."""

    kind: Literal["missing", "factor", "forward", "shift"]
    argument: str
    """Name of the argument in the forward's signature."""
    factor: float = 1.0
    dim: int = 0
    size: int = 0
    total: float = 0.0
    """What the gradient adds up to along `dim`, where it is farthest from 0."""


def hint_of(
    probe: Probe,
    wrong: Iterable[str],
    arguments: Sequence[str],
    outputs: Callable[[], list[Tensor]],
    weights: Sequence[Tensor],
    step: float,
    generator: torch.Generator,
) -> Hint | None:
    """Returns the first mistake that is certain; `wrong` are the probe's tensors, "input 0" and so on."""
    for name in wrong:
        argument = arguments[int(name.removeprefix("input "))]
        grad = probe.gradients[name]
        if grad is None:
            return Hint("missing", argument)
        if grad.is_complex():
            continue
        factor, _ = pattern(probe, name, step, generator)
        if factor is not None:
            return Hint("factor", argument, factor)
        if (
            len(weights) == 1
            and weights[0].shape == grad.shape
            and _is_forward(probe, name, outputs, weights[0])
        ):
            return Hint("forward", argument)
        for dim in range(grad.ndim):
            total = _sum_that_should_be_zero(probe, name, dim, generator)
            if total:
                return Hint("shift", argument, dim=dim, size=grad.shape[dim], total=total)
    return None


def names_of_inputs(named: Sequence[str], given: Sequence[Any], inputs: Sequence[Tensor]) -> list[str]:
    """The forward's name for each of the inputs; its place where the signature has none."""
    places = {id(value): place for place, value in enumerate(given)}
    found = []
    for position, tensor in enumerate(inputs):
        place = places.get(id(tensor))
        found.append(named[place] if place is not None and place < len(named) else f"input {position}")
    return found


def _is_forward(probe: Probe, name: str, outputs: Callable[[], list[Tensor]], u: Tensor) -> bool:
    grad, h = probe.gradients[name], 1e-5
    assert grad is not None
    there, back = (probe.moved({name: u}, t, outputs)[0].detach() for t in (h, -h))
    turned = (there - back) / (2 * h)
    size = float(torch.linalg.vector_norm(grad))
    return size > 0 and float(torch.linalg.vector_norm(grad - turned)) <= _ALIKE * size


def _sum_that_should_be_zero(probe: Probe, name: str, dim: int, generator: torch.Generator) -> float:
    """0 unless the value keeps still when lines along `dim` are shifted, and the gradient denies it."""
    grad = probe.gradients[name]
    assert grad is not None
    if grad.shape[dim] < 2:
        return 0.0
    lines = [1 if d == dim else size for d, size in enumerate(grad.shape)]
    shift = (
        torch.empty(lines, dtype=torch.float64)
        .normal_(generator=generator)
        .to(grad.device)
        .expand(grad.shape)
    )
    change = abs(probe.along({name: shift})(1.0) - probe.here)
    if change > _UNMOVED * probe.magnitude:
        return 0.0
    sums = grad.sum(dim).flatten()
    total = float(sums[sums.abs().argmax()])
    return total if abs(total) > _ALIKE * float(grad.abs().max()) else 0.0
