"""Means, minima and maxima over 16, 256 and 4096 steps, so that long runs open as fast as short ones.

A window holds the steps from k·L to (k+1)·L − 1. It is written once the first step after it arrives, and a
level is made from what the level below has stored, never from what only memory knew: a run that was cut and
resumed has therefore the same bytes as one that never stopped.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clinometer.record.format.schema import ABSENT, LEVELS

ABSENT_NUMBER = np.array([ABSENT], dtype="<u8").view("<f8")[0]


@dataclass
class Cells:
    """Aggregates of some steps, four arrays of one shape; `counts` says how many values each cell has."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    counts: np.ndarray


@dataclass
class Window:
    """One closed window: of tensors (T, number of statistics) and of scalars (n,)."""

    level: int
    start: int
    rows: int
    time: float
    tensors: Cells
    scalars: Cells


def cells_of(values: np.ndarray, present: np.ndarray, dtype: str) -> Cells:
    """Aggregate the first axis of `values` where `present`: infinities and NaN too; no value gives NaN."""
    if present.all():  # as in most windows, and a third of the time
        mean = values.mean(axis=0, dtype=np.float64)
        low, high = values.min(axis=0), values.max(axis=0)
        counts = np.full(mean.shape, len(values))
        return Cells(mean.astype(dtype), low.astype(dtype), high.astype(dtype), counts)
    counts = present.sum(axis=0)
    total = np.where(present, values, 0).sum(axis=0, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = total / counts
    hidden = np.where(present, values, np.nan)
    return Cells(
        mean.astype(dtype),
        np.fmin.reduce(hidden, axis=0).astype(dtype),
        np.fmax.reduce(hidden, axis=0).astype(dtype),
        counts,
    )


def merge(parts: list[Cells], dtype: str) -> Cells:
    """Aggregates of aggregates; a later part may have more tensors than an earlier one."""
    size = max(len(part.mean) for part in parts)
    mean, low, high = (
        np.stack([_padded(getattr(part, name), size, np.nan) for part in parts])
        for name in ("mean", "low", "high")
    )
    counts = np.stack([_padded(part.counts, size, 0) for part in parts])
    total = np.where(counts > 0, mean * counts, 0).sum(axis=0, dtype=np.float64)
    count = counts.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return Cells(
            (total / count).astype(dtype), np.fmin.reduce(low, axis=0), np.fmax.reduce(high, axis=0), count
        )


class Rollups:
    """The windows that are still open, at every level."""

    def __init__(self) -> None:
        self._statistics = np.empty((LEVELS[0], 0, 0), dtype=np.float32)
        self._scalars = np.empty((LEVELS[0], 0), dtype=np.float64)
        self._rows = 0
        self._step = -1
        self._time = 0.0
        self._parts: list[list[Window]] = [[] for _ in LEVELS[1:]]

    def close_before(self, step: int) -> list[Window]:
        """The windows that are complete now that `step` is known to be the next one."""
        if not self._rows or self._step // LEVELS[0] == step // LEVELS[0]:
            return []
        closed = [self._close_rows()]
        for level, parts in zip(LEVELS[1:], self._parts, strict=True):
            parts.append(closed[-1])
            if parts[0].start // level == step // level:
                break
            closed.append(_close_parts(level, parts))
            parts.clear()
        return closed

    def add(self, step: int, time: float, scalars: np.ndarray, statistics: np.ndarray) -> None:
        """Count a step in; call `close_before` first."""
        if self._rows == 0:
            self._time = time
        if self._statistics.shape[2] != statistics.shape[1]:
            self._statistics = np.empty((LEVELS[0], 0, statistics.shape[1]), dtype=np.float32)
        if self._statistics.shape[1] < len(statistics):
            self._statistics = _widened(self._statistics, len(statistics), np.nan)
        if self._scalars.shape[1] < len(scalars):
            self._scalars = _widened(self._scalars, len(scalars), ABSENT_NUMBER)
        row = self._rows
        self._statistics[row, : len(statistics)] = statistics
        self._statistics[row, len(statistics) :] = np.nan
        self._scalars[row, : len(scalars)] = scalars
        self._scalars[row, len(scalars) :] = ABSENT_NUMBER
        self._rows, self._step = row + 1, step

    def restore(self, windows: list[list[Window]]) -> None:
        """Take back the closed windows, level by level, that belong to windows still open one level up."""
        self._parts = [list(level) for level in windows]

    def _close_rows(self) -> Window:
        statistics, scalars = self._statistics[: self._rows], self._scalars[: self._rows]
        window = Window(
            LEVELS[0],
            self._step // LEVELS[0] * LEVELS[0],
            self._rows,
            self._time,
            cells_of(statistics, ~np.isnan(statistics), "<f4"),
            cells_of(scalars, scalars.view(np.uint64) != ABSENT, "<f8"),
        )
        self._rows = 0
        return window


def _close_parts(level: int, parts: list[Window]) -> Window:
    return Window(
        level,
        parts[0].start // level * level,
        sum(part.rows for part in parts),
        parts[0].time,
        merge([part.tensors for part in parts], "<f4"),
        merge([part.scalars for part in parts], "<f8"),
    )


def _padded(values: np.ndarray, size: int, filler: float) -> np.ndarray:
    if len(values) == size:
        return values
    out = np.full((size, *values.shape[1:]), filler, dtype=values.dtype)
    out[: len(values)] = values
    return out


def _widened(rows: np.ndarray, size: int, filler: float) -> np.ndarray:
    out = np.full((len(rows), size, *rows.shape[2:]), filler, dtype=rows.dtype)
    out[:, : rows.shape[1]] = rows
    return out
