"""Alerts about the size of the updates: `zero-lr` and `update-ratio`."""

from __future__ import annotations

import math

import numpy as np

from clinometer.monitoring.alerts.facts import Facts, Trouble, indices_of, median


class ZeroRate:
    """A learning rate of exactly 0 for 20 steps; a schedule may begin or end at 0, but not stay there."""

    cause, opens, closes = "zero-lr", 20, 1

    def look(self, facts: Facts) -> Trouble | None:
        zero = [i for i, rate in enumerate(facts.rates) if rate == 0]
        if not zero:
            return None
        everywhere = len(zero) == len(facts.rates)
        return Trouble("fault" if everywhere else "explained", (), {"groups": ", ".join(map(str, zero))})


class UpdateRatio:
    """The updates are too large or too small for the weights.

    Too large: for 20 steps at least half of the matrices are ten times as large as at the beginning and still
    change by more than a hundredth of their size a step, and the loss is not below nine tenths of its
    beginning. A high ratio alone is usual while small weights grow (lr 6e-3 on weights of 0.03 begins at
    0.2), and falls by itself as the weights grow, so it is not a sign.
    Too small: for 200 steps at a constant rate, the highest so far, half of the matrices change by less than
    a millionth of their size, though the gradient is not smaller than a tenth of what it was at first (a
    smaller one means that the run has converged).
    Weights that began at zero have no ratio.
    """

    cause, opens, closes = "update-ratio", 1, 50
    LARGE = 0.01
    LARGE_GROWTH = 10
    """Times the norm before the first step."""
    LARGE_STEPS = 20
    LARGE_LOSS = 0.9
    """Of the lowest of the first losses: below that the run learns."""
    FIRST_LOSSES = 3
    SMALL = 1e-6
    SMALL_STEPS = 200
    SMALL_NORM = 0.1
    """Of the median of the first total norms: below that the run has converged."""
    FIRST_NORMS = 20

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._norms: list[float] = []
        self._highest = 0.0
        self._large_in_a_row = self._small_in_a_row = 0

    def look(self, facts: Facts) -> Trouble | None:
        weight, update = facts.of("weight_norm"), facts.of("update_norm")
        loss, norm = facts.scalar("loss"), facts.scalar("total_norm")
        if len(self._norms) < self.FIRST_NORMS and math.isfinite(norm):
            self._norms.append(norm)
        if len(self._losses) < self.FIRST_LOSSES and math.isfinite(loss):
            self._losses.append(loss)
        constant = bool(facts.rates) and max(facts.rates) == self._highest
        self._highest = max([self._highest, *(rate for rate in facts.rates if rate == rate)])
        first = facts.first_norm
        able = facts.owned & facts.learns & facts.matrix & (first > 0) & np.isfinite(weight)
        able &= (facts.of("grad_norm") > 0) & (facts.lr != 0)
        if not facts.taken or able.sum() == 0:
            return None
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(able, update / weight, np.nan)
        ratios = ratio[able]
        half = math.nan if np.isnan(ratios).any() else median(ratios.tolist())
        worse = math.isfinite(loss) and bool(self._losses) and loss > self.LARGE_LOSS * min(self._losses)
        grown = able & (ratio > self.LARGE) & (weight > self.LARGE_GROWTH * first)
        self._large_in_a_row = self._large_in_a_row + 1 if worse and grown.sum() * 2 >= able.sum() else 0
        steep = bool(self._norms) and norm > self.SMALL_NORM * median(self._norms)
        self._small_in_a_row = self._small_in_a_row + 1 if half < self.SMALL and constant and steep else 0
        if self._large_in_a_row >= self.LARGE_STEPS:
            return Trouble("warning", indices_of(grown), {"ratio": f"{half:.1e}"}, "large")
        if self._small_in_a_row >= self.SMALL_STEPS:
            small = able & (ratio < self.SMALL)
            return Trouble("warning", indices_of(small), {"ratio": f"{half:.1e}"}, "small")
        return None
