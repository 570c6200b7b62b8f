"""The writer of a run file: each step is committed before the call returns; a training is never stopped."""

from __future__ import annotations

import math
import os
import sqlite3
import time as clock
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np

from clinometer.messages import InputError
from clinometer.record.format import histogram_codec, windows
from clinometer.record.format.columns import arrange_columns, statistics_of
from clinometer.record.format.plain_json import clean, to_json
from clinometer.record.format.process import this_process
from clinometer.record.format.rollups import ABSENT_NUMBER, Rollups
from clinometer.record.format.schema import LAST_STEP, WEIGHT_FIELDS
from clinometer.record.write.outage import Outage, warn
from clinometer.record.write.writer_file import WriterFile
from clinometer.vocabulary import STATISTICS

MOST_SCALARS = 1000
"""Names of scalars in one run; a program that invents a name a step would otherwise fill every row."""

_ABSENT = float(ABSENT_NUMBER)


class Recorder:
    """Writes RUN/run.sqlite; fits the Sink protocol of `clinometer.monitoring.watch`.

    A step costs one insert. A disk that is full, a file that is gone or cannot be written pauses the
    recording with one warning; it is tried again after 16 steps, then 32, and so on, and what is missing
    is an event of kind "gap". In a forked child (a DataLoader's worker) every call does nothing.
    """

    def __init__(self, folder: str | os.PathLike[str], continue_from: int | None = None) -> None:
        """Start a new run in `folder`, or go on after step `continue_from` and drop whatever came later.

        Raises `InputError`: the folder holds a run with steps and `continue_from` is None, another process
        writes it, it cannot be written, or what is there is no run file.
        """
        self.folder = Path(folder)
        self._pid = os.getpid()
        self._guard = RLock()
        self._closed = False
        self._warned: set[str] = set()
        self._outage: Outage | None = None
        self._known: list[dict[str, Any]] = []
        self._run: dict[str, Any] | None = None
        self._file = WriterFile(self.folder)
        self._file.open(continue_from)
        try:
            self._restore()
            (highest,) = self._file.execute("SELECT max(id) FROM alerts").fetchone()
            # A watch that starts again counts its alerts from 0 again; those of the first part keep theirs.
            self._first_alert = 0 if highest is None else highest + 1
        except BaseException:
            self._file.close()
            raise

    @property
    def id(self) -> str:
        """12 hexadecimal digits, made when the run began."""
        return self._file.id

    def begin(self, run: dict[str, Any]) -> None:
        """Store what is known of the run; a continued one keeps its name and when it started."""
        with self._writing() as allowed:
            if allowed:
                self._run = dict(run)
                self._write_run()

    def tensors(self, tensors: Sequence[dict[str, Any]]) -> None:
        """Name the rows of the statistics; called again when the list has grown.

        Raises `InputError` if a tensor that is recorded has another name now.
        """
        with self._writing() as allowed:
            if allowed:
                for old, new in zip(self._names, tensors, strict=False):
                    if clean(new["name"]) != old:
                        raise InputError("record.other_tensors", folder=self.folder, old=old, new=new["name"])
                self._known = [dict(tensor) for tensor in tensors]
                self._write_tensors()

    def step(self, step: int, time: float, scalars: Mapping[str, Any], statistics: np.ndarray) -> None:
        """Record one step: `scalars`, and float32 statistics, a row for each
        tensor in the order of `STATISTICS`. A step not after the last is left out.

        Raises `InputError` if `statistics` has another shape than the tensors that were named.
        """
        step = int(step)
        with self._writing(step) as allowed:
            if not allowed:
                return
            rows = np.ascontiguousarray(statistics, dtype="<f4")
            if rows.shape != (len(self._names), len(STATISTICS)):
                raise InputError(
                    "record.shape", found=rows.shape, wanted=(len(self._names), len(STATISTICS)), step=step
                )
            if not self._last < step <= LAST_STEP:
                self._warn_once("record.order", step=step, last=self._last)
                return
            rows = arrange_columns(rows, self._columns)
            numbers = self._numbers(step, scalars)
            closed = self._rollups.close_before(step)
            if closed:
                self._file.begin()
                for window in closed:
                    windows.insert(self._file.connection, window)
            # sqlite3 takes a bytearray as it is; for anything else it first looks for an adapter.
            values = (step, float(time), bytearray(numbers), bytearray(rows))
            self._file.connection.execute("INSERT INTO steps VALUES (?, ?, ?, ?)", values)
            if closed or self._file.connection.in_transaction:
                self._file.execute("COMMIT")
            self._rollups.add(step, time, numbers, rows)
            self._last = step
            self._file.keep_log_short()

    def histograms(self, step: int, counts: np.ndarray) -> None:
        """Record (T, 3, 64) counts; once there are 1024 steps of them the older ones are thinned."""
        with self._writing() as allowed:
            if not allowed:
                return
            ordinal = self._histograms
            self._file.begin()
            self._file.execute(
                "INSERT OR REPLACE INTO histograms VALUES (?, ?, ?)",
                (int(step), ordinal, histogram_codec.encode(counts)),
            )
            histogram_codec.thin(self._file.connection, ordinal + 1)
            self._file.execute("COMMIT")
            self._histograms += 1

    def alert(self, alert: dict[str, Any]) -> None:
        """Record an alert; the same id again replaces what was said before."""
        number = self._first_alert + int(alert["id"])
        values = (
            number,
            int(alert["step"]),
            None if alert.get("until") is None else int(alert["until"]),
            max(self._last, int(alert["step"])),
            clean(alert["cause"]),
            clean(alert["severity"]),
            to_json({**alert, "id": number}),
        )
        self._insert("INSERT OR REPLACE INTO alerts VALUES (?, ?, ?, ?, ?, ?, ?)", values)

    def weights(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        """Record what a step did to the pinned weights; numbers that an optimizer does not have are NaN."""
        with self._writing() as allowed:
            if not allowed:
                return
            self._file.begin()
            for row in rows:
                self._weight(int(step), row)
            self._file.execute("COMMIT")

    def event(self, step: int, time: float, kind: str, data: Mapping[str, Any]) -> None:
        """Record something that happened: a validation, a checkpoint, a sample, a report, a note."""
        self._insert(
            "INSERT INTO events (step, time, kind, data) VALUES (?, ?, ?, ?)",
            (int(step), float(time), clean(kind), to_json(data)),
        )

    def close(self, state: str | None = "done") -> None:
        """Write how the run ended ("done", "stopped" or "failed") and let go of the file; once is enough.

        None leaves the state as it is, to add an event to a run that has ended.
        """
        if self._outage is not None:
            self._outage.try_now()
        with self._writing() as allowed:
            if allowed and state is not None:
                self._put(state=state, since=clock.time())
        if os.getpid() == self._pid and not self._closed:
            self._closed = True
            self._file.close()

    @contextmanager
    def _writing(self, step: int | None = None) -> Iterator[bool]:
        """Whether to write now. What goes wrong with the file before or in the block starts an outage.

        Memory is taken from the file again after any exception: half of a step may have been done.
        """
        if os.getpid() != self._pid or self._closed:
            yield False
            return
        with self._guard:
            if not self._is_ready(step):
                yield False
                return
            try:
                self._stale = True
                yield True
                if self._file.connection.in_transaction:
                    self._file.execute("COMMIT")
                self._stale = False
                self._outage = None
            except (sqlite3.Error, OSError) as error:
                self._pause(step, error)
            except BaseException:
                self._file.roll_back()
                raise

    def _is_ready(self, step: int | None) -> bool:
        """Whether the file takes a write; in an outage, whether it is time to try it again and it does."""
        if self._outage is not None and not self._outage.is_due(step):
            return False
        try:
            if self._outage is not None:
                self._take_up_again(self._outage)
            self._file.must_be_there()
            if self._stale:
                self._restore()
        except (sqlite3.Error, OSError, InputError) as error:
            self._pause(step, error)
            return False
        return True

    def _pause(self, step: int | None, error: Exception) -> None:
        self._file.roll_back()
        if self._outage is not None:
            self._outage.failed_again(step)
            return
        self._outage = Outage(self._file.path, error)
        self._outage.missed(step)
        self._outage.announce(self._warned)

    def _insert(self, statement: str, values: tuple[Any, ...]) -> None:
        with self._writing() as allowed:
            if allowed:
                self._file.execute(statement, values)
        if self._outage is not None:
            self._outage.keep(statement, values)

    def _take_up_again(self, outage: Outage) -> None:
        """Write what was kept, and the gap, in one transaction with the write that is tried."""
        self._file.reopen()
        self._restore()
        self._file.begin()
        if self._run is not None:
            self._write_run()
        self._write_tensors()
        for statement, values in outage.kept:
            self._file.execute(statement, values)
        if outage.steps:
            self._file.execute(
                "INSERT INTO events (step, time, kind, data) VALUES (?, ?, 'gap', ?)",
                (outage.first, clock.time(), to_json(outage.gap())),
            )

    def _restore(self) -> None:
        """Take everything this object remembers from the file."""
        query = self._file.execute
        (last,) = query("SELECT max(step) FROM steps").fetchone()
        self._last: int = -1 if last is None else last
        self._columns = STATISTICS if last is None else statistics_of(self._file.connection)
        """The statistics that the file has."""
        self._names: list[str] = [
            name for (name,) in query("SELECT name FROM tensors ORDER BY id").fetchall()
        ]
        self._scalars: dict[str, int] = dict(query("SELECT name, id FROM scalar_names").fetchall())
        self._placed: tuple[tuple[str, ...], list[Any]] = (), []
        """The names of the last step's scalars, and the places of these names."""
        (self._histograms,) = query("SELECT coalesce(max(ordinal) + 1, 0) FROM histograms").fetchone()
        self._rollups: Rollups = windows.reopen(self._file.connection, last)
        self._stale = False

    def _numbers(self, step: int, scalars: Mapping[str, Any]) -> np.ndarray:
        """The scalars in the order of their names' ids; a new name is given the next id, with this step."""
        numbers = [_ABSENT] * len(self._scalars)
        names = tuple(scalars)
        if names == self._placed[0]:  # as in most steps
            found = [v if type(v) is float and v == v else _number(v) for v in scalars.values()]
            if None not in found:
                for place, number in zip(self._placed[1], found, strict=True):
                    numbers[place] = number
                return np.array(numbers, dtype="<f8")
        for name, value in scalars.items():
            number = _number(value)
            if number is None:
                continue
            place = self._scalars.get(name)
            if place is None:
                place = self._new_scalar(step, clean(name)[:200])
                if place is None:
                    continue
                numbers += [_ABSENT] * (len(self._scalars) - len(numbers))
            numbers[place] = number
        places = [self._scalars.get(name) for name in names]
        if None not in places:
            self._placed = names, places
        return np.array(numbers, dtype="<f8")

    def _weight(self, step: int, row: dict[str, Any]) -> None:
        pin = (int(row["tensor"]), to_json([int(i) for i in row["index"]]))
        numbers = [_number(row.get(field), absent=math.nan) for field in WEIGHT_FIELDS]
        self._file.execute(
            "INSERT OR IGNORE INTO pins (tensor, position, since) VALUES (?, ?, ?)", (*pin, step)
        )
        self._file.execute(
            "INSERT OR REPLACE INTO weights SELECT id, ?, ? FROM pins WHERE tensor = ? AND position = ?",
            (step, np.array(numbers, dtype="<f8"), *pin),
        )

    def _new_scalar(self, step: int, name: str) -> int | None:
        if name in self._scalars:
            return self._scalars[name]
        if len(self._scalars) >= MOST_SCALARS:
            self._warn_once("record.many_scalars", most=MOST_SCALARS, name=name)
            return None
        self._file.begin()
        place = len(self._scalars)
        self._file.execute("INSERT INTO scalar_names VALUES (?, ?, ?)", (place, name, step))
        self._scalars[name] = place
        return place

    def _write_run(self) -> None:
        run = {**(self._run or {}), "statistics": list(self._columns)}
        started = float(run.pop("started", None) or clock.time())
        self._put(keep=True, started=started, name=str(run.pop("name", None) or self.folder.name))
        self._put(**run, process=this_process(), state="live", since=clock.time())

    def _write_tensors(self) -> None:
        new = self._known[len(self._names) :]
        if not new:
            return
        self._file.connection.executemany(
            "INSERT INTO tensors VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [_tensor_row(number, t, max(self._last, 0)) for number, t in enumerate(new, len(self._names))],
        )
        self._names += [clean(tensor["name"]) for tensor in new]

    def _put(self, *, keep: bool = False, **values: Any) -> None:
        how = "IGNORE" if keep else "REPLACE"
        self._file.connection.executemany(
            f"INSERT OR {how} INTO meta VALUES (?, ?)", [(key, to_json(v)) for key, v in values.items()]
        )

    def _warn_once(self, key: str, **values: Any) -> None:
        warn(self._warned, key, folder=self.folder, **values)


def _tensor_row(number: int, tensor: dict[str, Any], since: int) -> tuple[Any, ...]:
    kind = tensor.get("kind")
    return (
        number,
        clean(tensor["name"]),
        to_json(list(tensor["shape"])),
        clean(tensor["dtype"]),
        int(tensor["numel"]),
        tensor.get("group"),
        tensor.get("layer"),
        None if kind is None else clean(kind),
        int(tensor.get("position") or 0),
        since,
    )


def _number(value: Any, absent: Any = None) -> Any:
    """A float64; `absent` for what is no number. NaN in its one plain form: another form says "absent"."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return absent
    return math.nan if number != number else number
