"""What the ranks of a sharded training exchange of one step: a vector of sums and one of maxima.

    ‖g‖² = Σ_ranks ‖g_local‖²   max|g| = max_ranks max|g_local|   ⟨g, m⟩, ‖m‖², zeros, NaN, ‖θ‖², ‖Δθ‖² alike

Each rank measures its part as one process measures the full tensor; its statistics become sums, in which
every entry counts once (clinometer.vocabulary: OverRanks). Both vectors are sent when a step is complete and
needed when it is reported, so no rank waits. Alert rules and sinks see the same numbers on every rank.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import torch

from clinometer.distributed.reduce import ABSENT, all_reduce
from clinometer.distributed.rendezvous import WatchRanks
from clinometer.messages import InputError
from clinometer.monitoring.measure.statistics import LARGEST as LARGEST_NUMBER
from clinometer.vocabulary import COLUMN, MEASURED, OverRanks, Source

_SUMS = [column for column, one in enumerate(MEASURED) if one.over_ranks is not OverRanks.MAXIMUM]
_MAXIMA = [column for column, one in enumerate(MEASURED) if one.over_ranks is OverRanks.MAXIMUM]
_COLUMNS = len(_SUMS) + 2
"""Sums a tensor: the statistics that are sums, on how many ranks there is a first moment, the first ‖θ‖²."""
_GRADIENT, _MOMENT = COLUMN["grad_norm"], COLUMN["moment_norm"]
"""NaN where a part has no gradient, or no first moment."""

SUMMED = ("loss", "losses", "first_shards", "first_whole", "wholes")
"""Numbers of the step that are summed over ranks."""
COMPARED = ("step", "backwards", "pins", "closure", "clips")
"""Numbers that are compared between ranks."""
LARGEST = ("skipped", "piled_up", "after_clipping", "clipped_while_scaled", "clipped", "memory")
"""Numbers of which the largest counts."""
MUST_BE_SAME = ("step", "backwards", "clips")
"""Of the compared ones: if they differ, the ranks are at different steps."""


@dataclass(frozen=True, kw_only=True)
class PartMeasures:
    """What this rank measured of its parts of T tensors in one step."""

    statistics: np.ndarray
    """(T, number of statistics)."""
    counts: np.ndarray | None
    """(T, 3, 64): histograms, if the step has them."""
    numel: np.ndarray
    """(T,): entries of the full tensors."""
    local_numel: np.ndarray
    """(T,): entries of the parts here."""
    first_norm: np.ndarray
    moved_elsewhere: np.ndarray
    pinned: np.ndarray
    """As from Pins.numbers."""
    scalars: dict[str, float]
    """A number for each name in SUMMED, COMPARED and LARGEST."""


class StepExchange:
    """The vectors of one step, under way between the ranks."""

    def __init__(self, ranks: WatchRanks, part: PartMeasures) -> None:
        """Sends this rank's numbers."""
        self._ranks = ranks
        self._part = part
        here = np.array(ranks.reduction.counts_once)
        sums = _sums_of(part.statistics, part.local_numel, part.first_norm)
        parts = [np.where(here[:, None], sums, 0.0).ravel(), part.pinned.ravel()]
        parts.append(np.array([part.scalars[name] for name in SUMMED]))
        if part.counts is not None:
            parts.append(np.where(here[:, None, None], part.counts, 0).astype(np.float64).ravel())
        absent = np.isnan(part.statistics[:, [_GRADIENT]])
        maxima = np.nan_to_num(part.statistics[:, _MAXIMA], nan=math.inf, posinf=math.inf)
        largest = np.where(absent, ABSENT, maxima).T.ravel()
        compared = [part.scalars[name] for name in COMPARED]
        flags = [*compared, *(-value for value in compared), *(part.scalars[name] for name in LARGEST)]
        most = np.concatenate([np.array(flags), largest, part.moved_elsewhere.astype(np.float64)])
        self._sums = torch.from_numpy(np.concatenate(parts))
        self._most = torch.from_numpy(most)
        # Maxima first: they show whether the others' sums are of the same step, and as long as these.
        self._maxima_sent = all_reduce(self._most, "max", ranks.group, wait=False)
        self._sums_sent = all_reduce(self._sums, "sum", ranks.group, wait=False)

    def wait(self) -> StepTotals:
        """The numbers of all ranks. Raises InputError if a rank is at another step, or does not answer."""
        begun = time.monotonic()
        self._ranks.wait_for(self._maxima_sent, begun)
        most = self._most.numpy()
        count = len(COMPARED)
        same = {name: most[i] == -most[count + i] for i, name in enumerate(COMPARED)}
        for i, name in enumerate(COMPARED):
            if name in MUST_BE_SAME and not same[name]:
                raise InputError(
                    "watch.ranks.apart", what=name, least=int(-most[count + i]), most=int(most[i])
                )
        self._ranks.wait_for(self._sums_sent, begun)
        return StepTotals(self._part, self._sums.numpy(), most, same)


