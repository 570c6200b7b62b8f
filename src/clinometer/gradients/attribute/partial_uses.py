"""Uses that only together make one: the steps of a recurrent layer, the groups of a grouped product.

And an embedding of positions, looked up once for the whole batch and added to every sequence: its share of
each sequence is read where it is added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clinometer.gradients.attribute.contraction import LookupUse, Use


class StepwiseUse(Use):
    """One use of a weight at each position of a sequence, as one use with an axis for the positions."""

    def __init__(self, steps: Sequence[Use], axis: int) -> None:
        self.placement, self.op, self.where = steps[0].placement, steps[0].op, steps[0].where
        self.steps = list(steps)
        self.axis = axis

    @property
    def lead(self) -> tuple[int, ...]:
        shape = list(self.steps[0].lead)
        shape.insert(self.axis, len(self.steps))
        return tuple(shape)

    @property
    def delta(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return next((step.delta for step in self.steps if step.delta is not None), None)

    @property
    def reduced(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        some = next((step.reduced for step in self.steps if step.reduced is not None), None)
        if some is None:
            return None
        return self._stack(lambda step: step.reduced if step.reduced is not None else torch.zeros_like(some))

    @property
    def precision(self) -> torch.dtype:  # pyright: ignore[reportIncompatibleVariableOverride]
        return max((step.precision for step in self.steps), key=lambda dtype: torch.finfo(dtype).eps)

    def at(self, coordinate: tuple[int, ...]) -> Tensor:
        return self._stack(lambda step: step.at(coordinate))

    def along(self, direction: Tensor) -> Tensor:
        return self._stack(lambda step: step.along(direction))

    def squared(self, mask: Tensor | None) -> Tensor:
        return self._stack(lambda step: step.squared(mask))

    def _stack(self, of: Callable[[Use], Tensor]) -> Tensor:
        """A step that no gradient came back to adds nothing."""
        found = [None if step.delta is None and step.reduced is None else of(step) for step in self.steps]
        some = next(value for value in found if value is not None)
        return torch.stack([torch.zeros_like(some) if v is None else v for v in found], self.axis)


@dataclass(eq=False)
class GroupedUse(Use):
    """y[t] = x[t] · w[g], rows t in groups g that end at `ends`: the experts of a mixture."""

    x: Tensor
    ends: list[int]

    @property
    def lead(self) -> tuple[int, ...]:
        return (self.x.shape[0],)

    def at(self, coordinate: tuple[int, ...]) -> Tensor:
        assert self.delta is not None
        group, row, column = coordinate
        terms = torch.zeros(self.lead, dtype=torch.float64, device=self.delta.device)
        for g, rows in self._groups():
            if g == group:
                terms[rows] = self.x[rows, row].double() * self.delta[rows, column].double()
        return terms

    def along(self, direction: Tensor) -> Tensor:
        return self.placement.scale * self._sum(self.x.double(), self._delta(), direction)

    def squared(self, mask: Tensor | None) -> Tensor:
        x, delta = self.x.double().square(), self._delta().square()
        if mask is None:
            return self.placement.scale**2 * self._sum(x, delta, None)
        return self.placement.scale**2 * self._sum(x, delta, mask)

    def _delta(self) -> Tensor:
        assert self.delta is not None
        return self.delta.double()

    def _sum(self, x: Tensor, delta: Tensor, weight: Tensor | None) -> Tensor:
        terms = torch.zeros(self.lead, dtype=torch.float64, device=delta.device)
        for g, rows in self._groups():
            if weight is None:
                terms[rows] = x[rows].sum(-1) * delta[rows].sum(-1)
            else:
                terms[rows] = ((x[rows] @ weight[g]) * delta[rows]).sum(-1)
        return terms

    def _groups(self) -> Iterator[tuple[int, slice]]:
        begun = 0
        for group, end in enumerate(self.ends):
            yield group, slice(begun, end)
            begun = end


def widen_lookup(tensor: Tensor, use: LookupUse, out: Any) -> LookupUse | None:
    """The lookup `tensor` as it stands in `out`, to which it was added, if it was repeated for that."""
    if not isinstance(out, Tensor) or not out.requires_grad or out.is_nested or out.dim() < tensor.dim():
        return None
    if out.shape == tensor.shape or out.shape[-1] != tensor.shape[-1]:
        return None
    return LookupUse(use.placement, use.op, use.where, use.ids.expand(out.shape[:-1]), use.ignored)


def split_shared_lookups(uses: Sequence[Use], wider: dict[Use, list[LookupUse]]) -> list[Use]:
    """The uses, and instead of a lookup shared by the sequences its uses in each, where they make it up."""
    found: list[Use] = []
    for use in uses:
        parts = wider.get(use, [])
        found += parts if parts and _make_up(use, parts) else [use]
    return found


def _make_up(use: Use, parts: Sequence[LookupUse]) -> bool:
    pairs: Any = [(p.delta, p.lead + p.delta.shape[-1:]) for p in parts if p.delta is not None]
    whole = use.delta
    if use.reduced is not None:
        pairs = [(p.reduced, p.lead) for p in parts if p.reduced is not None]
        whole = use.reduced
    if whole is None or not pairs:
        return False
    total = sum(value.double().sum_to_size(whole.shape) for value, _ in pairs)
    eps = torch.finfo(use.precision).eps
    apart = (total - whole.double()).abs().max() if whole.numel() else torch.zeros(())
    size = sum(value.double().abs().sum_to_size(whole.shape) for value, _ in pairs)
    return bool(apart <= 16 * eps * torch.as_tensor(size).max())
