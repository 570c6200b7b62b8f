"""One use of a weight in the forward, and what each position of it adds to the weight's gradient.

    y[…] = Σ x[…] · w[…]         ∂L/∂w[c] = Σ over positions of δ[…] · x[…] at c,    δ = ∂L/∂y

Every axis has a letter, as in einsum: a linear layer is x "bsi", w "oi", y "bso", and its positions are "bs".
A bias has no x, a norm's weight has the normalised input as x and shares the last letter with y.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from clinometer.gradients.report.places import Where


@dataclass(eq=False)
class Placement:
    """Where the entries of a tensor made from a parameter (a transpose, a chunk, a cast) lie in it."""

    name: str
    positions: Tensor | None = None
    """The flat index in the parameter of each entry, −1 for entries from elsewhere; None: the parameter."""
    scale: float = 1.0

    @property
    def plain(self) -> bool:
        """Whether its entries are the parameter's, moved and scaled; otherwise `spread` is all there is."""
        return True

    def coordinates(self, index: tuple[int, ...], shape: torch.Size) -> list[tuple[int, ...]]:
        """Where the parameter's entry `index` stands in this tensor: nowhere, once, or several times."""
        if self.positions is None:
            return [index]
        flat = 0
        for i, size in zip(index, shape, strict=True):
            flat = flat * size + i
        return [tuple(where) for where in (self.positions == flat).nonzero().tolist()]

    def spread(self, values: Tensor) -> Tensor:
        """Values of the parameter's shape, as they lie in this tensor."""
        if self.positions is None:
            return values
        positions = self.positions.long()
        return torch.where(positions >= 0, values.reshape(-1)[positions.clamp(min=0)], 0.0)


@dataclass(eq=False)
class Use(ABC):
    """One use; `delta` comes in the backward, several times if the graph is run several times."""

    placement: Placement
    op: str
    where: Where | None
    delta: Tensor | None = field(default=None, init=False)
    reduce: Callable[[Use], Tensor] | None = field(default=None, init=False)
    """What to make of δ at once, so that it need not be kept."""
    reduced: Tensor | None = field(default=None, init=False)
    precision: torch.dtype = field(default=torch.float64, init=False)
    """The coarser of δ's and x's dtypes: what autograd's own sum was rounded to."""

    def receive(self, delta: Tensor) -> None:
        """The hook on y."""
        with torch.no_grad():
            self.precision = delta.dtype
            if self.reduce is not None:
                self.delta = delta
                reduced, self.delta = self.reduce(self), None
                self.reduced = reduced if self.reduced is None else self.reduced + reduced
            else:
                self.delta = delta.detach().clone() if self.delta is None else self.delta + delta

    @property
    @abstractmethod
    def lead(self) -> tuple[int, ...]:
        """The shape of the positions."""

    @abstractmethod
    def at(self, coordinate: tuple[int, ...]) -> Tensor:
        """What each position adds at one entry of w, in float64, of shape `lead`."""

    @abstractmethod
    def along(self, direction: Tensor) -> Tensor:
        """⟨direction, what each position adds⟩, `direction` of w's shape."""

    @abstractmethod
    def squared(self, mask: Tensor | None) -> Tensor:
        """‖what each position adds‖², over the entries where `mask` is 1; no outer product is made."""

    def at_parameter(self, index: tuple[int, ...], shape: torch.Size) -> Tensor:
        """What each position adds at the parameter's entry `index`."""
        if not self.placement.plain:
            chosen = torch.zeros(shape, dtype=torch.float64)
            chosen[index] = 1.0
            return self.along(self.placement.spread(chosen))
        total = torch.zeros(self.lead, dtype=torch.float64)
        for coordinate in self.placement.coordinates(index, shape):
            total = total.to(self.delta.device if self.delta is not None else "cpu") + self.at(coordinate)
        return total * self.placement.scale


