"""The alerts `vanishing` (from layer to layer) and `exploding` (from step to step)."""

from __future__ import annotations

import math
from collections import deque

import numpy as np

from clinometer.monitoring.alerts.facts import Facts, Trouble, median


class Vanishing:
    """Among matrices of one kind in four or more layers, the first layer's gradient is below 1/10,000 of the
    last one's, and the second's below 1/1,000, for 30 steps. Healthy deep networks keep within 1/100."""

    cause, opens, closes = "vanishing", 30, 30
    LAYERS = 4
    FIRST_TO_LAST = 1e-4
    SECOND_TO_LAST = 1e-3

    def look(self, facts: Facts) -> Trouble | None:
        rms = facts.grad_rms
        kind, layer = facts.tensors.kind, facts.tensors.layer
        found: list[int] = []
        worst = 1.0
        able = np.flatnonzero(facts.matrix & (rms > 0) & np.isfinite(rms) & ~np.isnan(layer))
        able = able[np.lexsort((layer[able], kind[able]))]
        begins = np.flatnonzero(np.diff(kind[able], prepend=-1))
        for start, stop in zip(begins.tolist(), np.append(begins[1:], len(able)).tolist(), strict=False):
            if stop - start < self.LAYERS:
                continue
            members = able[start:stop]
            first, second, last = rms[members[0]], rms[members[1]], rms[members[-1]]
            if first < self.FIRST_TO_LAST * last and second < self.SECOND_TO_LAST * last:
                found += members[rms[members] < self.SECOND_TO_LAST * last].tolist()
                worst = min(worst, first / last)
        if not found:
            return None
        return Trouble("warning", tuple(sorted(found)), {"ratio": f"{worst:.0e}"})


class Exploding:
    """The total norm leaves its range upwards.

    In a run under way: ten times the median of the last 100 steps and twice the highest before, for five
    steps, while the loss, where it is known, is above its median by half. "Twice the highest" keeps silent
    about a run that had larger gradients at its beginning.
    At any time: ten thousand times the first step's norm, with ten times the first step's loss; without a
    known loss, a million times.
    """

    cause, opens, closes = "exploding", 1, 20
    WINDOW = 100
    WINDOW_NEEDED = 50
    """Steps in the window before the first condition is judged."""
    TIMES_MEDIAN = 10
    TIMES_HIGHEST = 2
    LOSS_RISE = 0.5
    """Of the loss over its median, as a share of the median."""
    STEPS = 5
    """In a row, for the first condition."""
    TIMES_FIRST = 1e4
    TIMES_FIRST_LOSS = 10
    TIMES_FIRST_WITHOUT_LOSS = 1e6

    def __init__(self) -> None:
        self._norms: deque[float] = deque(maxlen=self.WINDOW)
        self._losses: deque[float] = deque(maxlen=self.WINDOW)
        self._first_norm = self._first_loss = math.nan
        self._highest = 0.0
        self._high_in_a_row = 0

    def look(self, facts: Facts) -> Trouble | None:
        norm, loss = facts.scalar("total_norm"), facts.scalar("loss")
        if not math.isfinite(norm) or norm == 0:
            return None
        found = self._judge(norm, loss)
        if self._high_in_a_row == 0 and found is None:  # the range is that of healthy steps
            self._norms.append(norm)
            self._highest = max(self._highest, norm)
            if math.isfinite(loss):
                self._losses.append(loss)
            if math.isnan(self._first_norm):
                self._first_norm, self._first_loss = norm, loss
        return found

    def _judge(self, norm: float, loss: float) -> Trouble | None:
        if math.isfinite(self._first_norm) and norm > self.TIMES_FIRST * self._first_norm:
            beyond = (
                abs(loss) > self.TIMES_FIRST_LOSS * abs(self._first_loss)
                if math.isfinite(loss)
                else norm > self.TIMES_FIRST_WITHOUT_LOSS * self._first_norm
            )
            if beyond:
                return Trouble("fault", (), self._values(norm, self._first_norm))
        if len(self._norms) < self.WINDOW_NEEDED:
            return None
        usual = median(self._norms)
        worse = True
        if self._losses and math.isfinite(loss):
            middle = median(self._losses)
            worse = loss > middle + self.LOSS_RISE * abs(middle)
        high = norm > self.TIMES_MEDIAN * usual and norm > self.TIMES_HIGHEST * self._highest and worse
        self._high_in_a_row = self._high_in_a_row + 1 if high else 0
        return Trouble("fault", (), self._values(norm, usual)) if self._high_in_a_row >= self.STEPS else None

    @staticmethod
    def _values(norm: float, usual: float) -> dict[str, str]:
        return {"norm": f"{norm:.3g}", "usual": f"{usual:.3g}"}
