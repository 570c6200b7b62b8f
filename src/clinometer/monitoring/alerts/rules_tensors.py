"""Rules about tensors. The numbers are chosen so that a healthy run stays silent; each says why it is so."""

from __future__ import annotations

import math
from collections import deque

import numpy as np

from clinometer.monitoring.alerts.facts import Facts, median
from clinometer.monitoring.alerts.trouble import Trouble


def _indices(mask: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.flatnonzero(mask))


def _highest(before: np.ndarray, now: np.ndarray) -> np.ndarray:
    """The highest so far of each tensor; there may be more of them now."""
    if len(before) == len(now):
        return np.fmax(before, now)
    return np.fmax(np.concatenate([before, np.zeros(len(now) - len(before))]), now)


class NonFinite:
    """A NaN or Inf in a gradient: one is enough. Where a loss scaler is at work it looks for its scale by
    overflowing, so there only a row of overflows counts: 20 of them take the usual 2¹⁶ below 1.

    A loss that is NaN, three steps in a row, with gradients that are finite: a batch whose targets are all
    ignored gives 0/0 and no gradient, and one such batch is nobody's fault."""

    cause, opens, closes = "non-finite", 1, 10
    _PATIENCE, _LOSSES = 20, 3

    def __init__(self) -> None:
        self._row = self._losses = 0

    def look(self, facts: Facts) -> Trouble | None:
        bad = facts.of("grad_nonfinite") > 0
        loss = facts.scalars.get("loss", 0.0)
        if not bad.any():
            self._row = 0
            self._losses = self._losses + 1 if math.isnan(loss) and facts.backwards else 0
            if self._losses < self._LOSSES:
                return None
            return Trouble("fault", (), {}, "loss")
        self._row += 1
        if facts.scaler and not facts.taken and self._row < self._PATIENCE:
            return None
        count = int(np.nansum(facts.of("grad_nonfinite")))
        return Trouble("fault", _indices(bad), {"entries": count})


class Dead:
    """Every entry of a gradient exactly zero, for 50 steps, while other tensors have one.

    A zero step or two is usual: what stands above a zero-initialised weight (LoRA's A, a gated branch) has no
    gradient until that weight has moved. A bias beside a weight that has a gradient cancels out of the loss
    (a Wasserstein critic's last one: it adds the same to real and fake), and that is no fault.
    """

    cause, opens, closes = "dead", 50, 10

    def look(self, facts: Facts) -> Trouble | None:
        dead = (facts.of("grad_zeros") == 1) & (facts.numel > 0) & facts.learns
        alive = facts.of("grad_norm") > 0
        if not dead.any() or not alive.any():
            return None
        living = {facts.names[i] for i in np.flatnonzero(alive)}
        for index in np.flatnonzero(dead):
            stem = facts.names[index].removesuffix("bias")
            dead[index] = stem == facts.names[index] or f"{stem}weight" not in living
        if not dead.any():
            return None
        return Trouble("warning", _indices(dead))


class NoGradient:
    """From the model's first matrix on, no gradient at all for 50 steps, though the optimizer holds the
    tensors and others of the step have one: most likely detach() or no_grad() stands between.

    Only with the first matrix among them. What is never used stands at the end (a pooler, a second task's
    head), and a model that carries it along is healthy.

    Or none at all has one when the step is taken, though backward reached them: zero_grad() stands between.
    """

    cause, opens, closes = "no-gradient", 50, 3

    def look(self, facts: Facts) -> Trouble | None:
        able = facts.stepped & facts.learns & (facts.numel > 0)
        norm = facts.of("grad_norm")
        first = np.flatnonzero(able & facts.matrix)[:1]
        if not facts.taken or not first.size or not np.isnan(norm[first[0]]):
            return None
        if facts.backwards and np.isnan(norm).all():
            return Trouble("fault", _indices(able), {}, "none")
        if not (norm[able] > 0).any():
            return None
        return Trouble("warning", _indices(able & np.isnan(norm)))


class NeverMoves:
    """A gradient, a learning rate, a step taken, and not one number changed, for 20 steps.

    Only tensors whose gradient is no rounding noise beside the others' (1/1000 of the median): a key bias has
    a gradient of zero in exact arithmetic, and nobody expects it to move; nor beside its own highest so far
    (1/100): what has converged stops. And only while the rate has settled: a search for a learning rate
    begins where nothing moves (it rises by more than a tenth in 20 steps, as a warm-up does), and a decaying
    one ends there (it is below a tenth of its highest).
    """

    cause, opens, closes = "never-moves", 20, 3

    def __init__(self) -> None:
        self._rates: deque[np.ndarray] = deque(maxlen=self.opens)
        self._highest_rate = self._highest_rms = np.zeros(0)

    def look(self, facts: Facts) -> Trouble | None:
        rms = facts.grad_rms
        able = facts.owned & facts.learns & (facts.lr != 0) & np.isfinite(rms) & (rms > 0)
        able &= self._settled(facts.lr)
        self._highest_rms = _highest(self._highest_rms, np.where(np.isfinite(rms), rms, 0))
        able &= rms > 0.01 * self._highest_rms
        if not facts.taken or not able.any():
            return None
        able &= rms > 1e-3 * median(rms[able].tolist())
        still = able & (facts.of("update_norm") == 0)
        if not still.any():
            return None
        severity = "fault" if still.sum() > able.sum() / 2 else "warning"
        return Trouble(severity, _indices(still))

    def _settled(self, rates: np.ndarray) -> np.ndarray:
        if self._rates and len(self._rates[0]) != len(rates):  # tensors came
            self._rates.clear()
        self._rates.append(rates)
        self._highest_rate = _highest(self._highest_rate, rates)
        # Where no rate is known both comparisons with NaN are false.
        return ~(rates > 1.1 * self._rates[0]) & ~(rates < 0.1 * self._highest_rate)


