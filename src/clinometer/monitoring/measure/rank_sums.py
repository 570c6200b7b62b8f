"""What the ranks of a sharded training tell each other of one step: a vector of sums and one of maxima.

    ‖g‖² = Σ_ranks ‖g_local‖²   max|g| = max_ranks max|g_local|   ⟨g, m⟩, ‖m‖², zeros, NaN, ‖θ‖², ‖Δθ‖² alike

Each rank measures its part as one process measures the whole; out of its numbers come sums, which are added
up with every entry counted once. Both vectors are sent when a step ends and are needed when the next one is
told, so nobody waits for them. Rules and sinks then see the same numbers on every rank.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch

from clinometer.distributed.rendezvous import Meeting
from clinometer.messages import InputError
from clinometer.monitoring.measure.statistics import STATISTICS

_GN, _GM, _ZEROS, _BAD, _WN, _UN, _COS, _MN = range(len(STATISTICS))
_LARGEST = float(np.finfo(np.float32).max)
_COLUMNS = 9
_ABSENT = -1.0

SUMMED = ("loss", "losses", "first_shards", "first_whole", "wholes")
"""Numbers of the step as a whole that are added up over ranks."""
COMPARED = ("step", "backwards", "pins", "closure", "clips")
"""Numbers that must be the same on all ranks, else their steps are not the same steps."""
LARGEST = ("skipped", "piled_up", "after_clipping", "clipped_while_scaled", "clipped", "memory")
"""Numbers of which the largest holds for all."""
MUST = ("step", "backwards", "clips")


class Exchange:
    """One step's vectors, under way."""

    def __init__(
        self,
        meeting: Meeting,
        statistics: np.ndarray,
        counts: np.ndarray | None,
        numel: np.ndarray,
        local_numel: np.ndarray,
        first_norm: np.ndarray,
        moved_elsewhere: np.ndarray,
        pinned: np.ndarray,
        scalars: dict[str, float],
    ) -> None:
        """Sends this rank's numbers. `statistics` (T, 8) and `counts` (T, 3, 64) are of its parts."""
        import torch.distributed as dist

        self._meeting = meeting
        self._numel = numel
        self._shape = statistics.shape[0], pinned.shape, None if counts is None else counts.shape
        here = np.array(meeting.together.counts_once)
        sums = _sums_of(statistics, local_numel, first_norm)
        parts = [np.where(here[:, None], sums, 0.0).ravel(), pinned.ravel()]
        parts.append(np.array([scalars[name] for name in SUMMED]))
        if counts is not None:
            parts.append(np.where(here[:, None, None], counts, 0).astype(np.float64).ravel())
        absent = np.isnan(statistics[:, _GN])
        largest = np.where(absent, _ABSENT, np.nan_to_num(statistics[:, _GM], nan=math.inf, posinf=math.inf))
        compared = [scalars[name] for name in COMPARED]
        flags = [*compared, *(-value for value in compared), *(scalars[name] for name in LARGEST)]
        most = np.concatenate([np.array(flags), largest, moved_elsewhere.astype(np.float64)])
        self._sums = torch.from_numpy(np.concatenate(parts))
        self._most = torch.from_numpy(most)
        # Maxima first: they tell whether the others' sums are of the same step, and as long as these.
        self._work = [
            dist.all_reduce(vector, kind, group=meeting.group, async_op=True)
            for vector, kind in ((self._most, dist.ReduceOp.MAX), (self._sums, dist.ReduceOp.SUM))
        ]

    def wait(self) -> Agreed:
        """The numbers of all ranks. Raises InputError if they are not of the same step, or do not come."""
        begun = time.monotonic()
        self._meeting.wait_for(self._work[0], begun)
        most = self._most.numpy()
        count = len(COMPARED)
        same = {name: most[i] == -most[count + i] for i, name in enumerate(COMPARED)}
        for i, name in enumerate(COMPARED):
            if name in MUST and not same[name]:
                raise InputError(
                    "watch.ranks.apart", what=name, least=int(-most[count + i]), most=int(most[i])
                )
        self._meeting.wait_for(self._work[1], begun)
        return Agreed(self._sums.numpy(), most, self._shape, self._numel, same)


