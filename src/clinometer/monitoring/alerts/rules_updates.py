"""Alerts about tensors that the optimizer should or should not move: `never-moves`, `moved-while-frozen`,
`not-in-optimizer`."""

from __future__ import annotations

from collections import deque

import numpy as np

from clinometer.monitoring.alerts.facts import Facts, Trouble, indices_of, median


def _highest(before: np.ndarray, now: np.ndarray) -> np.ndarray:
    """The highest so far of each tensor; there may be more of them now."""
    if len(before) == len(now):
        return np.fmax(before, now)
    return np.fmax(np.concatenate([before, np.zeros(len(now) - len(before))]), now)


class NeverMoves:
    """A tensor has a gradient and a learning rate, the step is taken, and no entry changes, for 20 steps.

    Left out: a gradient that is rounding noise beside the others' (1/1000 of the median), as a key bias has,
    whose gradient is zero in exact arithmetic; one far below its own highest so far (1/100), which has
    converged; a rate that rises by more than a tenth in 20 steps (a warm-up or a search for a learning rate
    begins where nothing moves); a rate below a tenth of its highest (a decaying schedule ends there).
    """

    cause, opens, closes = "never-moves", 20, 3
    OF_HIGHEST_RMS = 0.01
    """A gradient below this share of its own highest so far has converged."""
    OF_MEDIAN_RMS = 1e-3
    """A gradient below this share of the tensors' median is rounding noise."""
    RATE_RISE = 1.1
    """In `opens` steps; more is a warm-up or a search for a learning rate."""
    OF_HIGHEST_RATE = 0.1
    """Below this share of the highest rate, a schedule ends."""

    def __init__(self) -> None:
        self._rates: deque[np.ndarray] = deque(maxlen=self.opens)
        self._highest_rate = self._highest_rms = np.zeros(0)

    def look(self, facts: Facts) -> Trouble | None:
        rms = facts.grad_rms
        able = facts.owned & facts.learns & (facts.lr != 0) & np.isfinite(rms) & (rms > 0)
        able &= self._settled(facts.lr)
        self._highest_rms = _highest(self._highest_rms, np.where(np.isfinite(rms), rms, 0))
        able &= rms > self.OF_HIGHEST_RMS * self._highest_rms
        if not facts.taken or not able.any():
            return None
        able &= rms > self.OF_MEDIAN_RMS * median(rms[able].tolist())
        still = able & (facts.of("update_norm") == 0)
        if not still.any():
            return None
        severity = "fault" if still.sum() > able.sum() / 2 else "warning"
        return Trouble(severity, indices_of(still))

    def _settled(self, rates: np.ndarray) -> np.ndarray:
        if self._rates and len(self._rates[0]) != len(rates):  # tensors came
            self._rates.clear()
        self._rates.append(rates)
        self._highest_rate = _highest(self._highest_rate, rates)
        # Where no rate is known both comparisons with NaN are false.
        return ~(rates > self.RATE_RISE * self._rates[0]) & ~(
            rates < self.OF_HIGHEST_RATE * self._highest_rate
        )


class MovedWhileFrozen:
    """requires_grad is False, and the optimizer's step moved it: an old gradient is still in .grad. Three
    steps: one may lie between the freezing and the measurement."""

    cause, opens, closes = "moved-while-frozen", 3, 3

    def look(self, facts: Facts) -> Trouble | None:
        moved = facts.owned & ~facts.learns & (facts.of("update_norm") > 0)
        return Trouble("fault", indices_of(moved)) if moved.any() else None


class NotInOptimizer:
    """A tensor has a gradient in 20 steps in a row; no watched optimizer holds it, nothing else moved it."""

    cause, opens, closes = "not-in-optimizer", 20, 3

    def look(self, facts: Facts) -> Trouble | None:
        left = ~facts.owned & facts.learns & ~facts.moved_elsewhere & (facts.of("grad_norm") > 0)
        return Trouble("fault", indices_of(left)) if left.any() else None
