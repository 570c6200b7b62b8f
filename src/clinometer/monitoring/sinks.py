"""Where a watch writes: the Sink protocol, and a group of sinks in which a failing sink is dropped."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from clinometer.messages import InputError, say


@runtime_checkable
class Sink(Protocol):
    """Receives a run: a run file, TensorBoard, a list in a test. The values are plain data and arrays."""

    def begin(self, run: dict[str, Any]) -> None: ...
    def tensors(self, tensors: list[dict[str, Any]]) -> None: ...
    def step(self, step: int, time: float, scalars: dict[str, float], statistics: np.ndarray) -> None: ...
    def histograms(self, step: int, counts: np.ndarray) -> None: ...
    def alert(self, alert: dict[str, Any]) -> None: ...
    def weights(self, step: int, rows: list[dict[str, Any]]) -> None: ...
    def event(self, step: int, time: float, kind: str, data: dict[str, Any]) -> None: ...
    def close(self, state: str) -> None: ...


class SinkGroup:
    """Several sinks as one sink that never raises: one that raises is dropped with one warning."""

    def __init__(self, sinks: Sink | Sequence[Sink]) -> None:
        """Raises InputError for an object that is not a sink."""
        given: list[Any] = list(sinks) if isinstance(sinks, list | tuple) else [sinks]
        for sink in given:
            if not isinstance(sink, Sink):
                raise InputError("watch.not_a_sink", type=type(sink).__name__)
        self.sinks: list[Sink] = given
        self.on_alert: Callable[[dict[str, Any]], None] | None = None

    def begin(self, run: dict[str, Any]) -> None:
        self._each(lambda sink: sink.begin(run))

    def tensors(self, tensors: list[dict[str, Any]]) -> None:
        self._each(lambda sink: sink.tensors(tensors))

    def step(self, step: int, time: float, scalars: dict[str, float], statistics: np.ndarray) -> None:
        self._each(lambda sink: sink.step(step, time, scalars, statistics))

    def histograms(self, step: int, counts: np.ndarray) -> None:
        self._each(lambda sink: sink.histograms(step, counts))

    def alert(self, alert: dict[str, Any]) -> None:
        """Pass the alert to the sinks and to `on_alert`, which is dropped with a warning if it raises."""
        self._each(lambda sink: sink.alert(alert))
        if self.on_alert is None:
            return
        try:
            self.on_alert(alert)
        except Exception as error:
            self.on_alert = None
            text = say("watch.listener_dropped", error=f"{type(error).__name__}: {error}")
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    def weights(self, step: int, rows: list[dict[str, Any]]) -> None:
        self._each(lambda sink: sink.weights(step, rows))

    def event(self, step: int, time: float, kind: str, data: dict[str, Any]) -> None:
        self._each(lambda sink: sink.event(step, time, kind, data))

    def close(self, state: str) -> None:
        self._each(lambda sink: sink.close(state))

    def _each(self, call: Callable[[Sink], None]) -> None:
        for sink in list(self.sinks):
            try:
                call(sink)
            except Exception as error:
                self.sinks.remove(sink)
                text = say(
                    "watch.sink_dropped", sink=type(sink).__name__, error=f"{type(error).__name__}: {error}"
                )
                warnings.warn(text, RuntimeWarning, stacklevel=3)
