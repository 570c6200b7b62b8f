"""Ranges of steps as cells: which roll-up serves a range, and cells made of its windows.

A cell holds the steps from k·stride to (k+1)·stride − 1 for every k, so cells do not move when a range does.
Where the run's end has no closed window of a level yet, the levels below and the rows themselves fill in.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clinometer.record.format.columns import statistics_of
from clinometer.record.format.rollups import ABSENT_NUMBER
from clinometer.record.format.schema import ABSENT, LEVELS, rollup_key

MOST_BYTES = 24 << 20
"""What one answer may read: a wider range is then seen in fewer, coarser cells."""
_MOST_FILLED = 64 << 20
"""Bytes for columns that rows do not have: more than eight times what they have is no run's that grew."""


@dataclass
class Pieces:
    """Windows or rows, oldest first: n of them with W columns. `rows` (n,) counts each one's steps.

    `counts` (n, W) counts each cell's values where that is neither all of its rows nor, for NaN, none.
    """

    start: np.ndarray
    rows: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    counts: np.ndarray | None = None
    ends: bool = True
    """False: only the means were asked for; `low` and `high` are them."""

    def combined(self, stride: int) -> Pieces:
        """One piece for each cell that has any."""
        if not len(self.start):
            return self
        cell = self.start // stride
        begins = np.flatnonzero(np.concatenate([[True], cell[1:] != cell[:-1]]))
        if len(begins) == len(cell):
            return self
        rows, mean, counts = self._means(begins)
        if not self.ends:
            return Pieces(self.start[begins], rows, mean, mean, mean, counts, ends=False)
        low, high = _reduce(np.fmin, self.low, begins), _reduce(np.fmax, self.high, begins)
        return Pieces(self.start[begins], rows, mean, low, high, counts)

    def weights(self) -> np.ndarray:
        """How many values each cell has, (n, W), in the values' own dtype: exact, for they are few."""
        if self.counts is not None:
            return self.counts
        dtype = self.mean.dtype
        return np.where(np.isnan(self.mean), dtype.type(0), self.rows[:, None].astype(dtype))

    def _means(self, begins: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        rows = np.add.reduceat(self.rows, begins)
        if self.counts is None and not np.isnan(self.mean).any():
            values = self.mean
            if (self.rows != self.rows[0]).any():
                values = values * self.rows[:, None].astype(values.dtype)
            else:
                rows = rows // self.rows[0]
            mean = _reduce(np.add, values, begins) / rows[:, None].astype(values.dtype)
            return np.add.reduceat(self.rows, begins), mean, None
        weights = self.weights()
        count = _reduce(np.add, weights, begins)
        with np.errstate(all="ignore"):
            weighted = np.where(weights > 0, self.mean * weights, self.mean.dtype.type(0))
            mean = _reduce(np.add, weighted, begins) / count
        return rows, mean, count


def _reduce(ufunc: np.ufunc, values: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """`ufunc.reduceat(values, begins, axis=0)`, several times faster where the groups are of one size."""
    sizes = np.diff(begins)
    if len(sizes) < 3 or (sizes[1:] != sizes[1]).any():
        return ufunc.reduceat(values, begins, axis=0)
    inner = values[begins[1] : begins[-1]].reshape(len(sizes) - 1, sizes[1], *values.shape[1:])
    ends = (values[: begins[1]], values[begins[-1] :])
    first, last = (ufunc.reduce(part, axis=0)[None] for part in ends)
    return np.concatenate([first, ufunc.reduce(inner, axis=1), last])


def plan(
    first: int, last: int, points: int, *, every: int, row_bytes: int, window_bytes: int
) -> tuple[int, int]:
    """The level to read (1: the rows) and the stride of the cells, for at most about `points` cells.

    A stride just under a level becomes that level: at most a quarter fewer cells, for a sixteenth of the
    reading.
    """
    span = last - first + 1
    wanted = max(1, every, -(-span // max(1, points)))
    levels = [1, *LEVELS]
    # Where every record has a cell of its own, it keeps it.
    most = wanted * 4 // 3 if wanted > every else wanted
    place = max(i for i, level in enumerate(levels) if level <= most)
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
    *,
    first: int,
    last: int,
    ids: Sequence[int],
    width: int,
    ends: bool = True,
) -> list[Pieces]:
    """For each statistic in `wanted`, its pieces for the tensors `ids`; `width` tensors are known in all.

    Without `ends` only means are read, and `low` and `high` are them.
    """
    cut = _Cut(ids, width)
    found: list[list[Pieces]] = [[] for _ in wanted]
    for size in [size for size in reversed(LEVELS) if size <= level]:
        begin = first
        for pieces, statistic in zip(found, wanted, strict=True):
            if piece := _windows(connection, size, statistic, cut, first=first, last=last, ends=ends):
                pieces.append(piece)
                begin = int(piece.start[-1]) + size
        first = begin
    size = len(statistics_of(connection))
    rows = connection.execute(
        f"SELECT step, {cut.sql('statistics', size)} FROM steps WHERE step BETWEEN ? AND ?", (first, last)
    ).fetchall()
    if rows:
        start = np.array([row[0] for row in rows], dtype=np.int64)
        table = stacked([row[1] for row in rows], "<f4", cut.width * size, np.nan)
        table = table.reshape(len(rows), cut.width, size)
        for parts, statistic in zip(found, wanted, strict=True):
            values = np.ascontiguousarray(table[:, cut.columns, statistic])
            parts.append(Pieces(start, np.ones(len(rows), np.int64), values, values, values, ends=ends))
    return [_joined(parts, len(ids), "<f4") for parts in found]


class _Cut:
    """The columns of some tensors in blobs of all: one stretch is read, if that saves much."""

    def __init__(self, ids: Sequence[int], width: int) -> None:
        low, high = (min(ids), max(ids) + 1) if len(ids) else (0, 0)
        self.partly = 0 < 4 * (high - low) < width
        self.low = low if self.partly else 0
        self.width = high - low if self.partly else width
        columns = np.array(list(ids), dtype=np.int64) - self.low
        everything = len(columns) == self.width and (columns == np.arange(self.width)).all()
        self.columns: Any = slice(None) if everything else columns

    def sql(self, column: str, numbers: int = 1) -> str:
        """The column, or the bytes of it that are needed; `numbers` float32 a tensor."""
        size = 4 * numbers
        return f"substr({column}, {self.low * size + 1}, {self.width * size})" if self.partly else column


def _windows(
    connection: sqlite3.Connection,
    level: int,
    statistic: int,
    cut: _Cut,
    *,
    first: int,
    last: int,
    ends: bool,
) -> Pieces | None:
    """The closed windows of one level, or None if there are none."""

    def read(part: int, columns: str) -> list[tuple]:
        begin, end = rollup_key(statistic, part, first), rollup_key(statistic, part, last)
        return connection.execute(
            f"SELECT {columns}, {cut.sql('cells')} FROM rollup_{level} WHERE key BETWEEN ? AND ?",
            (begin, end),
        ).fetchall()

    def table(rows: list[tuple]) -> np.ndarray:
        return stacked([row[-1] for row in rows], "<f4", cut.width, np.nan)[:, cut.columns]

    rows = read(0, "key, rows, counts")
    if not rows:
        return None
    start = np.array([row[0] for row in rows], dtype=np.int64) - rollup_key(statistic, 0, 0)
    mean = table(rows)
    low, high = (table(read(part, "key")) for part in (1, 2)) if ends else (mean, mean)
    pieces = Pieces(start, np.array([row[1] for row in rows], dtype=np.int64), mean, low, high, ends=ends)
    if any(row[2] is not None for row in rows):
        pieces.counts = pieces.weights()
        for i, row in enumerate(rows):
            if row[2] is not None:
                counts = np.frombuffer(row[2], "<u2")[cut.low :][: cut.width]
                pieces.counts[i] = _padded(counts, cut.width)[cut.columns]
    return pieces


def _padded(counts: np.ndarray, width: int) -> np.ndarray:
    return np.concatenate([counts, np.zeros(width - len(counts), counts.dtype)])


def scalars(
    connection: sqlite3.Connection, ids: np.ndarray, level: int, first: int, last: int, *, width: int
) -> Pieces:
    """The pieces of the scalars `ids` and, as the last column, the time of each piece's first step."""
    found = []
    for size in [size for size in reversed(LEVELS) if size <= level]:
        rows = connection.execute(
            f"SELECT start, rows, time, cells FROM scalar_rollup_{size} WHERE start BETWEEN ? AND ?",
            (first, last),
        ).fetchall()
        if rows:
            table = stacked([row[3] for row in rows], "<f8", width * 4, np.nan).reshape(-1, width, 4)[:, ids]
            mean, low, high, counts = np.moveaxis(table, -1, 0)
            found.append(_timed(rows, [row[1] for row in rows], mean, low, high, np.nan_to_num(counts)))
            first = int(rows[-1][0]) + size
    rows = connection.execute(
        "SELECT step, 0, time, scalars FROM steps WHERE step BETWEEN ? AND ?", (first, last)
    ).fetchall()
    if rows:
        values = stacked([row[3] for row in rows], "<f8", width, ABSENT_NUMBER)[:, ids]
        there = np.ascontiguousarray(values).view("<u8") != ABSENT
        found.append(_timed(rows, [1] * len(rows), values, values, values, there))
    return _joined(found, len(ids) + 1, "<f8")


def _timed(rows: list[tuple], count: list[int], *columns: np.ndarray) -> Pieces:
    start, steps = np.array([row[0] for row in rows], np.int64), np.array(count, np.int64)
    time = np.array([row[2] for row in rows], np.float64)[:, None]
    mean, low, high = (np.concatenate([part, time], axis=1) for part in columns[:3])
    counts = np.concatenate([columns[3].astype(np.float64), np.ones_like(time)], axis=1)
    return Pieces(start, steps, mean, low, high, counts)


def stacked(blobs: list[bytes], dtype: str, width: int, filler: float) -> np.ndarray:
    """Rows (n, width) out of blobs; rows from before there were so many columns are filled up."""
    size = np.dtype(dtype).itemsize * width
    if all(len(blob) == size for blob in blobs):
        return np.frombuffer(b"".join(blobs), dtype=dtype).reshape(len(blobs), width)
    if len(blobs) * size > max(_MOST_FILLED, 8 * sum(map(len, blobs))):
        raise ValueError(f"{len(blobs)} rows of {width} columns, nearly all of them empty")
    table = np.full((len(blobs), width), filler, dtype=dtype)
    for row, blob in zip(table, blobs, strict=True):
        values = np.frombuffer(blob, dtype=dtype)
        row[: len(values)] = values  # more than there are columns: ValueError, the file is damaged
    return table


def _joined(parts: list[Pieces], width: int, dtype: str) -> Pieces:
    if not parts:
        none, nothing = np.empty(0, np.int64), np.empty((0, width), dtype=dtype)
        return Pieces(none, none, nothing, nothing, nothing)
    if len(parts) == 1:
        return parts[0]
    start, rows, mean = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("start", "rows", "mean")
    )
    counts = None
    if any(part.counts is not None for part in parts):
        counts = np.concatenate([part.weights() for part in parts])
    if not parts[0].ends:
        return Pieces(start, rows, mean, mean, mean, counts, ends=False)
    low, high = (np.concatenate([getattr(part, name) for part in parts]) for name in ("low", "high"))
    return Pieces(start, rows, mean, low, high, counts)