class Agreed:
    """A step's numbers, the same on every rank."""

    def __init__(
        self, sums: np.ndarray, most: np.ndarray, shape: Any, numel: np.ndarray, same: dict[str, bool]
    ) -> None:
        tensors, pinned, counted = shape
        self.same = same
        sizes = [tensors * _COLUMNS, math.prod(pinned), len(SUMMED)]
        ends = np.cumsum(sizes)
        columns = sums[: ends[0]].reshape(tensors, _COLUMNS)
        self.pinned = sums[ends[0] : ends[1]].reshape(pinned)
        self.summed = dict(zip(SUMMED, sums[ends[1] : ends[2]].tolist(), strict=True))
        self.counts = None if counted is None else np.rint(sums[ends[2] :]).astype(np.int64).reshape(counted)
        flags = len(COMPARED)
        self.largest = dict(zip(LARGEST, most[2 * flags : 2 * flags + len(LARGEST)].tolist(), strict=True))
        rest = most[2 * flags + len(LARGEST) :]
        self.moved_elsewhere = rest[tensors:] > 0
        self.first_norm = np.sqrt(columns[:, 8])
        self.statistics = _statistics_of(columns, rest[:tensors], numel)


def _sums_of(statistics: np.ndarray, numel: np.ndarray, first_norm: np.ndarray) -> np.ndarray:
    """(T, 9): ‖g‖², zeros, non-finite, ⟨g, m⟩, ‖m‖², whether there is m, ‖θ‖², ‖Δθ‖², first ‖θ‖²."""
    known = np.nan_to_num(statistics, nan=0.0, posinf=math.inf)
    with np.errstate(over="ignore", invalid="ignore"):
        product = np.nan_to_num(known[:, _COS] * known[:, _GN] * known[:, _MN], nan=0.0)
        columns = [
            known[:, _GN] ** 2,
            np.rint(known[:, _ZEROS] * numel),
            known[:, _BAD],
            product,
            known[:, _MN] ** 2,
            (~np.isnan(statistics[:, _MN])).astype(np.float64),
            known[:, _WN] ** 2,
            known[:, _UN] ** 2,
            np.nan_to_num(first_norm, nan=0.0, posinf=math.inf) ** 2,
        ]
    return np.stack(columns, axis=1)


def _statistics_of(columns: np.ndarray, largest: np.ndarray, numel: np.ndarray) -> np.ndarray:
    """(T, 8) of the whole tensors, by the rules of statistics.py."""
    square, zeros, bad, product, moment_square, moments, weight, update, _ = columns.T
    found = np.full((len(columns), len(STATISTICS)), np.nan)
    finite = bad == 0
    with np.errstate(divide="ignore", invalid="ignore"):
        norm = np.minimum(np.sqrt(square), _LARGEST)
        found[:, _GN] = np.where(finite, norm, math.inf)
        found[:, _GM] = np.where(finite, np.minimum(largest, _LARGEST), math.inf)
        found[:, _ZEROS] = np.where(numel > 0, zeros / np.maximum(numel, 1), 0.0)
        found[:, _BAD] = bad
        told = finite & (moments > 0) & (square > 0) & (moment_square > 0) & np.isfinite(moment_square)
        cosine = product / np.sqrt(square) / np.sqrt(moment_square)
        found[:, _COS] = np.where(told, np.clip(cosine, -1, 1), np.nan)
        found[:, _MN] = np.where(moments > 0, _norm(moment_square), np.nan)
        absent = largest == _ABSENT
        found[absent, :] = np.nan
        found[:, _WN], found[:, _UN] = _norm(weight), _norm(update)
    return found


def _norm(square: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(square), np.minimum(np.sqrt(square), _LARGEST), math.inf)
