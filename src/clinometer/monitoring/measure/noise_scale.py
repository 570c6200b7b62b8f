"""The gradient noise scale, from micro-batches (McCandlish et al. 2018, appendix A.1).

With |g_b|² at a micro-batch of b and |g_B|² at the whole batch of B:

    G² = (B |g_B|² − b |g_b|²) / (B − b)          S = (|g_b|² − |g_B|²) / (1/b − 1/B)          noise = S / G²

Both are estimates without bias and with a large variance, so each is averaged over steps first. The first
micro-batch of every sixteenth step is measured; sizes are counted in micro-batches, and the result is too,
until the loop logs how many tokens a step has.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from clinometer.distributed.rendezvous import replicas
from clinometer.monitoring.measure.shard_measures import Shards, square_of
from clinometer.monitoring.measure.step_row import StepRow
from clinometer.monitoring.measure.watched_tensors import Roster

EVERY = 16
_KEEP = 0.9
"""Of the averages, at each measurement: about the last ten count."""
_ENOUGH = 3


class NoiseScale:
    """S and G², averaged over the measured steps."""

    def __init__(self) -> None:
        self._signal = 0.0
        self._noise = 0.0
        self._weight = 0.0
        self._count = 0

    def add(self, first_square: float, whole_square: float, parts: int, ranks: int = 1) -> None:
        """|Σ of the first part|² and |Σ of all parts|², as they stand in `.grad`, for `parts` ≥ 2 equal ones.

        The first part is 1/parts of the batch, so its own gradient is `parts` times what stands there. Where
        the first part was one rank's own, and the whole is the mean over `ranks` of them, the batch has that
        many times as many parts.
        """
        small, large = parts * parts * first_square, whole_square
        parts *= ranks
        if parts < 2 or not (small < float("inf") and large < float("inf")):
            return
        signal = (parts * large - small) / (parts - 1)
        noise = (small - large) / (1 - 1 / parts)
        self._signal = _KEEP * self._signal + (1 - _KEEP) * signal
        self._noise = _KEEP * self._noise + (1 - _KEEP) * noise
        self._weight = _KEEP * self._weight + (1 - _KEEP)
        self._count += 1

    def value(self) -> float | None:
        """S/G² in micro-batches; None while there are too few measurements or the signal drowns."""
        if self._count < _ENOUGH or self._signal <= 0 or self._noise < 0:
            return None
        return self._noise / self._signal


class FirstMicroBatch:
    """‖g‖² of the first micro-batch of a step, every `EVERY` steps, and the noise scale."""

    def __init__(self, roster: Roster, shards: Shards) -> None:
        self._roster = roster
        self._shards = shards
        self._replicas = [weakref.ref(one) for one in replicas(roster.model)]
        self._noise = NoiseScale()
        self._parts_before = 0
        """Micro-batches of the step before."""
        self._square: Any = None
        self._ranks = 1

    @property
    def replicated(self) -> bool:
        """Whether DDP averages the gradients."""
        return bool(self._replicas)

    def backward_ended(self, step: int, backwards: int, *, clean: bool) -> None:
        """Measure the gradients if a measurement is due after step `step` and they are those of one
        micro-batch: of the first backward, `clean` if no tensor had a gradient before it."""
        if step % EVERY or self._parts_before < 2 or backwards != 1 or not clean:
            return
        if self._shards.active:
            self._square = self._shards.first_square()
            return
        grads = [t.grad for t in self._roster.tensors() if t.is_leaf and t.grad is not None]
        self._square = sum(square_of(g) for g in grads)
        self._ranks = self._ranks_not_averaged()

    def step_complete(self, row: StepRow) -> None:
        """The step's row gets the measurement, if there is one."""
        row.first_square, self._square = self._square, None
        row.noise_ranks = self._ranks
        self._parts_before = row.parts

    def add_noise_scale(self, row: StepRow) -> None:
        """Count the step in, and add the noise scale to its numbers."""
        whole = row.scalars.get("total_norm")  # None: every gradient was set to None before the step
        usable = row.parts >= 2 and row.taken and not row.after_clipping
        if usable and row.first_square is not None and whole is not None:
            scale = row.scalars.get("grad_scale", 1.0)
            self._noise.add(float(row.first_square) / scale**2, whole**2, row.parts, row.noise_ranks)
        value = self._noise.value()
        if value is not None and row.parts >= 2:
            tokens = row.scalars.get("tokens")
            row.scalars["noise_scale"] = value * tokens / row.parts if tokens else value
            row.scalars["noise_scale.batches"] = value / (row.parts * row.noise_ranks)

    def _ranks_not_averaged(self) -> int:
        """The ranks whose gradients are each rank's own now: those of a DDP model under no_sync()."""
        for reference in self._replicas:
            replica = reference()
            if replica is not None and not replica.require_backward_grad_sync:
                return torch.distributed.get_world_size(replica.process_group)
        return 1
