"""The answers of a reader about a range of steps: curves, maps, histograms, a weight's history."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from typing import Any

import numpy as np

from clinometer.foreign_files import parse_json
from clinometer.messages import InputError
from clinometer.record.format import cells, histogram_codec
from clinometer.record.format.columns import derived_statistics, statistics_of
from clinometer.record.format.derived_statistics import derive
from clinometer.record.format.rollups import ABSENT_NUMBER
from clinometer.record.format.schema import (
    ABSENT,
    LAST_STEP,
    LEVELS,
    WEIGHT_FIELDS,
)
from clinometer.vocabulary import BUCKETS, HISTOGRAM_KINDS, LOW_EXPONENT

_MOST_CELLS = 1 << 24
"""Of a map, whatever number of tensors a file names: 64 MB, and more than any screen has."""


class Range:
    """The steps of a query that the run has; `every`: steps from one record to the next."""

    def __init__(self, connection: sqlite3.Connection, first: int | None, last: int | None) -> None:
        (lowest,) = connection.execute("SELECT min(step) FROM steps").fetchone()
        (highest,) = connection.execute("SELECT max(step) FROM steps").fetchone()
        self.every = every_of(connection)
        self.first, self.last = 0, -1
        if lowest is not None:
            self.first = lowest if first is None else max(lowest, bounded(first))
            self.last = highest if last is None else min(highest, bounded(last))

    def cells(self, stride: int) -> tuple[int, int]:
        """First and last step of the cells that the range touches."""
        return self.first // stride * stride, self.last // stride * stride + stride - 1

    def first_steps(self, start: np.ndarray, stride: int) -> np.ndarray:
        return np.maximum(start // stride * stride, self.first) if stride > 1 else start


def bounded(step: int | None) -> int:
    """A step as a query takes it; None is the last that there can be."""
    return LAST_STEP if step is None else max(-1, min(int(step), LAST_STEP))


def every_of(connection: sqlite3.Connection) -> int:
    row = connection.execute("SELECT value FROM meta WHERE key = 'every'").fetchone()
    every = parse_json(row[0]) if row else 1
    return every if isinstance(every, int) and every > 0 else 1


def scalar_ids(connection: sqlite3.Connection) -> dict[str, int]:
    return dict(connection.execute("SELECT name, id FROM scalar_names ORDER BY id").fetchall())


def scalars(
    connection: sqlite3.Connection, names: Sequence[str], first: int | None, last: int | None, points: int
) -> dict[str, Any]:
    known = scalar_ids(connection)
    for name in names:
        if name not in known and name != "time":
            raise InputError("record.no_scalar", name=name, known=", ".join(known) or "-")
    logged = [name for name in names if name in known]
    steps = Range(connection, first, last)
    level, stride = cells.plan(
        steps.first,
        steps.last,
        points,
        every=steps.every,
        row_bytes=1024,
        window_bytes=32 * len(known) + 64,
    )
    ids = np.array([known[name] for name in logged], dtype=np.int64)
    found = cells.scalars(connection, ids, level, *steps.cells(stride), width=len(known)).combined(stride)
    counts = found.weights()
    there = counts > 0
    out: dict[str, Any] = {"step": steps.first_steps(found.start, stride), "stride": stride}
    if "time" in names and "time" not in known:
        # The time of a cell is that of its first step.
        out["time"] = dict.fromkeys(("mean", "min", "max"), found.low[:, -1].copy())
    for column, name in enumerate(logged):
        parts = {"mean": found.mean, "min": found.low, "max": found.high}
        out[name] = {key: np.where(there[:, column], part[:, column], np.nan) for key, part in parts.items()}
        out[name]["count"] = counts[:, column].astype(np.int64)
    return out


def first_not_finite(connection: sqlite3.Connection, name: str) -> int | None:
    """The first step at which a scalar was logged and not finite.

    A window's mean is not finite exactly if one of its values was not: the coarsest windows are asked first,
    and each level below only inside of the first that was not.
    """
    known = scalar_ids(connection)
    if name not in known:
        return None
    first, last = Range(connection, None, None).cells(LEVELS[-1])
    ids = np.array([known[name]], dtype=np.int64)
    for level in (*reversed(LEVELS), 1):
        found = cells.scalars(connection, ids, level, first, last, width=len(known))
        bad = np.flatnonzero((found.weights()[:, 0] > 0) & ~np.isfinite(found.mean[:, 0]))
        if not len(bad):
            return None
        at = int(bad[0])
        first = int(found.start[at])
        # The run's end may have come from finer windows already; they begin where they begin.
        last = int(found.start[at + 1]) - 1 if at + 1 < len(found.start) else last
    return first


def series(
    connection: sqlite3.Connection,
    ids: Sequence[int],
    statistic: str,
    first: int | None,
    last: int | None,
    *,
    points: int,
) -> dict[str, Any]:
    steps = Range(connection, first, last)
    found, stride = _statistic(connection, statistic, ids, steps, points, ends=True)
    return {
        "step": steps.first_steps(found.start, stride),
        "stride": stride,
        "mean": np.ascontiguousarray(found.mean.T),
        "min": np.ascontiguousarray(found.low.T),
        "max": np.ascontiguousarray(found.high.T),
    }


def grid(
    connection: sqlite3.Connection,
    statistic: str,
    first: int | None,
    last: int | None,
    *,
    columns: int,
    ids: Sequence[int] | None,
) -> dict[str, Any]:
    steps = Range(connection, first, last)
    chosen = range(width_of(connection)) if ids is None else ids
    columns = min(columns, max(1, _MOST_CELLS // max(1, len(chosen))))
    found, stride = _statistic(connection, statistic, chosen, steps, columns, ends=False)
    begin = steps.first // stride
    count = 0 if steps.last < steps.first else steps.last // stride - begin + 1
    places = found.start // stride - begin
    if len(places) == count:
        values = np.ascontiguousarray(found.mean.T)
    else:
        values = np.full((len(chosen), count), np.nan, dtype=np.float32)
        values[:, places] = found.mean.T
    starts = np.maximum((begin + np.arange(count, dtype=np.int64)) * stride, steps.first)
    return {"step": starts, "stride": stride, "values": values}


def histogram(
    connection: sqlite3.Connection,
    tensor: int,
    kind: str,
    first: int | None,
    last: int | None,
    *,
    count: int,
) -> dict[str, Any]:
    if kind not in HISTOGRAM_KINDS:
        raise InputError("record.no_kind", kind=kind, known=", ".join(HISTOGRAM_KINDS))
    known = _must_be_known(connection, [tensor])
    rows = connection.execute(
        "SELECT step FROM histograms WHERE step BETWEEN ? AND ? ORDER BY step",
        (0 if first is None else bounded(first), bounded(last)),
    ).fetchall()
    steps = [step for (step,) in rows]
    if len(steps) > count:
        steps = [steps[i] for i in np.linspace(0, len(steps) - 1, max(1, count)).round().astype(int)]
    out = np.zeros((len(steps), BUCKETS), dtype=np.int64)
    for place, step in enumerate(steps):
        (blob,) = connection.execute("SELECT counts FROM histograms WHERE step = ?", (step,)).fetchone()
        out[place] = histogram_codec.decode(blob, tensor, known)[HISTOGRAM_KINDS.index(kind)]
    return {"step": np.array(steps, dtype=np.int64), "counts": out, "low_exponent": LOW_EXPONENT}


def weight(
    connection: sqlite3.Connection,
    tensor: int,
    index: Sequence[int],
    first: int | None,
    last: int | None,
    *,
    points: int,
) -> dict[str, Any]:
    steps = Range(connection, first, last)
    pin = connection.execute(
        "SELECT id FROM pins WHERE tensor = ? AND position = ?", (tensor, json.dumps([int(i) for i in index]))
    ).fetchone()
    stride = max(steps.every, -(-(steps.last - steps.first + 1) // max(1, points)))
    rows: list[tuple[int, bytes]] = []
    query = "SELECT step, numbers FROM weights WHERE pin = ? AND step BETWEEN ? AND ? ORDER BY step"
    if pin is not None and stride <= steps.every:
        rows = connection.execute(query, (*pin, steps.first, steps.last)).fetchall()
    elif pin is not None:
        at = steps.first
        while row := connection.execute(f"{query} LIMIT 1", (*pin, at, steps.last)).fetchone():
            rows.append(row)
            at = max(at + stride, row[0] + 1)
    table = np.frombuffer(b"".join(row[1] for row in rows), dtype="<f8")
    table = table.reshape(len(rows), len(WEIGHT_FIELDS))
    columns = {field: table[:, i].copy() for i, field in enumerate(WEIGHT_FIELDS)}
    return {"step": np.array([row[0] for row in rows], dtype=np.int64), **columns}


def rows(connection: sqlite3.Connection, first: int, last: int, limit: int) -> dict[str, Any]:
    found = connection.execute(
        "SELECT step, time, scalars, statistics FROM steps WHERE step BETWEEN ? AND ? ORDER BY step LIMIT ?",
        (first, last, limit),
    ).fetchall()
    names, width = scalar_ids(connection), width_of(connection)
    columns = len(statistics_of(connection))
    numbers = cells.stacked([row[2] for row in found], "<f8", len(names), ABSENT_NUMBER)
    statistics = cells.stacked([row[3] for row in found], "<f4", width * columns, np.nan)
    return {
        "step": np.array([row[0] for row in found], dtype=np.int64),
        "time": np.array([row[1] for row in found], dtype=np.float64),
        "scalars": {name: numbers[:, column] for name, column in names.items()},
        "logged": {name: numbers.view("<u8")[:, column] != ABSENT for name, column in names.items()},
        "statistics": statistics.reshape(len(found), width, columns),
    }


def width_of(connection: sqlite3.Connection) -> int:
    return connection.execute("SELECT count(*) FROM tensors").fetchone()[0]


def _statistic(
    connection: sqlite3.Connection,
    statistic: str,
    ids: Sequence[int],
    steps: Range,
    points: int,
    *,
    ends: bool,
) -> tuple[cells.Pieces, int]:
    stored = statistics_of(connection)
    derived = derived_statistics(stored)
    if statistic not in stored and statistic not in derived:
        raise InputError("record.no_statistic", name=statistic, known=", ".join((*stored, *derived)))
    width = _must_be_known(connection, ids)
    level, stride = cells.plan(
        steps.first,
        steps.last,
        points,
        every=steps.every,
        row_bytes=4 * len(stored) * width + 512,
        window_bytes=12 * width + 64,
    )
    wanted = [stored.index(name) for name in derived.get(statistic, (statistic,))]
    begin, end = steps.cells(stride)
    parts = cells.statistics(
        connection, wanted, level, first=begin, last=end, ids=ids, width=width, ends=ends
    )
    found = parts[0]
    if statistic not in stored:
        numel = dict(connection.execute("SELECT id, numel FROM tensors").fetchall())
        found = derive(parts, np.array([numel[i] for i in ids]))
    return found.combined(stride), stride


def _must_be_known(connection: sqlite3.Connection, ids: Sequence[int]) -> int:
    width = width_of(connection)
    for number in ids:
        if not 0 <= number < width:
            raise InputError("record.no_tensor", number=number, count=width)
    return width
