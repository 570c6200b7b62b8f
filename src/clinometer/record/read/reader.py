"""The reader of run files: opens without writing, answers within bounds, never blocks a writer."""

from __future__ import annotations

import functools
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

from clinometer.foreign_files import parse_json
from clinometer.messages import InputError
from clinometer.record.format.columns import derived_statistics, statistics_of
from clinometer.record.format.open_run import damaged, open_for_reading
from clinometer.record.format.schema import ABSENT, FILE_NAME
from clinometer.record.read import curves, run_state
from clinometer.record.read.curves import bounded
from clinometer.record.read.find_runs import find_runs as find_runs

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
        statistics = statistics_of(self._connection)
        return {
            "id": str(meta.get("id", "")),
            "name": str(meta.get("name") or self.folder.name),
            "state": now,
            "since": since,
            "started": meta.get("started"),
            "updated": updated,
            "first_step": first,
            "last_step": last,
            "every": curves.every_of(self._connection),
            "config": _dict(meta.get("config")),
            "environment": _dict(meta.get("environment")),
            "statistics": list(statistics),
            "derived": list(derived_statistics(statistics)),
            "model": meta.get("model"),
            "optimizers": meta.get("optimizers") or [],
            "numel": numel,
            "tensor_count": tensors,
            "alert_count": alerts,
            "replayable": run_state.is_replayable(self.folder),
        }

    @_reading
    def tensors(self) -> list[dict[str, Any]]:
        return [
            {
                "id": number,
                "name": name,
                "shape": parse_json(shape),
                "dtype": dtype,
                "numel": numel,
                "group": group,
                "layer": layer,
                "kind": kind,
                "position": position,
            }
            for number, name, shape, dtype, numel, group, layer, kind, position in self._connection.execute(
                "SELECT id, name, shape, dtype, numel, param_group, layer, kind, position"
                " FROM tensors ORDER BY id"
            ).fetchall()
        ]

    @_reading
    def scalar_names(self) -> list[str]:
        return list(curves.scalar_ids(self._connection))

    @_reading
    def scalars(
        self, names: Sequence[str], first: int | None = None, last: int | None = None, points: int = 1000
    ) -> dict[str, Any]:
        """Curves of scalars, and of "time" (unix seconds of a cell's first step), over a range of steps.

        {"step": int64 (n,), "stride": int, name: {"mean", "min", "max"}: float64 (n,)}; stride 1 means one
        row of the run each, and then the three are the same. A step without a value is NaN; a mean is NaN too
        where a logged value was, which "count", int64 (n,), tells apart: 0 where there was no value.
        Raises `InputError` for a name that was never logged.
        """
        return curves.scalars(self._connection, names, first, last, points)

    @_reading
    def first_not_finite(self, name: str) -> int | None:
        """The first step at which a scalar was logged as NaN or infinite; None if it never was."""
        return curves.first_not_finite(self._connection, name)

    @_reading
    def series(
        self,
        ids: Sequence[int],
        statistic: str,
        first: int | None = None,
        last: int | None = None,
        points: int = 1000,
    ) -> dict[str, Any]:
        """One statistic of some tensors: "step" (n,), "stride"; "mean", "min", "max": float32 (len(ids), n).

        The file's statistics and those derived from them: root mean squares (`grad_rms`, …), and ratios
        (`update_ratio`), which over several steps are ratios of means with bounds as ends. NaN: no gradient.
        """
        return curves.series(self._connection, ids, statistic, first, last, points=points)

    @_reading
    def grid(
        self,
        statistic: str,
        first: int | None = None,
        last: int | None = None,
        columns: int = 1280,
        ids: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        """A map: "step" (C,), each column's first step; "stride"; "values" float32 (T, C), the cells' means.

        The columns are evenly spaced; NaN where no step was recorded or the tensor had no gradient.
        """
        return curves.grid(self._connection, statistic, first, last, columns=columns, ids=ids)

    @_reading
    def row(self, step: int) -> dict[str, Any] | None:
        """Everything of one step, or None: "step", "time", "scalars", "statistics" float32 (T, S)."""
        found = self._connection.execute(
            "SELECT time, scalars, statistics FROM steps WHERE step = ?", (bounded(step),)
        ).fetchone()
        if found is None:
            return None
        numbers = np.frombuffer(found[1], dtype="<f8")
        there = numbers.view("<u8") != ABSENT
        names, width = list(curves.scalar_ids(self._connection)), len(statistics_of(self._connection))
        statistics = np.frombuffer(found[2], dtype="<f4").reshape(-1, width).copy()
        scalars = {names[i]: float(numbers[i]) for i in np.flatnonzero(there)}
        return {"step": step, "time": found[0], "scalars": scalars, "statistics": statistics}

    @_reading
    def rows(self, first: int | None = None, last: int | None = None, limit: int = 1000) -> dict[str, Any]:
        """The first `limit` steps of a range as they are, for exports: read on from the last step + 1.

        {"step", "time" (n,), "scalars": {name: (n,)}, "logged": {name: (n,) bool}, "statistics": (n, T, S)}
        """
        return curves.rows(self._connection, 0 if first is None else bounded(first), bounded(last), limit)

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
        return curves.histogram(self._connection, tensor_id, kind, first, last, count=count)

    @_reading
    def alerts(
        self, first: int | None = None, last: int | None = None, limit: int = 1000
    ) -> list[dict[str, Any]]:
        """The newest `limit` alerts that touch a range of steps, oldest first, as the watch reported them."""
        rows = self._connection.execute(
            "SELECT data, until FROM alerts WHERE step <= ? AND (until IS NULL OR until >= ?)"
            " ORDER BY id DESC LIMIT ?",
            (bounded(last), 0 if first is None else bounded(first), limit),
        )
        return [{**parse_json(data), "until": until} for data, until in reversed(rows.fetchall())]

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
            (*values, 0 if first is None else bounded(first), bounded(last), limit),
        )
        names = ("id", "step", "time", "kind")
        return [dict(zip(names, row, strict=False)) | {"data": parse_json(row[4])} for row in rows.fetchall()]

    @_reading
    def pinned(self) -> list[dict[str, Any]]:
        rows = self._connection.execute("SELECT tensor, position FROM pins ORDER BY id").fetchall()
        return [{"tensor": tensor, "index": parse_json(position)} for tensor, position in rows]

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
        return curves.weight(self._connection, tensor_id, index, first, last, points=points)

    def _ends(self) -> tuple[int | None, int | None, float | None]:
        query = self._connection.execute
        (first,) = query("SELECT min(step) FROM steps").fetchone()
        newest = query("SELECT step, time FROM steps ORDER BY step DESC LIMIT 1").fetchone()
        return (None, None, None) if newest is None else (first, newest[0], newest[1])

    @_reading
    def _meta(self) -> dict[str, Any]:
        return self._meta_values()

    def _meta_values(self) -> dict[str, Any]:
        rows = self._connection.execute("SELECT key, value FROM meta").fetchall()
        return {key: parse_json(value) for key, value in rows}

    def _state(self, meta: dict[str, Any]) -> tuple[str, float | None]:
        recent = self._connection.execute(
            "SELECT step, time FROM steps ORDER BY step DESC LIMIT 20"
        ).fetchall()
        return run_state.state_of(meta, [time for _, time in recent], clock.time())

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


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
