"""Alerts about gradients from backward to step: `accumulating`, `discarded` and `no-step`."""

from __future__ import annotations

from clinometer.monitoring.alerts.facts import Facts, Trouble


class Accumulating:
    """The gradients were added to those of the step before, in ten steps in a row."""

    cause, opens, closes = "accumulating", 10, 3

    def look(self, facts: Facts) -> Trouble | None:
        return Trouble("fault") if facts.piled_up else None


class Discarded:
    """Before each step some backwards' gradients were cleared and used by no step, in ten steps in a row."""

    cause, opens, closes = "discarded", 10, 3

    def look(self, facts: Facts) -> Trouble | None:
        discarded, backwards = facts.discarded
        if not facts.taken or not discarded:
            return None
        return Trouble("warning", (), {"discarded": discarded, "backwards": backwards})


class NoStep:
    """No step is taken, 20 times in a row, though no gradient is NaN or infinite; or, told without any step,
    none was ever seen while backward() reached the tensors."""

    cause, opens, closes = "no-step", 20, 1

    def look(self, facts: Facts) -> Trouble | None:
        if facts.taken or (facts.of("grad_nonfinite") > 0).any():
            return None
        return Trouble("fault")
