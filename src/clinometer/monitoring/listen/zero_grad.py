"""Whether zero_grad() was called: a few gradients of an optimizer are compared from its step to its next.

If each is the same tensor in the same version when a backward begins as it was after the step (or the
backward) before, it was not cleared, and the backward adds to it. This must hold from one step to the next:
another model's backward may add to old gradients that are cleared later, as in a GAN.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from clinometer.distributed.sharded_tensors import local, version
from clinometer.monitoring.measure.watched_tensors import Roster

_FOLLOWED = 3


class _Chain:
    def __init__(self) -> None:
        self.unbroken = False
        self.backwards = 0
        self.tensors: list[weakref.ref[Tensor]] = []
        self.states: list[Any] = []

    def now(self) -> list[Any]:
        tensors = [reference() for reference in self.tensors]
        return [None if t is None or t.grad is None else (id(t.grad), version(t.grad)) for t in tensors]


class Chains:
    """The gradients of each optimizer since its last step, by the optimizer's id."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._chains: dict[int, _Chain] = {}

    def stepped(self, optimizer: Optimizer) -> None:
        chain = self._chains[id(optimizer)] = _Chain()
        having = [
            w for w in self._roster.owned_by(optimizer) if (t := w.ref()) is not None and t.grad is not None
        ]
        having.sort(key=lambda w: w.numel)  # small ones are cheap to read
        chain.tensors = [w.ref for w in having[:_FOLLOWED]]
        chain.states = chain.now()
        chain.unbroken = bool(having)

    def backward_begins(self) -> None:
        for chain in self._chains.values():
            if chain.unbroken and (chain.now() != chain.states or _is_zero(chain)):
                chain.unbroken = False

    def backward_ended(self) -> None:
        for chain in self._chains.values():
            if chain.unbroken:
                states = chain.now()
                chain.backwards += states != chain.states
                chain.states = states

    def unbroken(self, optimizer: Optimizer) -> bool:
        """Whether this optimizer's gradients were added to old ones all the way since its last step."""
        chain = self._chains.get(id(optimizer))
        return chain is not None and chain.unbroken and chain.backwards > 0


def _is_zero(chain: _Chain) -> bool:
    """Cleared by `.grad.data.zero_()`, which leaves the version: then all entries are zero."""
    for reference in chain.tensors:
        tensor = reference()
        if tensor is None or tensor.grad is None:
            continue
        grad = local(tensor.grad)
        if grad.layout is not torch.strided or bool(grad.any()):
            return False
    return True
