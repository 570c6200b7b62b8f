"""Places where a path out of parameters ends, and the tensors that hold values from behind them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from clinometer.gradients.where import Where


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
