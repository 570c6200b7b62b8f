"""Backwards whose gradients were cleared before any step used them, as by zero_grad() among micro-batches.

A backward is discarded if, when the next one begins, the gradients it left are gone and no watched optimizer
has stepped in between. Left out is what reads gradients for another end: weights that changed meanwhile (a
trial step, as in sharpness-aware minimisation), gradients that the step takes from elsewhere (one made of
several tasks'), and backwards that also reach tensors that are not watched (an adversarial input, another
model of a GAN).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clinometer.distributed.sharded_tensors import local, version
from clinometer.monitoring.measure.watched_tensors import Roster, reaches_others, state_of

_FOLLOWED = 3
_SMALL = 4096
"""Entries of a tensor whose values are compared."""


class DiscardedBackwards:
    """The backwards since the last step, and how many of them no step used."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._backwards = self._discarded = self._waiting = 0
        self._followed: list[weakref.ref[Tensor]] = []
        self._grads: list[Any] = []
        self._weights: list[tuple[Any, Tensor | None]] = []
        self._exempt = False
        self._rows = 0
        """Steps in a row before which backwards were discarded."""

    def backward_begins(self, losses: Sequence[Tensor]) -> None:
        if self._waiting and self._cleared():
            if self._weights_unchanged():
                self._discarded += self._waiting
            self._waiting = 0
        if (
            self._rows and not self._exempt
        ):  # suspected: is it the gradient of something else that is asked for?
            self._exempt = reaches_others(losses, self._roster)

    def backward_ended(self) -> None:
        """A backward reached watched tensors."""
        self._backwards += 1
        if not self._waiting:
            self._follow()
        self._waiting += 1
        self._grads = [_grad_of(reference()) for reference in self._followed]
        self._weights = [self._weight_of(reference()) for reference in self._followed]

    def stepped(self) -> tuple[int, int]:
        """A step begins: how many backwards were discarded since the last, of how many."""
        if not self._backwards:
            return 0, 0
        found = self._discarded, self._backwards
        now = [_grad_of(reference()) for reference in self._followed]
        same = [
            a is not None and b is not None and a[0] == b[0] for a, b in zip(now, self._grads, strict=False)
        ]
        if self._exempt or not self._waiting or not all(same):
            found = 0, self._backwards
        self._rows = self._rows + 1 if found[0] else 0
        self._backwards = self._discarded = self._waiting = 0
        return found

    def _follow(self) -> None:
        having = [
            w for w in self._roster.watched if (t := w.ref()) is not None and t.is_leaf and t.grad is not None
        ]
        having.sort(key=lambda w: w.numel)
        self._followed = [w.ref for w in having[:_FOLLOWED]]

    def _cleared(self) -> bool:
        for reference, before in zip(self._followed, self._grads, strict=True):
            tensor = reference()
            if tensor is None:
                return False
            grad = tensor.grad
            if grad is not None and (
                before is None or grad.layout is not torch.strided or bool(local(grad).any())
            ):
                return False
        return bool(self._followed)

    def _weight_of(self, tensor: Tensor | None) -> tuple[Any, Tensor | None]:
        if tensor is None:
            return None, None
        values = tensor.detach().clone() if self._rows and tensor.numel() <= _SMALL else None
        return state_of(tensor), values

    def _weights_unchanged(self) -> bool:
        for reference, (state, values) in zip(self._followed, self._weights, strict=True):
            tensor = reference()
            if tensor is None or state_of(tensor) != state:
                return False
            if values is not None and not torch.equal(tensor, values):
                return False
        return True


def _grad_of(tensor: Tensor | None) -> tuple[int, int] | None:
    grad = None if tensor is None or not tensor.is_leaf else tensor.grad
    return None if grad is None else (id(grad), version(grad))
