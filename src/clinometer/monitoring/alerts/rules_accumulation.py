"""The alert `accumulating`: zero_grad() is missing."""

from __future__ import annotations

from clinometer.monitoring.alerts.facts import Facts, Trouble


class Accumulating:
    """The gradients were added to those of the step before, in ten steps in a row."""

    cause, opens, closes = "accumulating", 10, 3

    def look(self, facts: Facts) -> Trouble | None:
        return Trouble("fault") if facts.piled_up else None
