"""Ctrl-C and SIGTERM: asked to stop, a run ends after the step in hand."""

from __future__ import annotations

import signal
import time
from contextlib import contextmanager
from typing import Any

ECHO_SECONDS = 2.0
"""A terminal sends Ctrl-C to the launcher and to the ranks, and the launcher sends its own once more."""


class StopRequest:
    """The signal that asked the run to stop, if one did."""

    signal: signal.Signals | None = None
    at: float = 0.0


@contextmanager
def stop_on_signal(echo_seconds: float = 0.0):
    """Ctrl-C and SIGTERM ask for a stop after the step in hand; a second one stops at once.

    One that comes within `echo_seconds` of the first is the same one.
    """
    request = StopRequest()

    def ask(number: int, _frame: object) -> None:
        now = time.monotonic()
        if request.signal is not None:
            if now - request.at < echo_seconds:
                return
            raise KeyboardInterrupt
        request.signal, request.at = signal.Signals(number), now

    previous: dict[signal.Signals, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, ask)
    except ValueError:  # not in the main thread: whoever runs us there handles signals
        pass
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
