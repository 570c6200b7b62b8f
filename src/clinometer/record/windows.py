"""Closed windows in the file: writing them, taking them back, cutting them away."""

from __future__ import annotations

import sqlite3

import numpy as np

from clinometer.record.rollups import Cells, Rollups, Window
from clinometer.record.schema import LEVELS, STATISTICS

SHIFT = 40


def insert(connection: sqlite3.Connection, window: Window) -> None:
    """A row a statistic, so that a map of one statistic reads an eighth of the bytes; one row for the scalars."""
    tensors, scalars = window.tensors, window.scalars
    implied = np.where(np.isnan(tensors.mean), 0, window.rows)
    connection.executemany(
        f"INSERT INTO rollup_{window.level} VALUES (?, ?, ?, ?, ?, ?)",
        [
            (
                statistic << SHIFT | window.start,
                window.rows,
                tensors.mean[:, statistic].tobytes(),
                tensors.low[:, statistic].tobytes(),
                tensors.high[:, statistic].tobytes(),
                None
                if np.array_equal(tensors.counts[:, statistic], implied[:, statistic])
                else tensors.counts[:, statistic].astype("<u2").tobytes(),
            )
            for statistic in range(len(STATISTICS))
        ],
    )
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
    windows = []
    for begin, rows, time, raw in connection.execute(
        f"SELECT start, rows, time, cells FROM scalar_rollup_{level} WHERE start >= ? ORDER BY start",
        (start,),
    ).fetchall():
        cells = np.frombuffer(raw, dtype="<f8").reshape(-1, 4)
        columns = [_load_statistic(connection, level, s, begin) for s in range(len(STATISTICS))]
        mean, low, high, counts = (np.stack(part, axis=1) for part in zip(*columns, strict=True))
        scalars = Cells(cells[:, 0], cells[:, 1], cells[:, 2], cells[:, 3].astype(np.int64))
        windows.append(Window(level, begin, rows, time, Cells(mean, low, high, counts), scalars))
    return windows


def _load_statistic(
    connection: sqlite3.Connection, level: int, statistic: int, start: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rows, mean, low, high, counts = connection.execute(
        f"SELECT rows, mean, low, high, counts FROM rollup_{level} WHERE key = ?",
        (statistic << SHIFT | start,),
    ).fetchone()
    means = np.frombuffer(mean, dtype="<f4")
    return means, np.frombuffer(low, "<f4"), np.frombuffer(high, "<f4"), counts_of(means, rows, counts)


def delete_from(connection: sqlite3.Connection, last_step: int | None) -> None:
    """Remove the windows that `last_step`, now the last one, leaves open; all of them if there is no step."""
    for level in LEVELS:
        start = 0 if last_step is None else last_step // level * level
        connection.execute(f"DELETE FROM scalar_rollup_{level} WHERE start >= ?", (start,))
        for s in range(len(STATISTICS)):
            connection.execute(
                f"DELETE FROM rollup_{level} WHERE key >= ? AND key < ?",
                (s << SHIFT | start, (s + 1) << SHIFT),
            )


def reopen(connection: sqlite3.Connection, last_step: int | None) -> Rollups:
    """The open windows after `last_step`, from the file alone."""
    rollups = Rollups()
    if last_step is None:
        return rollups
    rollups.restore(
        [
            load(connection, level, last_step // parent * parent)
            for level, parent in zip(LEVELS[:-1], LEVELS[1:], strict=True)
        ]
    )
    rows = connection.execute(
        "SELECT step, time, scalars, statistics FROM steps WHERE step >= ? ORDER BY step",
        (last_step // LEVELS[0] * LEVELS[0],),
    )
    for step, time, scalars, statistics in rows.fetchall():
        rollups.add(
            step,
            time,
            np.frombuffer(scalars, dtype="<f8"),
            np.frombuffer(statistics, dtype="<f4").reshape(-1, len(STATISTICS)),
        )
    return rollups
