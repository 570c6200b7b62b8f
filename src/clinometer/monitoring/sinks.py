"""What hears of a run, and the way there: a sink that fails is dropped, and the training goes on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from clinometer.messages import InputError, say


@runtime_checkable
class Sink(Protocol):
    """Where a watch writes: a run file, TensorBoard, a list in a test. Only plain data and arrays come."""

    def begin(self, run: dict[str, Any]) -> None: ...
    def tensors(self, tensors: list[dict[str, Any]]) -> None: ...
    def step(self, step: int, time: float, scalars: dict[str, float], statistics: np.ndarray) -> None: ...
    def histograms(self, step: int, counts: np.ndarray) -> None: ...
    def alert(self, alert: dict[str, Any]) -> None: ...
    def weights(self, step: int, rows: list[dict[str, Any]]) -> None: ...
    def event(self, step: int, time: float, kind: str, data: dict[str, Any]) -> None: ...
    def close(self, state: str) -> None: ...


class Outlet:
    """Several sinks as one that never raises."""

    def __init__(self, sinks: Sink | Sequence[Sink]) -> None:
        given = list(sinks) if isinstance(sinks, list | tuple) else [sinks]
        for sink in given:
            if not isinstance(sink, Sink):
                raise InputError("watch.not_a_sink", type=type(sink).__name__)
        self.sinks: list[Any] = given
        self.on_alert: Callable[[dict[str, Any]], None] | None = None

    def tell(self, method: str, *values: Any) -> None:
        """Call `method` of each sink; one that raises is dropped with one warning."""
        for sink in list(self.sinks):
            try:
                getattr(sink, method)(*values)
            except Exception as error:
                self.sinks.remove(sink)
                text = say(
                    "watch.sink_dropped", sink=type(sink).__name__, error=f"{type(error).__name__}: {error}"
                )
                warnings.warn(text, RuntimeWarning, stacklevel=2)

    def alert(self, alert: dict[str, Any]) -> None:
        """Tell the sinks and `on_alert`; if that raises, it is told so in a warning and not called again."""
        self.tell("alert", alert)
        if self.on_alert is None:
            return
        try:
            self.on_alert(alert)
        except Exception as error:
            self.on_alert = None
            text = say("watch.listener_dropped", error=f"{type(error).__name__}: {error}")
            warnings.warn(text, RuntimeWarning, stacklevel=2)
