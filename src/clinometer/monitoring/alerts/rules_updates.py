"""Alerts about tensors that the optimizer should or should not move: `never-moves`, `moved-while-frozen`,
`not-in-optimizer`, `stale-in-optimizer`, `shared-memory`, `decay`, `written-between`."""

from __future__ import annotations

from collections import deque

import numpy as np

from clinometer.monitoring.alerts.facts import Facts, Trouble, indices_of, longer, median


def _highest(before: np.ndarray, now: np.ndarray) -> np.ndarray:
    """The highest so far of each tensor."""
    return np.fmax(longer(before, len(now), 0.0), now)


class NeverMoves:
    """A tensor has a gradient and a learning rate, the step is taken, and no entry changes, for 20 steps.

    Left out: a gradient that is rounding noise beside the others' (1/1000 of the median), as a key bias has,
    whose gradient is zero in exact arithmetic; one far below its own highest so far (1/100), which has
    converged; a rate that rises by more than a tenth in 20 steps (a warm-up or a search for a learning rate
    begins where nothing moves); a rate below a tenth of its highest (a decaying schedule ends there).

    Or the rate has fallen so far that no tensor moves at all, for 50 steps and for as many as there were
    before: no schedule ends with half of the run.
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
    STOPPED_STEPS = 50
    """Steps in a row in which nothing moved, at least, at a rate that has fallen."""

    def __init__(self) -> None:
        self._rates: deque[np.ndarray] = deque(maxlen=self.opens)
        self._highest_rate = self._highest_rms = np.zeros(0)
        self._before_the_end = self._stopped = 0

    def look(self, facts: Facts) -> Trouble | None:
        return self._rate_fell(facts) or self._lost_in_rounding(facts)

    def _rate_fell(self, facts: Facts) -> Trouble | None:
        """Call it first: it compares with the highest rate so far."""
        able = facts.owned & facts.learns & (facts.of("grad_norm") > 0) & ~facts.replaced
        if not facts.taken or not able.any():
            return None
        highest = longer(self._highest_rate, len(able), 0.0)
        low = facts.lr < self.OF_HIGHEST_RATE * highest
        if not (
            low[able].all() and (facts.of("update_norm")[able] == 0).all() and (facts.lr[able] > 0).all()
        ):
            self._before_the_end += 1 + self._stopped
            self._stopped = 0
            return None
        self._stopped += 1
        if self._stopped < max(self.STOPPED_STEPS, self._before_the_end) - self.opens:
            return None
        values = {"rate": f"{facts.lr[able].max():.1e}", "highest": f"{highest[able].max():.1e}"}
        return Trouble("fault", (), {**values, "since": facts.step - self._stopped + 1}, "rate")

    def _lost_in_rounding(self, facts: Facts) -> Trouble | None:
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
        left &= ~facts.replacement
        return Trouble("fault", indices_of(left)) if left.any() else None


class StaleInOptimizer:
    """The optimizer steps tensors that are no longer the model's, and the model has others instead that no
    optimizer holds. The model is looked at every 16 steps."""

    cause, opens, closes = "stale-in-optimizer", 3, 3

    def __init__(self) -> None:
        self._last = np.zeros(0)
        """The last step in which each had a gradient."""

    def look(self, facts: Facts) -> Trouble | None:
        self._last = longer(self._last, len(facts.names), 0.0)
        self._last[facts.of("grad_norm") > 0] = facts.step
        if not facts.replaced.any():
            return None
        since = int(self._last[facts.replaced].max()) + 1
        return Trouble("fault", indices_of(facts.replaced), {"since": since})


class SharedMemory:
    """Two parameters lie over one memory, an optimizer holds both, and both have a gradient, in three
    steps."""

    cause, opens, closes = "shared-memory", 3, 3

    def look(self, facts: Facts) -> Trouble | None:
        shared = facts.shared & facts.learns & (facts.of("grad_norm") > 0)
        return Trouble("fault", indices_of(shared)) if shared.sum() > 1 else None


class Decay:
    """Weight decay takes a tenth of every weight or more in each step, for ten steps: no gradient gives it
    back."""

    cause, opens, closes = "decay", 10, 3
    SHARE = 0.1

    def look(self, facts: Facts) -> Trouble | None:
        erased = facts.owned & facts.learns & (facts.shrinks >= self.SHARE) & (facts.of("grad_norm") > 0)
        if not facts.taken or not erased.any():
            return None
        return Trouble("fault", indices_of(erased), {"share": f"{facts.shrinks[erased].max():.2g}"})


class WrittenBetween:
    """Something other than the optimizer writes to the weights between its steps, and undoes half of each
    step or more, for 20 steps in a row; or it writes ten times what a step does.

    Weights that are clipped or normalised after each step lose less of it, or all written entries end at one
    size; an average that is swapped in and out again leaves no difference.
    """

    cause, opens, closes = "written-between", 20, 3
    UNDONE = 0.5
    ALL_UNDONE = 0.9
    TIMES = 10
    """What is written, in lengths of the step."""

    def look(self, facts: Facts) -> Trouble | None:
        write = facts.write
        if write is None or write.projected:
            return None
        names = tuple(index for index in write.names if index < len(facts.names))
        if write.undone >= self.UNDONE and write.times < self.TIMES:
            severity = "fault" if write.undone >= self.ALL_UNDONE else "explained"
            return Trouble(severity, names, {"undone": f"{100 * min(write.undone, 1):.0f}"}, "undone")
        if write.times >= self.TIMES:
            return Trouble("warning", names, {"times": f"{write.times:.2g}"})
        return None
