"""The noise scale of a session: the first micro-batch's ‖g‖², with what several ranks make of it."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from clinometer.distributed.rendezvous import replicas
from clinometer.monitoring.measure.noise_scale import NoiseScale
from clinometer.monitoring.measure.shard_measures import Shards, square_of
from clinometer.monitoring.measure.step_row import StepRow
from clinometer.monitoring.measure.watched_tensors import Roster


class FirstPart:
    """What was measured since the last step."""

    def __init__(self, roster: Roster, shards: Shards) -> None:
        self._roster = roster
        self._shards = shards
        self._replicas = [weakref.ref(one) for one in replicas(roster.model)]
        self._noise = NoiseScale()
        self._square: Any = None
        self._ranks = 1

    @property
    def replicated(self) -> bool:
        """Whether DDP averages the gradients."""
        return bool(self._replicas)

    def measure(self) -> None:
        """The gradients are now those of the first micro-batch."""
        if self._shards.active:
            self._square = self._shards.first_square()
            return
        grads = [t.grad for t in self._roster.tensors() if t.is_leaf and t.grad is not None]
        self._square = sum(square_of(g) for g in grads)
        self._ranks = self._apart()

    def take(self) -> tuple[Any, int]:
        """The number, if there is one, and how many ranks' gradients were not averaged then."""
        square, self._square = self._square, None
        return square, self._ranks

    def tell(self, row: StepRow) -> None:
        """Add the step to the averages, and their noise scale to its numbers."""
        whole = row.scalars.get("total_norm")  # None: every gradient was taken away before the step
        usable = row.parts >= 2 and row.taken and not row.after_clipping
        if usable and row.first_square is not None and whole is not None:
            scale = row.scalars.get("grad_scale", 1.0)
            self._noise.add(float(row.first_square) / scale**2, whole**2, row.parts, row.noise_ranks)
        value = self._noise.value()
        if value is not None and row.parts >= 2:
            tokens = row.scalars.get("tokens")
            row.scalars["noise_scale"] = value * tokens / row.parts if tokens else value
            row.scalars["noise_scale.batches"] = value / (row.parts * row.noise_ranks)

    def _apart(self) -> int:
        for reference in self._replicas:
            replica = reference()
            if replica is not None and not replica.require_backward_grad_sync:  # under no_sync()
                return torch.distributed.get_world_size(replica.process_group)
        return 1
