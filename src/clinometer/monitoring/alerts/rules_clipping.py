"""Alerts about gradient clipping: `always-clipped` and `unscaled-amp`."""

from __future__ import annotations

import math
from collections import deque

from clinometer.monitoring.alerts.facts import Facts, Trouble, median


class AlwaysClipped:
    """99 of the last 100 steps were clipped to less than a tenth. Clipping that often and that hard no longer
    guards against rare steps: it sets the step size. Closes when fewer than 90 were."""

    cause, opens, closes = "always-clipped", 1, 1
    WINDOW = 100
    FACTOR = 0.1
    """A step that is clipped to less than this is clipped hard."""
    OPENING_SHARE = 0.99
    CLOSING_SHARE = 0.9

    def __init__(self) -> None:
        self._clipped: deque[bool] = deque(maxlen=self.WINDOW)
        self._factors: deque[float] = deque(maxlen=self.WINDOW)
        self._is_open = False

    def look(self, facts: Facts) -> Trouble | None:
        clip = facts.scalar("clip")
        if not math.isfinite(clip) or facts.clipped_while_scaled:
            return None
        self._clipped.append(clip < self.FACTOR)
        self._factors.append(clip)
        if len(self._clipped) < self.WINDOW:
            return None
        share = sum(self._clipped) / self.WINDOW
        self._is_open = share >= (self.CLOSING_SHARE if self._is_open else self.OPENING_SHARE)
        if not self._is_open:
            return None
        values = {
            "factor": f"{median(self._factors):.2g}",
            "max_norm": f"{facts.scalar('max_norm'):.3g}",
            "norm": f"{facts.scalar('total_norm'):.3g}",
        }
        return Trouble("warning", (), values)


class UnscaledAmp:
    """Gradients are clipped between scale() and unscale_(), in three steps in a row: one may be a trial."""

    cause, opens, closes = "unscaled-amp", 3, 10

    def look(self, facts: Facts) -> Trouble | None:
        if not facts.clipped_while_scaled:
            return None
        return Trouble("fault", (), {"scale": f"{facts.scalar('grad_scale'):.0f}"})
