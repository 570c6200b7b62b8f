"""The statistics that a run file has, by name: a file keeps those of the version that began it."""

from __future__ import annotations

import sqlite3

import numpy as np

from clinometer.foreign_files import parse_json
from clinometer.vocabulary import DERIVED, STATISTICS

_MOST = 256
"""Statistics in one file, whatever it claims."""


def statistics_of(connection: sqlite3.Connection) -> tuple[str, ...]:
    """The names of the numbers in a row of `steps.statistics`, in their order (meta.statistics)."""
    row = connection.execute("SELECT value FROM meta WHERE key = 'statistics'").fetchone()
    names = parse_json(row[0]) if row else None
    if not isinstance(names, list) or not 0 < len(names) <= _MOST:
        return STATISTICS
    return tuple(map(str, names))


def derived_statistics(stored: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The derived statistics that can be computed from the `stored` ones, with their operands."""
    return {name: operands for name, operands in DERIVED.items() if set(operands) <= set(stored)}


def arrange_columns(rows: np.ndarray, columns: tuple[str, ...]) -> np.ndarray:
    """Rows (T, len(STATISTICS)) of this version as rows (T, len(columns)); NaN for an unknown statistic."""
    if columns == STATISTICS:
        return rows
    found = np.full((len(rows), len(columns)), np.nan, dtype=rows.dtype)
    for column, name in enumerate(columns):
        if name in STATISTICS:
            found[:, column] = rows[:, STATISTICS.index(name)]
    return found
