"""While the run file cannot be written: training goes on, one warning, another try now and then."""

from __future__ import annotations

import warnings
from collections import deque
from pathlib import Path
from typing import Any

from clinometer.messages import say

FIRST_WAIT = 16
LONGEST_WAIT = 1024
MOST_KEPT = 1000


class Outage:
    """What is missing since the file could not be written, and when to try again."""

    def __init__(self, path: Path, error: Exception) -> None:
        self.path = path
        self.reason = str(error) or type(error).__name__
        self.first: int | None = None
        self.last: int | None = None
        self.steps = 0
        self.kept: deque[tuple[str, tuple[Any, ...]]] = deque(maxlen=MOST_KEPT)
        """Alerts and events are few and worth keeping; steps are many and are left out."""
        self._wait = FIRST_WAIT
        self._left = FIRST_WAIT

    def missed(self, step: int | None) -> None:
        if step is not None:
            self.first = step if self.first is None else self.first
            self.last = step
            self.steps += 1

    def is_due(self, step: int | None) -> bool:
        """Count a step that finds the recording paused; whether it is the one to try again with."""
        if step is not None:
            self._left -= 1
            if self._left > 0:
                self.missed(step)
        return self._left <= 0

    def try_now(self) -> None:
        self._left = 0

    def failed_again(self, step: int | None) -> None:
        self.missed(step)
        self._wait = min(2 * self._wait, LONGEST_WAIT)
        self._left = self._wait

    def keep(self, statement: str, values: tuple[Any, ...]) -> None:
        self.kept.append((statement, values))

    def gap(self) -> dict[str, Any]:
        return {"first": self.first, "last": self.last, "steps": self.steps, "reason": self.reason}

    def announce(self, warned: set[str]) -> None:
        warn(warned, "record.paused", path=self.path, reason=self.reason)


def warn(warned: set[str], key: str, **values: Any) -> None:
    """Warn, the first time only."""
    if key not in warned:
        warned.add(key)
        warnings.warn(say(key, **values), RuntimeWarning, stacklevel=2)
