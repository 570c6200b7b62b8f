"""Places where a path out of parameters ends, and the tensors that hold values from behind them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from clinometer.gradients.report.places import Where


@dataclass(frozen=True)
class Cut:
    """A call that took values from parameters and gave back something that cannot lead to them."""

    kind: str
    """"detach", "no_grad", "integer", …: an entry of `diagnosis.none.cut` in the messages."""
    where: Where | None
    live: int
    """The parameters that were reached through what went in, and are not through what came out."""
    group: Any = None
    """Cuts of one group are one place: all that one `with torch.no_grad()` cut."""


@dataclass(frozen=True)
class Escape:
    """A call that turned a tensor into something that is not one: .item(), .numpy(), .tolist()."""

    kind: str
    where: Where | None
    live: int
    cuts: int
    """Cuts whose values it carried out."""

    def concerns(self, bits: int, cuts: list[Cut]) -> bool:
        """Whether it carried out values computed from any of these parameters, perhaps through a cut."""
        return bool(self.live & bits) or any(
            self.cuts >> i & 1 and cut.live & bits for i, cut in enumerate(cuts)
        )

    @property
    def place(self) -> Any:
        """What makes two escapes the same: the line."""
        return self.where and (self.where.file, self.where.line)


def nudge(value: Any) -> Any:
    """Another number close by, also within lists and arrays."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float | complex):
        return value * 1.01 + 0.01
    if isinstance(value, list):
        return [nudge(item) for item in value]
    dtype: Any = getattr(value, "dtype", None)
    if getattr(dtype, "kind", "") in ("i", "u", "f"):  # an array of numpy
        return value + dtype.type(1)
    raise TypeError(f"a {type(value).__name__} has no number close by")


class Cell:
    """The cuts whose values a tensor holds."""

    __slots__ = ("cuts", "ref", "shares")

    def __init__(self, ref: weakref.ref[Tensor]) -> None:
        self.ref = ref
        self.cuts = 0
        self.shares: list[weakref.ref[Tensor]] = []


def each_bit(mask: int) -> Iterator[int]:
    """The single bits of a set."""
    while mask:
        bit = mask & -mask
        yield bit
        mask ^= bit
