"""Ctrl-C and SIGTERM: a run that is asked to stop ends after the step in hand, with a checkpoint of it.

| signal | during a step | during a checkpoint |
|---|---|---|
| the first | stop after this step | stop after the next step |
| a further SIGTERM | changes nothing | changes nothing |
| a second Ctrl-C | stop at once; the last checkpoint stays | stop once the checkpoint is committed |

A further SIGTERM changes nothing because supervisors send it more than once, and have SIGKILL for "at once".
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ECHO_SECONDS = 2.0
"""A terminal sends Ctrl-C to the launcher and to the ranks, and the launcher sends its own once more."""


class StopRequest:
    """What signals have asked of a run: `signal` is the one that asked it to stop, if one did.

    A second Ctrl-C within `echo_seconds` of the first signal is the same one.
    """

    def __init__(self, echo_seconds: float = 0.0) -> None:
        self.signal: signal.Signals | None = None
        self._echo_seconds, self._at = echo_seconds, 0.0
        self._uninterruptible = self._asked_twice = self._ending = False

    def ask(self, number: int, _frame: object = None) -> None:
        """Take a signal. Raises KeyboardInterrupt for the second Ctrl-C, at most once."""
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._at = signal.Signals(number), now
        elif number == signal.SIGINT and now - self._at >= self._echo_seconds and not self._ending:
            self._asked_twice = True
            if not self._uninterruptible:
                self._stop_now()

    @contextmanager
    def uninterruptible(self) -> Iterator[None]:
        """For a checkpoint: a second Ctrl-C during the body raises KeyboardInterrupt after it."""
        self._uninterruptible = True
        try:
            yield
        finally:
            self._uninterruptible = False
        if self._asked_twice and not self._ending:
            self._stop_now()

    def end(self) -> None:
        """From here on the run ends by itself, and no signal changes how."""
        self._ending = True

    def _stop_now(self) -> None:
        self._ending = True
        raise KeyboardInterrupt


@contextmanager
def stop_on_signal(echo_seconds: float = 0.0) -> Iterator[StopRequest]:
    """Gives the request that Ctrl-C and SIGTERM make while the body runs."""
    request = StopRequest(echo_seconds)
    previous: dict[signal.Signals, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, request.ask)
    except ValueError:  # not in the main thread: whoever runs us there handles signals
        pass
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