class StepTotals:
    """The numbers of one step over all ranks, the same on every rank."""

    def __init__(self, part: PartMeasures, sums: np.ndarray, most: np.ndarray, same: dict[str, bool]) -> None:
        tensors = len(part.statistics)
        self.same = same
        sizes = [tensors * _COLUMNS, part.pinned.size, len(SUMMED)]
        ends = np.cumsum(sizes)
        columns = sums[: ends[0]].reshape(tensors, _COLUMNS)
        self.pinned = sums[ends[0] : ends[1]].reshape(part.pinned.shape)
        self.summed = dict(zip(SUMMED, sums[ends[1] : ends[2]].tolist(), strict=True))
        self.counts = None
        if part.counts is not None:
            self.counts = np.rint(sums[ends[2] :]).astype(np.int64).reshape(part.counts.shape)
        flags = len(COMPARED)
        self.largest = dict(zip(LARGEST, most[2 * flags : 2 * flags + len(LARGEST)].tolist(), strict=True))
        rest = most[2 * flags + len(LARGEST) :]
        end = len(_MAXIMA) * tensors
        self.moved_elsewhere = rest[end:] > 0
        self.first_norm = np.sqrt(columns[:, -1])
        self.statistics = _statistics_of(columns, rest[:end].reshape(len(_MAXIMA), tensors), part.numel)


def _sums_of(statistics: np.ndarray, numel: np.ndarray, first_norm: np.ndarray) -> np.ndarray:
    """(T, _COLUMNS) from the statistics of the parts here, which have `numel` entries."""
    known = np.nan_to_num(statistics, nan=0.0, posinf=math.inf)
    columns = []
    with np.errstate(over="ignore", invalid="ignore"):
        for column in _SUMS:
            one, values = MEASURED[column], known[:, column]
            if one.over_ranks is OverRanks.ROOT_OF_SQUARES:
                columns.append(values**2)
            elif one.over_ranks is OverRanks.SHARE:
                columns.append(np.rint(values * numel))
            elif one.over_ranks is OverRanks.COSINE:
                first, second = (known[:, COLUMN[name]] for name in one.norms)
                columns.append(np.nan_to_num(values * first * second, nan=0.0))
            else:
                columns.append(values)
        columns.append((~np.isnan(statistics[:, _MOMENT])).astype(np.float64))
        columns.append(np.nan_to_num(first_norm, nan=0.0, posinf=math.inf) ** 2)
    return np.stack(columns, axis=1)


def _statistics_of(sums: np.ndarray, maxima: np.ndarray, numel: np.ndarray) -> np.ndarray:
    """(T, number of statistics) of the full tensors, by the rules of statistics.py."""
    found = np.full((len(sums), len(MEASURED)), np.nan)
    summed = {MEASURED[column].name: sums[:, place] for place, column in enumerate(_SUMS)}
    finite, has_moment = summed["grad_nonfinite"] == 0, sums[:, -2] > 0
    absent = maxima[0] == ABSENT
    with np.errstate(divide="ignore", invalid="ignore"):
        for column, one in enumerate(MEASURED):
            if one.over_ranks is OverRanks.MAXIMUM:
                values = np.minimum(maxima[_MAXIMA.index(column)], LARGEST_NUMBER)
            elif one.over_ranks is OverRanks.ROOT_OF_SQUARES:
                square = summed[one.name]
                values = np.minimum(np.sqrt(square), LARGEST_NUMBER)
                if one.if_not_finite is None:
                    values = np.where(np.isfinite(square), values, math.inf)
            elif one.over_ranks is OverRanks.SHARE:
                values = np.where(numel > 0, summed[one.name] / np.maximum(numel, 1), 0.0)
            elif one.over_ranks is OverRanks.COSINE:
                first, second = (summed[name] for name in one.norms)
                defined = (first > 0) & (second > 0) & np.isfinite(second)
                cosine = summed[one.name] / np.sqrt(first) / np.sqrt(second)
                values = np.where(defined, np.clip(cosine, -1, 1), np.nan)
            else:
                values = summed[one.name]
            if one.if_not_finite is not None:
                values = np.where(finite, values, one.if_not_finite)
            if one.source is Source.MOMENT:
                values = np.where(has_moment, values, np.nan)
            found[:, column] = values if one.source is Source.WEIGHT else np.where(absent, np.nan, values)
    return found
