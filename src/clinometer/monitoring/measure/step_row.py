"""One step's numbers: taken around the optimizer's step, and finished when the next one begins."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from clinometer.distributed.sharded_tensors import local
from clinometer.monitoring.measure.computations import (
    GRADIENT_PASS,
    OF_GRADIENT,
    OF_WEIGHT,
    WEIGHT_PASS,
)
from clinometer.monitoring.measure.device import gradients_on_device, weights_on_device
from clinometer.monitoring.measure.histograms import count_into
from clinometer.monitoring.measure.small_tensors import Gradients, Places, Room, is_small
from clinometer.monitoring.measure.statistics import (
    PIECE,
    Scratch,
    flat,
    measure_gradient,
    measure_weight,
)
from clinometer.monitoring.measure.watched_tensors import WatchedTensors, give_memory, state_of
from clinometer.monitoring.measure.writes_between import Write
from clinometer.vocabulary import BUCKETS, COLUMN, HISTOGRAM_KINDS, MEASURED, STATISTICS, OverRanks, Source

_NORM, _UPDATE = COLUMN["grad_norm"], COLUMN["update_norm"]
_SCALED = [
    column
    for column, one in enumerate(MEASURED)
    if one.source is Source.GRADIENT and one.over_ranks in (OverRanks.ROOT_OF_SQUARES, OverRanks.MAXIMUM)
]
"""The columns that a loss scale and clipping multiply."""
_KINDS = len(HISTOGRAM_KINDS)
_MOMENTS = ("exp_avg", "momentum_buffer")


class StepRow:
    """The numbers of one step while they come in."""

    def __init__(self, step: int, watched: list[WatchedTensors], *, measured: bool, histograms: bool) -> None:
        self.step = step
        self.measured = measured
        self.batch: dict[str, Any] | None = None
        """The batch's identity, if the loop said it."""
        self.device: torch.device | None = None
        self.read_for: set[int] = set()
        """Ids of the optimizers whose gradients were looked at."""
        self.losses: list[Any] = []
        self.parts = 0
        self.first_square: Any = None
        self.clipped_while_scaled = False
        self.piled_up = False
        """The gradients were added to those of the step before."""
        self.discarded = self.backwards = 0
        """Backwards that no step used, of how many since the last step."""
        self.write: Write | None = None
        """What was written to the weights since the last step."""
        self.scales: list[tuple[list[int], Any]] = []
        """Which tensors were measured with a loss scale on them, and which."""
        self.statistics = np.full((len(watched), len(STATISTICS)), np.nan, np.float64)
        self.statistics[:, _UPDATE] = 0.0
        self.counts = np.zeros((len(watched), _KINDS, BUCKETS), np.int64) if histograms else None
        self.stepped: set[int] = set()
        """Ids of the optimizers that had their turn."""
        self.taken = True
        self.read: set[int] = set()
        """Tensors whose gradient was measured."""
        self.scalars: dict[str, Any] = {}
        self.time = 0.0
        self.clips: list[tuple[list[int], Any, float]] = []
        """Which tensors were clipped before they were measured, at which total norm, to which largest."""
        self.after_clipping = False
        """Some clipping came before the measurement and cannot be taken back."""
        self.clipped = False
        self._late: list[tuple[list[int], list[int], Tensor, Any]] = []
        self.clips_seen: list[tuple[list[int], float]] = []
        """Which tensors were clipped, to which largest total, right after they were measured."""
        self.exchange: Any = None
        """What is under way between the ranks that hold the tensors in parts; then, from all of them:"""
        self.first_norm: np.ndarray | None = None
        self.moved_elsewhere: np.ndarray | None = None
        self.noise_ranks = 1
        """Ranks whose gradients were not yet averaged when the first micro-batch was measured."""

    def widen(self, watched: list[WatchedTensors]) -> None:
        """Room for tensors that came while the step was under way."""
        more = len(watched) - len(self.statistics)
        if more > 0:
            rows = np.full((more, len(STATISTICS)), np.nan, np.float64)
            rows[:, _UPDATE] = 0.0
            self.statistics = np.concatenate([self.statistics, rows])
            if self.counts is not None:
                self.counts = np.concatenate([self.counts, np.zeros((more, _KINDS, BUCKETS), np.int64)])

    def read_gradients(
        self,
        watched: Iterable[WatchedTensors],
        optimizers: Iterable[Optimizer],
        scratch: Scratch,
        small_gradients: Gradients,
    ) -> list[int]:
        """Measure each gradient once, beside the first moment its optimizer holds; returns which."""
        found: list[int] = []
        states = [optimizer.state for optimizer in optimizers]
        elsewhere: dict[torch.device, list[tuple[int, Tensor, Tensor | None]]] = {}
        small: list[tuple[int, Tensor, Tensor | None]] = []
        for one in watched:
            tensor = one.ref()
            if tensor is None or one.index in self.read:
                continue
            grad = tensor.grad if tensor.is_leaf or tensor.retains_grad else None
            if grad is None:
                continue
            grad = local(grad)
            self.read.add(one.index)
            found.append(one.index)
            moment = _moment_of(tensor, states)
            for name, computed in OF_GRADIENT.items():
                self.statistics[one.index, COLUMN[name]] = computed(grad, moment)
            if not grad.is_cpu:
                self.device = grad.device
                elsewhere.setdefault(grad.device, []).append((one.index, grad, moment))
                continue
            if is_small(grad) and (moment is None or (is_small(moment) and moment.shape == grad.shape)):
                small.append((one.index, grad, moment))
                continue
            counts = None if self.counts is None else self.counts[one.index, 0]
            self.statistics[one.index, GRADIENT_PASS] = measure_gradient(grad, moment, scratch, counts)
        if small:
            indices = [index for index, _, _ in small]
            counts = None if self.counts is None else np.zeros((len(small), BUCKETS), np.int64)
            numbers = small_gradients.measure(
                [g for _, g, _ in small], [m for _, _, m in small], scratch, counts
            )
            self.statistics[np.array(indices)[:, None], GRADIENT_PASS] = numbers
            if self.counts is not None and counts is not None:
                self.counts[indices, 0] += counts
        for members in elsewhere.values():
            indices = [index for index, _, _ in members]
            numbers = gradients_on_device([g for _, g, _ in members], [m for _, _, m in members])
            self._read_later(indices, GRADIENT_PASS, numbers)
            if self.counts is not None:
                for index, grad, _ in members:
                    dense = grad if grad.layout is torch.strided else grad.to_dense()
                    _count(self.counts[index, 0], _on_host(flat(dense)), scratch)
        return found

    def read_weights(self, watched: Iterable[WatchedTensors], scratch: Scratch) -> None:
        """Measure each weight that may have moved, and its update; the copies are then those of now.

        What several optimizers of a step hold is measured after each; its update is the largest of them.
        """
        earlier = self.statistics[:, _UPDATE].copy()
        elsewhere: dict[torch.device, list[tuple[WatchedTensors, Tensor, Tensor]]] = {}
        rooms: dict[Room, list[tuple[WatchedTensors, Tensor]]] = {}
        for one in watched:
            tensor = one.ref()
            if tensor is None or one.before is None:
                continue
            for name, computed in OF_WEIGHT.items():
                self.statistics[one.index, COLUMN[name]] = computed(flat(tensor), one.before)
            if one.room is not None:
                rooms.setdefault(one.room, []).append((one, tensor))
                continue
            if self._is_still(one, tensor):
                continue
            if not tensor.is_cpu:
                elsewhere.setdefault(tensor.device, []).append((one, tensor, one.before))
                continue
            self._read_weight(one, tensor, scratch)
        for room, members in rooms.items():
            same = room.whole and [one.index for one, _ in members] == room.indices
            if same and room.fits([tensor for _, tensor in members]):
                self._read_room(room, members)
                continue
            for one, tensor in members:
                if not self._is_still(one, tensor):
                    self._read_weight(one, tensor, scratch)
        for members in elsewhere.values():
            if self.counts is not None:
                for one, tensor, before in members:
                    now, old = _on_host(flat(tensor)), _on_host(before)
                    _count(self.counts[one.index, 1], now, scratch)
                    _count(self.counts[one.index, 2], now - old, scratch)
            numbers = weights_on_device([t for _, t, _ in members], [b for _, _, b in members])
            self._read_later([one.index for one, _, _ in members], WEIGHT_PASS, numbers)
        np.maximum(self.statistics[:, _UPDATE], earlier, out=self.statistics[:, _UPDATE])

    def _is_still(self, one: WatchedTensors, tensor: Tensor) -> bool:
        """Whether the weight has no gradient and was not written to: then the last measurement holds."""
        state = state_of(tensor)
        still = state == one.look and one.index not in self.read and not math.isnan(one.weight_norm)
        one.look = state
        if still:
            self.statistics[one.index, WEIGHT_PASS] = one.weight_norm, 0.0
        return still and self.counts is None

    def _read_weight(self, one: WatchedTensors, tensor: Tensor, scratch: Scratch) -> None:
        assert one.before is not None
        counts = None if self.counts is None else (self.counts[one.index, 1], self.counts[one.index, 2])
        found = measure_weight(tensor, one.before, scratch, counts)
        one.weight_norm = found.norm
        self.statistics[one.index, WEIGHT_PASS] = found

    def _read_room(self, room: Room, members: list[tuple[WatchedTensors, Tensor]]) -> None:
        counts = None if self.counts is None else np.zeros((2, len(members), BUCKETS), np.int64)
        numbers = room.measure([tensor for _, tensor in members], counts)
        indices = [one.index for one, _ in members]
        self.statistics[np.array(indices)[:, None], WEIGHT_PASS] = numbers
        if self.counts is not None and counts is not None:
            self.counts[indices, 1] += counts[0]
            self.counts[indices, 2] += counts[1]
        for (one, tensor), norm in zip(members, numbers[:, 0].tolist(), strict=True):
            self._is_still(one, tensor)
            one.weight_norm = norm

    def nonfinite(self) -> bool:
        """Whether a gradient on the host has an entry that is not finite."""
        return bool(np.any(self.statistics[:, COLUMN["grad_nonfinite"]] > 0))

    def fetch(self) -> None:
        """What a device still holds, once it is there."""
        for rows, columns, numbers, event in self._late:
            if event is not None:
                event.synchronize()
            earlier = self.statistics[rows, _UPDATE]
            self.statistics[np.ix_(rows, columns)] = numbers.double().numpy()
            self.statistics[rows, _UPDATE] = np.maximum(self.statistics[rows, _UPDATE], earlier)
        self._late = []

    def finish(self) -> None:
        """Fetch what a device still holds, and take scale and clipping off the gradients' norms."""
        self.fetch()
        for indices, scale in self.scales:
            self.statistics[np.ix_(indices, _SCALED)] /= float(scale)
        factors = []
        for indices, total, largest in self.clips:
            total = float(total)
            factor = min(1.0, largest / (total + 1e-6)) if math.isfinite(total) else math.nan
            factors.append(factor)
            if factor > 0:
                self.statistics[np.ix_(indices, _SCALED)] /= factor
            elif any(self.statistics[indices, _NORM] == 0) or not math.isfinite(total):
                self.after_clipping = True
            self.scalars["max_norm"] = largest
        for indices, largest in self.clips_seen:
            total = float(np.sqrt(np.nansum(self.statistics[indices, _NORM] ** 2)))
            factors.append(min(1.0, largest / (total + 1e-6)) if math.isfinite(total) else math.nan)
            self.scalars["max_norm"] = largest
        if factors:
            self.scalars["clip"] = math.prod(factors)
        if self.clipped:
            self.scalars["before_clipping"] = 0.0 if self.after_clipping else 1.0
        norms = self.statistics[:, _NORM]
        with np.errstate(over="ignore"):
            known = norms[~np.isnan(norms)]
            if known.size:
                self.scalars["total_norm"] = float(np.sqrt(np.sum(known**2)))
        self.scalars["taken"] = float(self.taken)
        self.scalars = {name: float(value) for name, value in self.scalars.items()}

    def _read_later(self, rows: list[int], columns: list[int], numbers: Tensor) -> None:
        event = None
        if numbers.device.type == "cuda":
            host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            host.copy_(numbers, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            numbers = host
        else:
            numbers = numbers.cpu()
        self._late.append((rows, columns, numbers, event))


def refresh(watched: Iterable[WatchedTensors], places: Places, *, stepped: bool = False) -> bool:
    """Copy the weights that changed since the last measurement, other than by this step.

    `stepped`: steps were taken that were not measured. torch's fused kernels write and leave the version.
    Returns whether a tensor got other memory.
    """
    give_memory(watched, places)
    elsewhere = False
    for one in watched:
        tensor = one.ref()
        if tensor is None or one.before is None:
            continue
        state = state_of(tensor)
        if state != one.look or stepped:
            values = flat(tensor)
            if (values.numel(), values.dtype, values.device) != (
                one.before.numel(),
                one.before.dtype,
                one.before.device,
            ):
                one.before = values.clone()  # resized, cast or moved
                if one.room is not None:
                    one.room.whole, one.room = False, None
            else:
                one.before.copy_(values)
            elsewhere |= one.look is not None and state[1] != one.look[1]
            one.look, one.weight_norm, one.moved_elsewhere = state, math.nan, True
    return elsewhere


def _moment_of(tensor: Tensor, states: list[Any]) -> Tensor | None:
    for state in states:
        held = state.get(tensor)
        if isinstance(held, dict):
            for key in _MOMENTS:
                moment = held.get(key)
                if isinstance(moment, Tensor):
                    return local(moment)
    return None


def _count(counts: np.ndarray, values: Tensor, scratch: Scratch) -> None:
    for piece in values.split(PIECE) if values.numel() else ():
        count_into(counts, piece, scratch)


def _on_host(values: Tensor) -> Tensor:
    values = values.cpu()
    return values if values.dtype in (torch.float32, torch.float64) else values.float()
