"""The reader of run files: opens without writing, answers in bounded time and size, never holds a writer up."""

from __future__ import annotations

import functools
import json
import os
import sqlite3
import struct
import time as clock
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import RLock
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np

from clinometer.messages import InputError
from clinometer.record import cells, histograms, state
from clinometer.record.derived import DERIVED, STORED_FOR, derive
from clinometer.record.find import find_runs as find_runs
from clinometer.record.opening import damaged, open_for_reading
from clinometer.record.schema import (
    FILE_NAME,
    HISTOGRAM_KINDS,
    LAST_STEP,
    LOW_EXPONENT,
    STATISTICS,
    WEIGHT_FIELDS,
)

_LONGEST_READ = 20.0
"""Seconds after which a query is given up: only a damaged or a hostile file takes so long."""

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _reading(method: Callable[Concatenate[RunFile, _P], _R]) -> Callable[Concatenate[RunFile, _P], _R]:
    """One method is one short read transaction; whatever a damaged file makes of it is an `InputError`."""

    @functools.wraps(method)
    def read(self: RunFile, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        with self._guard:
            self._follow()
            self._deadline = clock.monotonic() + _LONGEST_READ
            try:
                self._connection.execute("BEGIN")
                try:
                    return method(self, *args, **kwargs)
                finally:
                    if self._connection.in_transaction:
                        self._connection.execute("COMMIT")
            except InputError:
                raise
            except (
                sqlite3.Error,
                ValueError,
                TypeError,
                LookupError,
                OverflowError,
                MemoryError,
                RecursionError,
                struct.error,
                zlib.error,
            ) as error:
                raise damaged(self.path, error) from error

    return read


class RunFile:
    """What a run has recorded. Safe to use from several threads; follows a file that grows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / FILE_NAME
        self._guard = RLock()
        self._deadline = 0.0
        self._open()
        self.id: str = self._meta().get("id", "")

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> RunFile:
        """The run in `folder`. Raises `InputError`: none there, no run file, a newer schema, damaged."""
        return cls(Path(folder))

    def close(self) -> None:
        with self._guard:
            self._connection.close()
            self._inode = None

    @_reading
    def version(self) -> tuple[Any, ...]:
        """Changes when there is something new to read, or when the run's state does."""
        query = self._connection.execute
        (change,) = query("PRAGMA data_version").fetchone()
        return (
            self._inode,
            change,
            query("SELECT max(step) FROM steps").fetchone()[0],
            query("SELECT max(id) FROM events").fetchone()[0],
            self._state(self._meta_values())[0],
        )

    @_reading
    def info(self) -> dict[str, Any]:
        """The run at a glance; see docs/en/run-file.md for each key."""
        query = self._connection.execute
        meta = self._meta_values()
        first, last, updated = self._ends()
        tensors, numel = query("SELECT count(*), coalesce(sum(numel), 0) FROM tensors").fetchone()
        (alerts,) = query("SELECT count(*) FROM alerts").fetchone()
        now, since = self._state(meta)
        return {
            "id": str(meta.get("id", "")),
            "name": str(meta.get("name") or self.folder.name),
            "state": now,
            "since": since,
            "started": meta.get("started"),
            "updated": updated,
            "first_step": first,
            "last_step": last,
            "every": _every(meta),
            "config": _dict(meta.get("config")),
            "environment": _dict(meta.get("environment")),
            "statistics": list(STATISTICS),
            "model": meta.get("model"),
            "optimizers": meta.get("optimizers") or [],
            "numel": numel,
            "tensor_count": tensors,
            "alert_count": alerts,
            "replayable": state.is_replayable(self.folder),
        }

    @_reading
    def tensors(self) -> list[dict[str, Any]]:
        return [
            {
                "id": number,
                "name": name,
                "shape": json.loads(shape),
                "dtype": dtype,
                "numel": numel,
                "group": group,
                "layer": layer,
                "kind": kind,
                "position": position,
            }
            for number, name, shape, dtype, numel, group, layer, kind, position, _ in self._connection.execute(
                "SELECT * FROM tensors ORDER BY id"
            ).fetchall()
        ]

    @_reading
    def scalar_names(self) -> list[str]:
        return list(self._scalar_ids())

    @_reading
    def scalars(
        self, names: Sequence[str], first: int | None = None, last: int | None = None, points: int = 1000
    ) -> dict[str, Any]:
        """Curves of scalars, and of "time" (unix seconds of a cell's first step), over a range of steps.

        {"step": int64 (n,), "stride": int, name: {"mean", "min", "max"}: float64 (n,)}; stride 1 means one row
        of the run each, and then the three are the same. A step without a value is NaN; a mean is NaN too
        where a logged value was. Raises `InputError` for a name that was never logged.
        """
        known = self._scalar_ids()
        for name in names:
            if name not in known and name != "time":
                raise InputError("record.no_scalar", name=name, known=", ".join(known) or "-")
        ids = np.array([known[name] for name in names if name != "time"], dtype=np.int64)
        first, last, every = self._range(first, last)
        level, stride = cells.plan(
            first, last, points, every=every, row_bytes=1024, window_bytes=32 * len(known) + 64
        )
        found = cells.scalars(
            self._connection, ids, level, first // stride * stride, _end(last, stride), len(known)
        ).combined(stride)
        out: dict[str, Any] = {"step": _first_steps(found.start, stride, first), "stride": stride}
        columns = iter(range(len(ids)))
        for name in names:
            column = -1 if name == "time" else next(columns)
            mean = np.where(found.weight[:, column] > 0, found.mean[:, column], np.nan)
            low, high = found.low[:, column], found.high[:, column]
            # Cut from their table, so that they do not keep the whole of it in memory.
            out[name] = {"mean": mean, "min": low.copy(), "max": high.copy()}
        if "time" in names and len(found.start):
            out["time"] = dict.fromkeys(("mean", "min", "max"), out["time"]["min"])
        return out

    @_reading
    def series(
        self,
        ids: Sequence[int],
        statistic: str,
        first: int | None = None,
        last: int | None = None,
        points: int = 1000,
    ) -> dict[str, Any]:
        """One statistic of some tensors: "step" (n,), "stride", and "mean", "min", "max": float32 (len(ids), n).

        Besides the stored statistics: grad_rms, weight_rms, update_rms, moment_rms and update_ratio. Over
        several steps the last is the ratio of the means, and its ends are bounds. NaN: no gradient.
        """
        first, last, every = self._range(first, last)
        found, stride = self._statistic(statistic, ids, first, last, points, every)
        return {
            "step": _first_steps(found.start, stride, first),
            "stride": stride,
            "mean": np.ascontiguousarray(found.mean.T),
            "min": np.ascontiguousarray(found.low.T),
            "max": np.ascontiguousarray(found.high.T),
        }

    @_reading
    def grid(
        self,
        statistic: str,
        first: int | None = None,
        last: int | None = None,
        columns: int = 1280,
        ids: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        """A map: "step" (C,) the first step of each column, "stride", and "values" float32 (T, C), cell means.

        The columns are evenly spaced; NaN where no step was recorded or the tensor had no gradient.
        """
        first, last, every = self._range(first, last)
        chosen = range(self._width()) if ids is None else ids
        found, stride = self._statistic(statistic, chosen, first, last, columns, every)
        begin = first // stride
        count = 0 if last < first else last // stride - begin + 1
        values = np.full((found.mean.shape[1], count), np.nan, dtype=np.float32)
        values[:, found.start // stride - begin] = found.mean.T
        steps = np.maximum((begin + np.arange(count, dtype=np.int64)) * stride, first)
        return {"step": steps, "stride": stride, "values": values}

    @_reading
    def row(self, step: int) -> dict[str, Any] | None:
        """Everything of one step, or None: "step", "time", "scalars", "statistics" (T, 8) float32."""
        found = self._connection.execute(
            "SELECT time, scalars, statistics FROM steps WHERE step = ?", (_bounded(step),)
        ).fetchone()
        if found is None:
            return None
        numbers = np.frombuffer(found[1], dtype="<f8")
        there = numbers.view("<u8") != cells.ABSENT
        names = list(self._scalar_ids())
        statistics = np.frombuffer(found[2], dtype="<f4").reshape(-1, len(STATISTICS)).copy()
        scalars = {names[i]: float(numbers[i]) for i in np.flatnonzero(there)}
        return {"step": step, "time": found[0], "scalars": scalars, "statistics": statistics}

    @_reading
    def histograms(
        self,
        tensor_id: int,
        kind: str,
        first: int | None = None,
        last: int | None = None,
        count: int = 64,
    ) -> dict[str, Any]:
        """At most `count` histograms of one tensor, evenly chosen: "step" (n,), "counts" int64 (n, 64).

        Bucket k counts the entries with floor(log2 |x|) = k + low_exponent; bucket 0 exact zeros, 63 what is
        larger or not finite.
        """
        if kind not in HISTOGRAM_KINDS:
            raise InputError("record.no_kind", kind=kind, known=", ".join(HISTOGRAM_KINDS))
        self._chosen([tensor_id])
        first, last, _ = self._range(first, last)
        steps = [
            step
            for (step,) in self._connection.execute(
                "SELECT step FROM histograms WHERE step BETWEEN ? AND ? ORDER BY step", (first, last)
            ).fetchall()
        ]
        if len(steps) > count:
            steps = [steps[i] for i in np.linspace(0, len(steps) - 1, max(1, count)).round().astype(int)]
        out = np.zeros((len(steps), histograms.BUCKETS), dtype=np.int64)
        for place, step in enumerate(steps):
            (blob,) = self._connection.execute(
                "SELECT counts FROM histograms WHERE step = ?", (step,)
            ).fetchone()
            out[place] = histograms.decode(blob, tensor_id)[HISTOGRAM_KINDS.index(kind)]
        return {"step": np.array(steps, dtype=np.int64), "counts": out, "low_exponent": LOW_EXPONENT}

    @_reading
    def alerts(
        self, first: int | None = None, last: int | None = None, limit: int = 1000
    ) -> list[dict[str, Any]]:
        """Alerts that touch a range of steps, the oldest first, as the watch reported them."""
        rows = self._connection.execute(
            "SELECT data, until FROM alerts WHERE step <= ? AND (until IS NULL OR until >= ?) ORDER BY id LIMIT ?",
            (_bounded(last), 0 if first is None else _bounded(first), limit),
        )
        return [{**json.loads(data), "until": until} for data, until in rows.fetchall()]

    @_reading
    def events(
        self,
        kind: str | None = None,
        first: int | None = None,
        last: int | None = None,
        limit: int = 1000,
        newest: bool = False,
    ) -> list[dict[str, Any]]:
        """Events in a range of steps, the oldest first; `newest`: the newest first."""
        order = "DESC" if newest else "ASC"
        where, values = ("kind = ? AND ", [kind]) if kind is not None else ("", [])
        rows = self._connection.execute(
            f"SELECT id, step, time, kind, data FROM events WHERE {where}step BETWEEN ? AND ?"
            f" ORDER BY step {order}, id {order} LIMIT ?",
            (*values, 0 if first is None else _bounded(first), _bounded(last), limit),
        )
        names = ("id", "step", "time", "kind")
        return [dict(zip(names, row, strict=False)) | {"data": json.loads(row[4])} for row in rows.fetchall()]

    @_reading
    def pinned(self) -> list[dict[str, Any]]:
        rows = self._connection.execute("SELECT tensor, position FROM pins ORDER BY id").fetchall()
        return [{"tensor": tensor, "index": json.loads(position)} for tensor, position in rows]

    @_reading
    def weight(
        self,
        tensor_id: int,
        index: Sequence[int],
        first: int | None = None,
        last: int | None = None,
        points: int = 1000,
    ) -> dict[str, Any]:
        """A pinned weight's steps as they were: "step" (n,) and a float64 (n,) for each of its numbers.

        More than `points` steps are not averaged; one of each cell is taken. Empty if it is not pinned.
        """
        pin = self._connection.execute(
            "SELECT id FROM pins WHERE tensor = ? AND position = ?",
            (tensor_id, json.dumps([int(i) for i in index])),
        ).fetchone()
        first, last, every = self._range(first, last)
        stride = max(every, -(-(last - first + 1) // max(1, points)))
        steps, blobs = [], []
        if pin is not None and last >= first:
            query = "SELECT step, numbers FROM weights WHERE pin = ? AND step BETWEEN ? AND ? ORDER BY step"
            if stride <= every:
                rows = self._connection.execute(query, (*pin, first, last)).fetchall()
            else:
                seek, rows, at = f"{query} LIMIT 1", [], first
                while (row := self._connection.execute(seek, (*pin, at, last)).fetchone()) is not None:
                    rows.append(row)
                    at = max(at + stride, row[0] + 1)
            steps, blobs = [row[0] for row in rows], [row[1] for row in rows]
        table = np.frombuffer(b"".join(blobs), dtype="<f8").reshape(len(steps), len(WEIGHT_FIELDS))
        columns = {field: table[:, i].copy() for i, field in enumerate(WEIGHT_FIELDS)}
        return {"step": np.array(steps, dtype=np.int64), **columns}

    def _statistic(
        self, statistic: str, ids: Sequence[int], first: int, last: int, points: int, every: int
    ) -> tuple[cells.Pieces, int]:
        if statistic not in STORED_FOR:
            raise InputError("record.no_statistic", name=statistic, known=", ".join(STORED_FOR))
        chosen, width = self._chosen(ids), self._width()
        level, stride = cells.plan(
            first, last, points, every=every, row_bytes=32 * width + 512, window_bytes=12 * width + 64
        )
        begin, end = first // stride * stride, _end(last, stride)
        wanted = [STATISTICS.index(name) for name in STORED_FOR[statistic]]
        parts = cells.statistics(self._connection, wanted, level, begin, end, chosen, width)
        if statistic in DERIVED:
            numel = dict(self._connection.execute("SELECT id, numel FROM tensors").fetchall())
            return derive(statistic, parts, np.array([numel[i] for i in chosen])).combined(stride), stride
        return parts[0].combined(stride), stride

    def _chosen(self, ids: Sequence[int]) -> np.ndarray:
        width = self._width()
        for number in ids:
            if not 0 <= number < width:
                raise InputError("record.no_tensor", number=number, count=width)
        return np.array(list(ids), dtype=np.int64)

    def _range(self, first: int | None, last: int | None) -> tuple[int, int, int]:
        """The range of steps that a question means, within what there is, and the run's `every`."""
        lowest, highest, _ = self._ends()
        every = _every(self._meta_values())
        if lowest is None or highest is None:
            return 0, -1, every
        return (
            lowest if first is None else max(lowest, first),
            highest if last is None else min(highest, last),
            every,
        )

    def _ends(self) -> tuple[int | None, int | None, float | None]:
        query = self._connection.execute
        (first,) = query("SELECT min(step) FROM steps").fetchone()
        newest = query("SELECT step, time FROM steps ORDER BY step DESC LIMIT 1").fetchone()
        return (first, *(newest or (None, None)))

    def _width(self) -> int:
        return self._connection.execute("SELECT count(*) FROM tensors").fetchone()[0]

    def _scalar_ids(self) -> dict[str, int]:
        return dict(self._connection.execute("SELECT name, id FROM scalar_names ORDER BY id").fetchall())

    @_reading
    def _meta(self) -> dict[str, Any]:
        return self._meta_values()

    def _meta_values(self) -> dict[str, Any]:
        rows = self._connection.execute("SELECT key, value FROM meta").fetchall()
        return {key: json.loads(value) for key, value in rows}

    def _state(self, meta: dict[str, Any]) -> tuple[str, float | None]:
        recent = self._connection.execute(
            "SELECT step, time FROM steps ORDER BY step DESC LIMIT 20"
        ).fetchall()
        return state.state_of(meta, [time for _, time in recent], clock.time())

    def _open(self) -> None:
        self._connection = open_for_reading(self.path)
        self._connection.set_progress_handler(lambda: clock.monotonic() > self._deadline, 100_000)
        found = os.stat(self.path)
        self._inode: tuple[int, int] | None = (found.st_dev, found.st_ino)

    def _follow(self) -> None:
        """Open the file again if another one lies at the path now: a run that was started over."""
        try:
            found = os.stat(self.path)
        except OSError as error:
            raise InputError("record.cannot_open", path=self.path, reason=error.strerror) from None
        if (found.st_dev, found.st_ino) != self._inode:
            self._connection.close()
            self._open()


def _first_steps(start: np.ndarray, stride: int, first: int) -> np.ndarray:
    return np.maximum(start // stride * stride, first) if stride > 1 else start


def _end(last: int, stride: int) -> int:
    return last // stride * stride + stride - 1


def _bounded(step: int | None) -> int:
    return LAST_STEP if step is None else max(-1, min(int(step), LAST_STEP))


def _every(meta: dict[str, Any]) -> int:
    every = meta.get("every")
    return every if isinstance(every, int) and every > 0 else 1


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
