"""The loss of a step, read from its backward calls: the sum of the scalars they differentiated.

`.grad` is the gradient of that sum: micro-batches that each count for a part add up to the batch. Whether a
backward reaches the watched tensors shows in their `.grad`, so that the losses of another model do not count.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from clinometer.distributed.sharded_tensors import local, version


class Losses:
    """The backward calls since the last step."""

    def __init__(self) -> None:
        self.parts = 0
        """Backward calls that reached the watched tensors."""
        self.clean = False
        """No tensor had a gradient when the first of them began."""
        self.reduced = False
        """The last backward reached a watched tensor itself, and not only what FSDP will reduce to it."""
        self._values: list[Any] = []
        self._whole = True
        self._depth = 0
        self._before: list[tuple[int, int] | None] = []
        self._held: list[Tensor | None] = []

    def begins(self, tensors: Iterable[Any]) -> None:
        self._depth += 1
        if self._depth > 1:  # a backward inside a backward: reentrant checkpointing
            return
        self._held = [
            t.grad if t.is_leaf else None for t in tensors
        ]  # referenced, so that no id is used twice
        self._before = [None if g is None else (id(g), version(g)) for g in self._held]
        if not self.parts:
            self.clean = all(state is None for state in self._before)

    def ended(
        self,
        tensors: Iterable[Any],
        losses: Sequence[Tensor],
        given: Any,
        scale: Any,
        *,
        own: float = math.inf,
    ) -> bool:
        """Whether this backward, the outermost one, reached a watched tensor; then its loss is added.
        The first `own` tensors are the watched ones; others are what FSDP gathers from them."""
        self._depth = max(0, self._depth - 1)
        if self._depth:
            return False
        reached = self.reduced = False
        for number, (tensor, before) in enumerate(zip(tensors, self._before, strict=False)):
            grad = tensor.grad if tensor.is_leaf else None
            if grad is not None and (id(grad), version(grad)) != before:
                reached, self.reduced = True, number < own
                break
        self._held, self._before = [], []
        if not reached:
            return False
        self.parts += 1
        if given is None and all(loss.numel() == 1 and not loss.is_complex() for loss in losses):
            for loss in losses:
                value = local(loss.detach()).reshape(())
                value = float(value) if value.device.type == "cpu" else value.clone()
                self._values.append(value if scale is None else value / scale)
        else:
            self._whole = False
        return True

    def failed(self) -> None:
        """A backward raised: its record is dropped."""
        self._depth = 0
        self._held, self._before = [], []

    def take(self) -> Any:
        """Return the loss (a number or a device tensor; None if a part was not a scalar) and start again."""
        values, whole = self._values, self._whole
        self._values, self._whole, self.parts, self.clean = [], True, 0, False
        return sum(values) if values and whole else None
