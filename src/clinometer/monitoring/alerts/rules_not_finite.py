"""Alerts about NaN and Inf: `non-finite` (a gradient, a loss) and `step-not-finite` (made by the step)."""

from __future__ import annotations

import math

import numpy as np

from clinometer.monitoring.alerts.facts import Facts, Trouble, indices_of, longer


class NonFinite:
    """A NaN or Inf in a gradient: one step is enough. A loss scaler looks for its scale by overflowing, so
    with a scaler only overflows in a row count: 20 of them take the usual scale of 2¹⁶ below 1.

    A loss that is NaN while the gradients are finite: a batch whose targets are all ignored gives 0/0 and no
    gradient. One such batch is not a fault, so this must last.
    """

    cause, opens, closes = "non-finite", 1, 10
    SCALED_STEPS = 20
    """Overflows in a row where a loss scaler is at work."""
    LOSS_STEPS = 3
    """Losses in a row that are NaN while the gradients are finite."""

    def __init__(self) -> None:
        self._gradients_in_a_row = self._losses_in_a_row = 0

    def look(self, facts: Facts) -> Trouble | None:
        bad = facts.of("grad_nonfinite") > 0
        loss = facts.scalars.get("loss", 0.0)
        if not bad.any():
            self._gradients_in_a_row = 0
            is_bad = math.isnan(loss) and facts.backwards
            self._losses_in_a_row = self._losses_in_a_row + 1 if is_bad else 0
            if self._losses_in_a_row < self.LOSS_STEPS:
                return None
            return Trouble("fault", (), {}, "loss")
        self._gradients_in_a_row += 1
        if facts.scaler and not facts.taken and self._gradients_in_a_row < self.SCALED_STEPS:
            return None
        count = int(np.nansum(facts.of("grad_nonfinite")))
        if facts.scaler and not facts.taken:
            values = {"entries": count, "scale": f"{facts.scalar('grad_scale'):.3g}"}
            return Trouble("fault", indices_of(bad), values, "scaler")
        return Trouble("fault", indices_of(bad), {"entries": count})


class StepNotFinite:
    """Weights that the step itself made NaN or infinite: they were finite before it, and so was the
    gradient."""

    cause, opens, closes = "step-not-finite", 1, 10

    def __init__(self) -> None:
        self._step = 0
        self._norms = np.zeros(0)

    def look(self, facts: Facts) -> Trouble | None:
        norm, grad = facts.of("weight_norm"), facts.of("grad_norm")
        before = longer(self._norms, len(norm))
        if not self._step:
            before = facts.first_norm
        follows = not self._step or facts.step == self._step + 1
        self._step, self._norms = facts.step, norm.copy()
        made = facts.stepped & np.isinf(norm) & np.isfinite(before) & np.isfinite(grad)
        if not (facts.taken and follows and made.any()):
            return None
        zero = made & (grad == 0)
        if (facts.tensors.half & (facts.eps > 0) & (facts.eps < SMALLEST_HALF))[made].any():
            return Trouble("fault", indices_of(made), {"eps": f"{np.nanmax(facts.eps[made]):g}"}, "eps")
        if zero.sum() == made.sum():
            return Trouble("fault", indices_of(made), {}, "zero_gradient")
        return Trouble("fault", indices_of(made))


SMALLEST_HALF = 2.0**-25
"""Numbers up to this are 0 in float16."""
