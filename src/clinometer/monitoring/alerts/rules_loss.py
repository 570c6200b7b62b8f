"""The alert `loss-spike`."""

from __future__ import annotations

import math
from collections import deque

from clinometer.monitoring.alerts.facts import Facts, Trouble, median


class LossSpike:
    """One loss far above all of the last 50 to 100.

    Above the highest of them by three times the distance from their median to the highest, and by half of the
    median; and above the median by a hundredth of the first losses (below that the run has converged).
    A loss that takes both signs (a policy gradient's) has no level: there the distance from the median must
    also be the widest so far.
    """

    cause, opens, closes = "loss-spike", 1, 10
    WINDOW = 100
    WINDOW_NEEDED = 50
    TIMES_SPREAD = 3
    """Above the highest loss of the window, in distances from its median to its highest."""
    OF_MEDIAN = 0.5
    """Above the highest loss of the window, at least."""
    OF_FIRST_LOSSES = 0.01
    """A smaller jump happens after the run has converged."""
    FIRST_LOSSES = 20

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=self.WINDOW)
        self._first: list[float] = []
        self._lowest, self._highest = math.inf, -math.inf
        self._widest = 0.0
        """The largest distance of a loss from the median of those before it."""

    def look(self, facts: Facts) -> Trouble | None:
        loss = facts.scalar("loss")
        if not math.isfinite(loss):
            return None
        if len(self._first) < self.FIRST_LOSSES:
            self._first.append(loss)
        self._lowest, self._highest = min(self._lowest, loss), max(self._highest, loss)
        usual = median(self._losses) if self._losses else loss
        found = self._judge(loss, usual)
        self._widest = max(self._widest, abs(loss - usual))
        # A run that stays there has a new level; until then it is judged by the old one.
        self._losses.append(loss)
        return found

    def _judge(self, loss: float, usual: float) -> Trouble | None:
        if len(self._losses) < self.WINDOW_NEEDED:
            return None
        highest = max(self._losses)
        if loss <= highest + max(self.TIMES_SPREAD * (highest - usual), self.OF_MEDIAN * abs(usual)):
            return None
        if loss - usual < self.OF_FIRST_LOSSES * median(map(abs, self._first)):
            return None
        if self._lowest < 0 < self._highest and loss - usual <= self._widest:
            return None
        return Trouble("warning", (), {"loss": f"{loss:.4g}", "usual": f"{usual:.4g}"})