@dataclass(eq=False)
class ProductUse(Use):
    """y is bilinear in x and w, axis by axis as the letters say."""

    x: Callable[[], Tensor] | None
    x_axes: str
    w_axes: str
    y_axes: str
    lead_axes: str
    sizes: dict[str, int]

    @property
    def lead(self) -> tuple[int, ...]:
        return tuple(self.sizes[a] for a in self.lead_axes)

    def _factors(self) -> tuple[Tensor, str, Tensor, str]:
        assert self.delta is not None
        delta = self.delta.double()
        if self.x is None:
            return delta, self.y_axes, torch.ones((), dtype=torch.float64, device=delta.device), ""
        return delta, self.y_axes, self.x().detach().double(), self.x_axes

    def at(self, coordinate: tuple[int, ...]) -> Tensor:
        fixed = dict(zip(self.w_axes, coordinate, strict=True))
        delta, y_axes, x, x_axes = self._factors()
        delta, y_axes = _select(delta, y_axes, fixed)
        x, x_axes = _select(x, x_axes, fixed)
        free = "".join(a for a in self.lead_axes if a not in fixed)
        value = _einsum([(delta, y_axes), (x, x_axes)], free, self.sizes)
        if free == self.lead_axes:
            return value
        placed = torch.zeros(self.lead, dtype=torch.float64, device=value.device)
        placed[tuple(fixed.get(a, slice(None)) for a in self.lead_axes)] = value
        return placed

    def along(self, direction: Tensor) -> Tensor:
        delta, y_axes, x, x_axes = self._factors()
        kept = "".join(a for a in dict.fromkeys(x_axes + self.w_axes) if a in y_axes or a in self.lead_axes)
        forward = _einsum([(x, x_axes), (direction, self.w_axes)], kept, self.sizes)
        return self.placement.scale * _einsum([(delta, y_axes), (forward, kept)], self.lead_axes, self.sizes)

    def squared(self, mask: Tensor | None) -> Tensor:
        delta, y_axes, x, x_axes = self._factors()
        outside = set(y_axes + x_axes) - set(self.lead_axes + self.w_axes)
        if outside:  # what one entry gets from one position is itself a sum
            axes = "".join(dict.fromkeys(self.lead_axes + self.w_axes))
            each = _einsum([(delta, y_axes), (x, x_axes)], axes, self.sizes)
            pairs = [(each.square(), axes), *([] if mask is None else [(mask, self.w_axes)])]
            return self.placement.scale**2 * _einsum(pairs, self.lead_axes, self.sizes)
        if mask is None:
            pairs = [(delta.square(), y_axes), (x.square(), x_axes)]
            return self.placement.scale**2 * _einsum(pairs, self.lead_axes, self.sizes)
        kept = "".join(a for a in dict.fromkeys(x_axes + self.w_axes) if a in y_axes or a in self.lead_axes)
        forward = _einsum([(x.square(), x_axes), (mask, self.w_axes)], kept, self.sizes)
        pairs = [(delta.square(), y_axes), (forward, kept)]
        return self.placement.scale**2 * _einsum(pairs, self.lead_axes, self.sizes)


@dataclass(eq=False)
class LookupUse(Use):
    """y = w[ids]: an embedding."""

    ids: Tensor
    ignored: int | None = None
    """The padding row, which takes no gradient."""
    shares: Tensor | None = None
    """Of each position, where rows are divided by how often they were looked up."""

    @property
    def lead(self) -> tuple[int, ...]:
        return tuple(self.ids.shape)

    def _delta(self) -> Tensor:
        assert self.delta is not None
        delta = self.delta.double()
        delta = delta if self.shares is None else delta * self.shares[..., None]
        return delta if self.ignored is None else delta * (self.ids != self.ignored)[..., None]

    def at(self, coordinate: tuple[int, ...]) -> Tensor:
        row, column = coordinate
        return torch.where(self.ids == row, self._delta()[..., column], 0.0)

    def along(self, direction: Tensor) -> Tensor:
        return self.placement.scale * (self._delta() * direction[self.ids]).sum(-1)

    def squared(self, mask: Tensor | None) -> Tensor:
        squares = self._delta().square()
        return self.placement.scale**2 * (squares if mask is None else squares * mask[self.ids]).sum(-1)