class MovedWhileFrozen:
    """requires_grad is False, and the optimizer's step moved it: an old gradient is still in .grad. Three
    steps, because one may lie between the freezing and our looking."""

    cause, opens, closes = "moved-while-frozen", 3, 3

    def look(self, facts: Facts) -> Trouble | None:
        moved = facts.owned & ~facts.learns & (facts.of("update_norm") > 0)
        return Trouble("fault", _indices(moved)) if moved.any() else None


class NotInOptimizer:
    """It gets a gradient at each of 20 steps, no watched optimizer holds it, and nobody else moved it."""

    cause, opens, closes = "not-in-optimizer", 20, 3

    def look(self, facts: Facts) -> Trouble | None:
        left = ~facts.owned & facts.learns & ~facts.moved_elsewhere & (facts.of("grad_norm") > 0)
        return Trouble("fault", _indices(left)) if left.any() else None


class Vanishing:
    """Among matrices of one kind in four or more layers, the first layer's gradient is below 1/10,000 of the
    last one's, and the second's below 1/1,000, for 30 steps. Healthy deep networks keep within 1/100."""

    cause, opens, closes = "vanishing", 30, 30
    _FIRST, _SECOND = 1e-4, 1e-3

    def look(self, facts: Facts) -> Trouble | None:
        rms = facts.grad_rms
        kind, layer = facts.tensors.kind, facts.tensors.layer
        found: list[int] = []
        worst = 1.0
        able = np.flatnonzero(facts.matrix & (rms > 0) & np.isfinite(rms) & ~np.isnan(layer))
        able = able[np.lexsort((layer[able], kind[able]))]
        begins = np.flatnonzero(np.diff(kind[able], prepend=-1))
        for start, stop in zip(begins.tolist(), np.append(begins[1:], len(able)).tolist(), strict=False):
            if stop - start < 4:
                continue
            members = able[start:stop]
            first, second, last = rms[members[0]], rms[members[1]], rms[members[-1]]
            if first < self._FIRST * last and second < self._SECOND * last:
                found += members[rms[members] < self._SECOND * last].tolist()
                worst = min(worst, first / last)
        if not found:
            return None
        return Trouble("warning", tuple(sorted(found)), {"ratio": f"{worst:.0e}"})


class UpdateRatio:
    """The steps are too large or too small for the weights.

    Too large: for 20 steps at least half of the matrices are ten times as large as at the beginning and still
    change by more than a hundredth of their size a step, and the loss is not below nine tenths of its
    beginning. A high ratio alone is usual while small weights grow (lr 6e-3 on weights of 0.03 begins at
    0.2), and falls by itself as the steps pile up, so it is no sign.
    Too small: for 200 steps at a constant rate, the highest so far, half of the matrices change by less than
    a millionth of their size, though the gradient is no smaller than a tenth of what it was at first (so the
    run has not simply converged).
    Weights that began at zero have no ratio.
    """

    cause, opens, closes = "update-ratio", 1, 50
    _LARGE, _SMALL = 0.01, 1e-6

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._norms: list[float] = []
        self._highest = 0.0
        self._large = self._small = 0

    def look(self, facts: Facts) -> Trouble | None:
        weight, update = facts.of("weight_norm"), facts.of("update_norm")
        loss, norm = facts.scalar("loss"), facts.scalar("total_norm")
        if len(self._norms) < 20 and math.isfinite(norm):
            self._norms.append(norm)
        if len(self._losses) < 3 and math.isfinite(loss):
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
        worse = math.isfinite(loss) and bool(self._losses) and loss > 0.9 * min(self._losses)
        grown = able & (ratio > self._LARGE) & (weight > 10 * first)
        self._large = self._large + 1 if worse and grown.sum() * 2 >= able.sum() else 0
        steep = bool(self._norms) and norm > 0.1 * median(self._norms)
        self._small = self._small + 1 if half < self._SMALL and constant and steep else 0
        if self._large >= 20:
            return Trouble("warning", _indices(grown), {"ratio": f"{half:.1e}"}, "large")
        if self._small >= 200:
            small = able & (ratio < self._SMALL)
            return Trouble("warning", _indices(small), {"ratio": f"{half:.1e}"}, "small")
        return None


TENSOR_RULES = (
    NonFinite,
    Dead,
    NoGradient,
    NeverMoves,
    MovedWhileFrozen,
    NotInOptimizer,
    Vanishing,
    UpdateRatio,
)
