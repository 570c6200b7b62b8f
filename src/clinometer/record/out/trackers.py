"""Sinks for the same numbers elsewhere: TensorBoard's event files, and trackers with the API of W&B."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from clinometer.messages import InputError
from clinometer.vocabulary import BUCKETS, HISTOGRAM_KINDS, LOW_EXPONENT, STATISTICS


class _Numbers:
    """What both sinks share: the tensors' names, the open alerts, and which steps get the statistics."""

    def __init__(self, every: int) -> None:
        if every < 1:
            raise InputError("record.every", value=every)
        self._every = every
        self._names: list[str] = []
        self._next = 0
        self._open: set[int] = set()
        self._pid = os.getpid()
        self._closed = False

    @property
    def _silent(self) -> bool:
        return self._closed or os.getpid() != self._pid

    def tensors(self, tensors: Sequence[dict[str, Any]]) -> None:
        self._names = [str(tensor["name"]) for tensor in tensors]

    def alert(self, alert: dict[str, Any]) -> None:
        if alert.get("until") is None:
            self._open.add(int(alert["id"]))
        else:
            self._open.discard(int(alert["id"]))

    def _of_step(self, step: int, scalars: Mapping[str, Any], statistics: np.ndarray) -> dict[str, float]:
        """The step's scalars and, each `every` steps, the statistics: `grad_norm/layers.0.weight`."""
        numbers = {name: float(value) for name, value in scalars.items() if value is not None}
        numbers["alerts"] = float(len(self._open))
        if step >= self._next:
            self._next = step + self._every
            for column, statistic in enumerate(STATISTICS):
                for name, value in zip(self._names, statistics[:, column].tolist(), strict=False):
                    if not math.isnan(value):  # no gradient: nothing to draw
                        numbers[f"{statistic}/{name}"] = value
        return numbers

    def _of_weights(self, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
        numbers = {}
        for row in rows:
            number = int(row["tensor"])
            name = self._names[number] if number < len(self._names) else f"tensor {number}"
            place = f"{name}[{', '.join(map(str, row['index']))}]"
            numbers[f"weight/{place}"] = float(row["after"])
            numbers[f"weight_grad/{place}"] = float(row["grad"])
        return numbers


class TensorBoard(_Numbers):
    """Writes TensorBoard's event files; needs `pip install clinometer[tensorboard]`, but no TensorFlow."""

    def __init__(self, folder: str | os.PathLike[str], every: int = 16) -> None:
        """Scalars at every step; the statistics of each tensor every `every` steps; histograms as they come.

        Raises `InputError` if tensorboard is not installed or `every` is below 1.
        """
        super().__init__(every)
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError:
            raise InputError("record.extra", package="tensorboard", extra="tensorboard") from None
        events: Any = event_pb2  # made by protoc, whose classes a type checker does not see
        self._event = events.Event
        self._protos: Any = summary_pb2
        try:
            self._writer = EventFileWriter(str(Path(folder)))
        except OSError as error:
            raise InputError("record.not_writable", path=folder, reason=error.strerror) from None
        self._time = 0.0

    def begin(self, run: dict[str, Any]) -> None:
        self._time = float(run.get("started") or 0.0)

    def step(self, step: int, time: float, scalars: Mapping[str, Any], statistics: np.ndarray) -> None:
        self._time = float(time)
        self._write(step, self._of_step(step, scalars, statistics))

    def weights(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        self._write(step, self._of_weights(rows))

    def histograms(self, step: int, counts: np.ndarray) -> None:
        """Of |x|: a bar a power of two, exact zeros in the first."""
        if self._silent:
            return
        limits = 2.0 ** (np.arange(BUCKETS) + LOW_EXPONENT + 1)
        values = []
        for name, kinds in zip(self._names, counts, strict=False):
            for kind, bars in zip(HISTOGRAM_KINDS, kinds, strict=True):
                filled = np.flatnonzero(bars)
                if not len(filled):
                    continue
                low, high = int(filled[0]), int(filled[-1])
                histogram = self._protos.HistogramProto(
                    min=0.0 if low == 0 else float(limits[low - 1]),
                    max=float(limits[high]),
                    num=float(bars.sum()),
                    sum=float((bars * limits).sum() * 0.75),  # the middle of a bar, for want of the numbers
                    sum_squares=float((bars * limits**2).sum() * 0.5625),
                    bucket_limit=limits[low : high + 1].tolist(),
                    bucket=bars[low : high + 1].astype(float).tolist(),
                )
                values.append(self._protos.Summary.Value(tag=f"{kind}/{name}", histo=histogram))
        self._add(step, values)

    def event(self, step: int, time: float, kind: str, data: Mapping[str, Any]) -> None:
        if kind == "validation" and isinstance(loss := data.get("loss"), int | float):
            self._time = float(time)
            self._write(step, {"validation_loss": float(loss)})

    def close(self, state: str = "done") -> None:
        if not self._silent:
            self._closed = True
            self._writer.close()

    def _write(self, step: int, numbers: Mapping[str, float]) -> None:
        if not self._silent:
            value = self._protos.Summary.Value
            self._add(step, [value(tag=tag, simple_value=number) for tag, number in numbers.items()])

    def _add(self, step: int, values: list[Any]) -> None:
        if values:
            summary = self._protos.Summary(value=values)
            self._writer.add_event(self._event(step=int(step), wall_time=self._time, summary=summary))


class Logs(Protocol):
    """The logging API of Weights & Biases: the modules wandb, trackio and swanlab, or their runs."""

    def log(self, data: dict[str, Any], *, step: int) -> Any: ...


class Tracker(_Numbers):
    """Passes the numbers to `run.log(dict, step=)`; everything of one step in one call."""

    def __init__(
        self,
        run: Logs,
        every: int = 16,
        histogram: Callable[[np.ndarray, np.ndarray], Any] | None = None,
        prefix: str = "",
    ) -> None:
        """`run` is the module (after its init) or the run it returned; the caller ends it.

        `histogram(counts, edges)` makes the tracker's own histogram, for wandb:
        `lambda counts, edges: wandb.Histogram(np_histogram=(counts, edges))`; without it they are left out.
        Its edges are log2 |x|, one more than counts. Raises `InputError` if `run` has no `log`.
        """
        super().__init__(every)
        if not callable(getattr(run, "log", None)):
            raise InputError("record.no_log", given=type(run).__name__)
        self._run = run
        self._histogram = histogram
        self._prefix = prefix
        self._waiting: dict[str, Any] = {}
        self._step: int | None = None

    def begin(self, run: dict[str, Any]) -> None:
        """Nothing: the tracker's own init takes the configuration."""

    def step(self, step: int, time: float, scalars: Mapping[str, Any], statistics: np.ndarray) -> None:
        self._add(step, self._of_step(step, scalars, statistics))

    def weights(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        self._add(step, self._of_weights(rows))

    def histograms(self, step: int, counts: np.ndarray) -> None:
        if self._histogram is None:
            return
        edges = np.arange(BUCKETS + 1) + LOW_EXPONENT
        made = {}
        for name, kinds in zip(self._names, counts, strict=False):
            for kind, bars in zip(HISTOGRAM_KINDS, kinds, strict=True):
                if bars[1:].any():
                    filled = np.flatnonzero(bars[1:]) + 1
                    low, high = int(filled[0]), int(filled[-1]) + 1
                    made[f"{kind}/{name}"] = self._histogram(bars[low:high], edges[low : high + 1])
        self._add(step, made)

    def event(self, step: int, time: float, kind: str, data: Mapping[str, Any]) -> None:
        if kind == "validation" and isinstance(loss := data.get("loss"), int | float):
            self._add(step, {"validation_loss": float(loss)})

    def close(self, state: str = "done") -> None:
        """Log what is left; the run itself stays open."""
        if not self._silent:
            self._send()
            self._closed = True

    def _add(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Trackers drop what comes for a step that they have left, so a step is sent when the next begins."""
        if self._silent or not numbers:
            return
        if self._step is not None and step != self._step:
            self._send()
        self._step = int(step)
        self._waiting |= {f"{self._prefix}{name}": value for name, value in numbers.items()}

    def _send(self) -> None:
        if self._step is not None and self._waiting:
            waiting, self._waiting = self._waiting, {}
            self._run.log(waiting, step=self._step)