def look_up_rows(
    ids: Tensor, count: int, ignored: int | None, by_count: Any
) -> tuple[Tensor, int | None, Tensor | None]:
    """Which of `count` rows each position looks up, the padding row, and the shares (see `LookupUse`).

    Both count from the end where they are negative.
    """
    rows = ids.detach().long()
    rows = torch.where(rows < 0, rows + count, rows)
    if ignored is not None and ignored < 0:
        ignored += count
    if not by_count:
        return rows, ignored, None
    _, inverse, counts = rows.unique(return_inverse=True, return_counts=True)
    return rows, ignored, 1.0 / counts[inverse].double()


def overlap(first: Use, second: Use, mask: Tensor | None) -> Tensor | None:
    """⟨what a position adds in one use, what it adds in the other⟩; None where that is not cheap to tell."""
    if isinstance(first, ProductUse) and isinstance(second, LookupUse):
        first, second = second, first
    if first.lead == second.lead and _apart(first.placement, second.placement):
        return torch.zeros(first.lead, dtype=torch.float64)
    uses = (first, second)
    plain = mask is None and all(u.placement.plain and u.placement.positions is None for u in uses)
    if not plain or first.lead != second.lead:
        return None
    scale = first.placement.scale * second.placement.scale
    if isinstance(first, LookupUse) and isinstance(second, LookupUse):
        return scale * torch.where(first.ids == second.ids, (first._delta() * second._delta()).sum(-1), 0.0)
    if (
        not isinstance(second, ProductUse)
        or len(second.w_axes) != 2
        or second.lead_axes != second.y_axes[:-1]
    ):
        return None
    delta, y_axes, x, x_axes = second._factors()
    if y_axes != second.lead_axes + second.w_axes[0] or x_axes != second.lead_axes + second.w_axes[1]:
        return None
    if isinstance(first, LookupUse):
        picked = delta.gather(-1, first.ids[..., None]).squeeze(-1)
        return scale * picked * (first._delta() * x).sum(-1)
    if (
        isinstance(first, ProductUse)
        and len(first.w_axes) == 2
        and first.x_axes == first.lead_axes + first.w_axes[1]
    ):
        delta2, y2, x2, _ = first._factors()
        if y2 == first.lead_axes + first.w_axes[0]:
            return scale * (delta * delta2).sum(-1) * (x * x2).sum(-1)
    return None


def _apart(first: Placement, second: Placement) -> bool:
    """Whether two chunks have no entry of the parameter in common."""
    if first.positions is None or second.positions is None:
        return False
    a, b = (torch.aminmax(p.positions) for p in (first, second) if p.positions is not None)
    return bool(a.max < b.min or b.max < a.min)


def _select(tensor: Tensor, axes: str, fixed: dict[str, int]) -> tuple[Tensor, str]:
    index: Any = tuple(
        fixed[a] if a in fixed and tensor.shape[i] > 1 else slice(None) for i, a in enumerate(axes)
    )
    left = "".join(a for i, a in enumerate(axes) if not (a in fixed and tensor.shape[i] > 1))
    return tensor[index], left


def _einsum(factors: list[tuple[Tensor, str]], out: str, sizes: dict[str, int]) -> Tensor:
    """torch.einsum; an axis of `out` that no factor has (it was of size 1 or broadcast) is widened."""
    present = set("".join(axes for _, axes in factors))
    there = "".join(a for a in out if a in present)
    result = torch.einsum(",".join(axes for _, axes in factors) + "->" + there, *(t for t, _ in factors))
    shape = iter(result.shape)
    return result.reshape([next(shape) if a in present else 1 for a in out]).expand([sizes[a] for a in out])
