"""Closed windows in the file: writing them, taking them back, cutting them away."""

from __future__ import annotations

import sqlite3
from itertools import pairwise

import numpy as np

from clinometer.record.format.columns import statistics_of
from clinometer.record.format.rollups import Cells, Rollups, Window
from clinometer.record.format.schema import LAST_STEP, LEVELS, PARTS, rollup_key


def insert(connection: sqlite3.Connection, window: Window) -> None:
    """A row for each part of each statistic, and one row for all scalars."""
    tensors, scalars = window.tensors, window.scalars
    implied = np.where(np.isnan(tensors.mean), 0, window.rows)
    as_implied = (tensors.counts == implied).all(axis=0)
    parts = [np.ascontiguousarray(part.T) for part in (tensors.mean, tensors.low, tensors.high)]
    rows = []
    for statistic in range(tensors.mean.shape[1]):
        counts = None if as_implied[statistic] else tensors.counts[:, statistic].astype("<u2").tobytes()
        for part, cells in enumerate(parts):
            key = rollup_key(statistic, part, window.start)
            rows.append((key, window.rows, cells[statistic], None if part else counts))
    connection.executemany(f"INSERT INTO rollup_{window.level} VALUES (?, ?, ?, ?)", rows)
    cells = np.stack([scalars.mean, scalars.low, scalars.high, scalars.counts], axis=1)
    connection.execute(
        f"INSERT INTO scalar_rollup_{window.level} VALUES (?, ?, ?, ?)",
        (window.start, window.rows, window.time, cells.astype("<f8").tobytes()),
    )


def counts_of(mean: np.ndarray, rows: int, counts: bytes | None) -> np.ndarray:
    """How many values each cell has; not stored where that is all of the window's rows, or none."""
    if counts is not None:
        return np.frombuffer(counts, dtype="<u2").astype(np.int64)
    return np.where(np.isnan(mean), 0, rows)


def load(connection: sqlite3.Connection, level: int, start: int) -> list[Window]:
    """The windows of a level that begin at `start` or later, oldest first."""
    windows, width = [], len(statistics_of(connection))
    for begin, rows, time, raw in connection.execute(
        f"SELECT start, rows, time, cells FROM scalar_rollup_{level} WHERE start >= ? ORDER BY start",
        (start,),
    ).fetchall():
        cells = np.frombuffer(raw, dtype="<f8").reshape(-1, 4)
        columns = [_load_statistic(connection, level, s, begin) for s in range(width)]
        mean, low, high, counts = (np.stack(part, axis=1) for part in zip(*columns, strict=True))
        scalars = Cells(cells[:, 0], cells[:, 1], cells[:, 2], cells[:, 3].astype(np.int64))
        windows.append(Window(level, begin, rows, time, Cells(mean, low, high, counts), scalars))
    return windows


def _load_statistic(
    connection: sqlite3.Connection, level: int, statistic: int, start: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    found = [
        connection.execute(
            f"SELECT rows, cells, counts FROM rollup_{level} WHERE key = ?",
            (rollup_key(statistic, part, start),),
        ).fetchone()
        for part in range(len(PARTS))
    ]
    mean, low, high = (np.frombuffer(cells, dtype="<f4") for _, cells, _ in found)
    rows, _, counts = found[0]
    return mean, low, high, counts_of(mean, rows, counts)


def delete_from(connection: sqlite3.Connection, last_step: int | None) -> None:
    """Remove the windows that `last_step`, now the last one, leaves open; all of them if there is no step."""
    width = len(statistics_of(connection))
    for level in LEVELS:
        start = 0 if last_step is None else last_step // level * level
        connection.execute(f"DELETE FROM scalar_rollup_{level} WHERE start >= ?", (start,))
        for statistic in range(width):
            for part in range(len(PARTS)):
                connection.execute(
                    f"DELETE FROM rollup_{level} WHERE key BETWEEN ? AND ?",
                    (rollup_key(statistic, part, start), rollup_key(statistic, part, LAST_STEP)),
                )


def reopen(connection: sqlite3.Connection, last_step: int | None) -> Rollups:
    """The open windows after `last_step`, from the file alone."""
    rollups = Rollups()
    if last_step is None:
        return rollups
    rollups.restore(
        [load(connection, level, last_step // parent * parent) for level, parent in pairwise(LEVELS)]
    )
    width = len(statistics_of(connection))
    rows = connection.execute(
        "SELECT step, time, scalars, statistics FROM steps WHERE step >= ? ORDER BY step",
        (last_step // LEVELS[0] * LEVELS[0],),
    )
    for step, time, scalars, statistics in rows.fetchall():
        rollups.add(
            step,
            time,
            np.frombuffer(scalars, dtype="<f8"),
            np.frombuffer(statistics, dtype="<f4").reshape(-1, width),
        )
    return rollups
