"""Ranges of steps as cells: which roll-up serves a range, and cells made of its windows.

A cell holds the steps from k·stride to (k+1)·stride − 1 for every k, so cells do not move when a range does. Where
the run's end has no closed window of a level yet, the levels below and the rows themselves fill in.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clinometer.record.schema import ABSENT, LEVELS, STATISTICS
from clinometer.record.windows import SHIFT

MOST_BYTES = 24 << 20
"""What one answer may read: a wider range is then seen in fewer, coarser cells."""


@dataclass
class Pieces:
    """Windows or rows, oldest first; n of them, W columns: `weight` counts the values in each."""

    start: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    weight: np.ndarray

    def combined(self, stride: int) -> Pieces:
        """One piece for each cell that has any."""
        if not len(self.start):
            return self
        cell = self.start // stride
        begins = np.flatnonzero(np.concatenate([[True], cell[1:] != cell[:-1]]))
        if len(begins) == len(cell):
            return self
        weight = np.add.reduceat(self.weight, begins, axis=0)
        weighted = np.where(self.weight > 0, self.mean * self.weight, 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = np.add.reduceat(weighted, begins, axis=0) / weight
        return Pieces(
            self.start[begins],
            mean.astype(self.mean.dtype),
            np.fmin.reduceat(self.low, begins, axis=0),
            np.fmax.reduceat(self.high, begins, axis=0),
            weight,
        )


def plan(
    first: int, last: int, points: int, *, every: int, row_bytes: int, window_bytes: int
) -> tuple[int, int]:
    """The level to read (1: the rows) and the stride of the cells, for at most about `points` cells."""
    span = last - first + 1
    wanted = max(1, every, -(-span // max(1, points)))
    levels = [1, *LEVELS]
    place = max(i for i, level in enumerate(levels) if level <= wanted)
    while place + 1 < len(levels):
        rows = span / max(levels[place], every)
        if rows * (row_bytes if place == 0 else window_bytes) <= MOST_BYTES:
            break
        place += 1
    level = levels[place]
    return level, -(-max(wanted, level) // level) * level


def statistics(
    connection: sqlite3.Connection,
    wanted: Sequence[int],
    level: int,
    first: int,
    last: int,
    ids: np.ndarray,
    width: int,
) -> list[Pieces]:
    """For each statistic in `wanted`, its pieces for the tensors `ids`; `width` tensors are known in all."""
    found: list[list[Pieces]] = [[] for _ in wanted]
    for size in [size for size in reversed(LEVELS) if size <= level]:
        begin = first
        for parts, statistic in zip(found, wanted, strict=True):
            rows = connection.execute(
                f"SELECT key, rows, mean, low, high, counts FROM rollup_{size} WHERE key BETWEEN ? AND ?",
                (statistic << SHIFT | first, statistic << SHIFT | last),
            ).fetchall()
            if rows:
                parts.append(_windows(rows, statistic, ids, width))
                begin = int(parts[-1].start[-1]) + size
        first = begin
    rows = connection.execute(
        "SELECT step, statistics FROM steps WHERE step BETWEEN ? AND ?", (first, last)
    ).fetchall()
    if rows:
        start = np.array([row[0] for row in rows], dtype=np.int64)
        table = _stacked([row[1] for row in rows], "<f4", width * len(STATISTICS), np.nan)
        table = table.reshape(len(rows), width, len(STATISTICS))
        for parts, statistic in zip(found, wanted, strict=True):
            values = table[:, ids, statistic]
            parts.append(Pieces(start, values, values, values, ~np.isnan(values) * 1))
    return [_joined(parts, len(ids), "<f4") for parts in found]


def scalars(
    connection: sqlite3.Connection, ids: np.ndarray, level: int, first: int, last: int, width: int
) -> Pieces:
    """The pieces of the scalars `ids` and, as the last column, the time of each piece's first step."""
    found = []
    for size in [size for size in reversed(LEVELS) if size <= level]:
        rows = connection.execute(
            f"SELECT start, time, cells FROM scalar_rollup_{size} WHERE start BETWEEN ? AND ?", (first, last)
        ).fetchall()
        if rows:
            start = np.array([row[0] for row in rows], dtype=np.int64)
            table = _stacked([row[2] for row in rows], "<f8", width * 4, np.nan).reshape(-1, width, 4)[:, ids]
            weight = np.nan_to_num(table[..., 3]).astype(np.int64)
            times = [row[1] for row in rows]
            found.append(_timed(start, *np.moveaxis(table[..., :3], -1, 0), weight, times))
            first = int(start[-1]) + size
    rows = connection.execute(
        "SELECT step, time, scalars FROM steps WHERE step BETWEEN ? AND ?", (first, last)
    ).fetchall()
    if rows:
        start = np.array([row[0] for row in rows], dtype=np.int64)
        absent = np.array([ABSENT], dtype="<u8").view("<f8")[0]
        values = _stacked([row[2] for row in rows], "<f8", width, absent)[:, ids]
        weight = (np.ascontiguousarray(values).view("<u8") != ABSENT) * 1
        found.append(_timed(start, values, values, values, weight, [row[1] for row in rows]))
    return _joined(found, len(ids) + 1, "<f8")


def _timed(
    start: np.ndarray,
    mean: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    weight: np.ndarray,
    times: list[float],
) -> Pieces:
    time = np.array(times, dtype=np.float64)[:, None]
    columns = [np.concatenate([part, time], axis=1) for part in (mean, low, high)]
    return Pieces(start, *columns, np.concatenate([weight, np.ones_like(time, dtype=np.int64)], axis=1))


def _windows(rows: list[tuple], statistic: int, ids: np.ndarray, width: int) -> Pieces:
    start = np.array([row[0] for row in rows], dtype=np.int64) - (statistic << SHIFT)
    mean, low, high = (_stacked([row[i] for row in rows], "<f4", width, np.nan)[:, ids] for i in (2, 3, 4))
    weight = np.where(np.isnan(mean), 0, np.array([row[1] for row in rows], dtype=np.int64)[:, None])
    for i, row in enumerate(rows):
        if row[5] is not None:
            weight[i] = _stacked([row[5]], "<u2", width, 0)[0, ids]
    return Pieces(start, mean, low, high, weight)


def _stacked(blobs: list[bytes], dtype: str, width: int, filler: float) -> np.ndarray:
    """Rows (n, width) out of blobs; rows from before there were so many columns are filled up."""
    size = np.dtype(dtype).itemsize * width
    if all(len(blob) == size for blob in blobs):
        return np.frombuffer(b"".join(blobs), dtype=dtype).reshape(len(blobs), width)
    table = np.full((len(blobs), width), filler, dtype=dtype)
    for row, blob in zip(table, blobs, strict=True):
        values = np.frombuffer(blob, dtype=dtype)
        row[: len(values)] = values  # more than there are columns: ValueError, the file is damaged
    return table


def _joined(parts: list[Pieces], width: int, dtype: str) -> Pieces:
    if not parts:
        nothing = np.empty((0, width), dtype=dtype)
        return Pieces(np.empty(0, np.int64), nothing, nothing, nothing, np.empty((0, width), np.int64))
    if len(parts) == 1:
        return parts[0]
    return Pieces(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("start", "mean", "low", "high", "weight")
        )
    )
