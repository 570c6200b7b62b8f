"""Rules about the loop as a whole. The numbers are chosen so that a healthy run stays silent."""

from __future__ import annotations

import math
from collections import deque

from clinometer.monitoring.alerts.facts import Facts, median
from clinometer.monitoring.alerts.trouble import Trouble

WINDOW = 100
ENOUGH = 50


class Exploding:
    """The total norm leaves its range upwards.

    In a run under way: ten times the median of the last 100 steps and twice everything seen before, for five
    steps, while the loss, where it is known, is half as high again as its median. The second condition keeps
    silent about a run that had larger gradients at its beginning.
    At any time: ten thousand times the first steps' norm, with the loss ten times the first steps' loss.
    """

    cause, opens, closes = "exploding", 1, 20

    def __init__(self) -> None:
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._first_norm = self._first_loss = math.nan
        self._highest = 0.0
        self._row = 0

    def look(self, facts: Facts) -> Trouble | None:
        norm, loss = facts.scalar("total_norm"), facts.scalar("loss")
        if not math.isfinite(norm) or norm == 0:
            return None
        found = self._judge(norm, loss)
        if self._row == 0 and found is None:  # the range is that of the steps that were in order
            self._norms.append(norm)
            self._highest = max(self._highest, norm)
            if math.isfinite(loss):
                self._losses.append(loss)
            if math.isnan(self._first_norm):
                self._first_norm, self._first_loss = norm, loss
        return found

    def _judge(self, norm: float, loss: float) -> Trouble | None:
        if math.isfinite(self._first_norm) and norm > 1e4 * self._first_norm:
            beyond = (
                abs(loss) > 10 * abs(self._first_loss)
                if math.isfinite(loss)
                else norm > 1e6 * self._first_norm
            )
            if beyond:
                return Trouble("fault", (), self._values(norm, self._first_norm))
        if len(self._norms) < ENOUGH:
            return None
        usual = median(self._norms)
        worse = True
        if self._losses and math.isfinite(loss):
            middle = median(self._losses)
            worse = loss > middle + 0.5 * abs(middle)
        high = norm > 10 * usual and norm > 2 * self._highest and worse
        self._row = self._row + 1 if high else 0
        return Trouble("fault", (), self._values(norm, usual)) if self._row >= 5 else None

    @staticmethod
    def _values(norm: float, usual: float) -> dict[str, str]:
        return {"norm": f"{norm:.3g}", "usual": f"{usual:.3g}"}


class AlwaysClipped:
    """99 of the last 100 steps were clipped to less than a tenth. Clipping that often and that hard is no
    longer a guard against rare steps: it is the step size."""

    cause, opens, closes = "always-clipped", 1, 1
    _HARD = 0.1

    def __init__(self) -> None:
        self._clipped: deque[bool] = deque(maxlen=WINDOW)
        self._factors: deque[float] = deque(maxlen=WINDOW)
        self._on = False

    def look(self, facts: Facts) -> Trouble | None:
        clip = facts.scalar("clip")
        if not math.isfinite(clip) or facts.clipped_while_scaled:
            return None
        self._clipped.append(clip < self._HARD)
        self._factors.append(clip)
        if len(self._clipped) < WINDOW:
            return None
        share = sum(self._clipped) / WINDOW
        self._on = share >= (0.9 if self._on else 0.99)
        if not self._on:
            return None
        values = {
            "factor": f"{median(self._factors):.2g}",
            "max_norm": f"{facts.scalar('max_norm'):.3g}",
            "norm": f"{facts.scalar('total_norm'):.3g}",
        }
        return Trouble("warning", (), values)


class LossSpike:
    """One loss far above all of the last 50 to 100: above the highest of them by three times what lies
    between that and their median, and by half of the median; and no smaller than a hundredth of the first
    losses (below that a run has converged, and a jump says nothing). A loss that takes both signs (a policy
    gradient's) has no level to be measured by: there it must swing wider than ever before."""

    cause, opens, closes = "loss-spike", 1, 10

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._first: list[float] = []
        self._lowest, self._highest = math.inf, -math.inf
        self._widest = 0.0
        """The largest distance of a loss from the median of those before it."""

    def look(self, facts: Facts) -> Trouble | None:
        loss = facts.scalar("loss")
        if not math.isfinite(loss):
            return None
        if len(self._first) < 20:
            self._first.append(loss)
        self._lowest, self._highest = min(self._lowest, loss), max(self._highest, loss)
        usual = median(self._losses) if self._losses else loss
        found = self._judge(loss, usual)
        self._widest = max(self._widest, abs(loss - usual))
        # A run that stays up there has a new level; until then it is judged by the old one.
        self._losses.append(loss)
        return found

    def _judge(self, loss: float, usual: float) -> Trouble | None:
        if len(self._losses) < ENOUGH:
            return None
        highest = max(self._losses)
        if loss <= highest + max(3 * (highest - usual), 0.5 * abs(usual)):
            return None
        if loss - usual < 0.01 * median(map(abs, self._first)):
            return None
        if self._lowest < 0 < self._highest and loss - usual <= self._widest:
            return None
        return Trouble("warning", (), {"loss": f"{loss:.4g}", "usual": f"{usual:.4g}"})


class ZeroRate:
    """A learning rate of exactly 0 for 20 steps; a schedule may begin or end there, but does not stay."""

    cause, opens, closes = "zero-lr", 20, 1

    def look(self, facts: Facts) -> Trouble | None:
        zero = [i for i, rate in enumerate(facts.rates) if rate == 0]
        if not zero:
            return None
        everywhere = len(zero) == len(facts.rates)
        return Trouble("fault" if everywhere else "explained", (), {"groups": ", ".join(map(str, zero))})


class Accumulating:
    """Ten steps in a row whose gradients were added to those of the step before."""

    cause, opens, closes = "accumulating", 10, 3

    def look(self, facts: Facts) -> Trouble | None:
        return Trouble("fault") if facts.piled_up else None


class UnscaledAmp:
    """Clipping between scale() and unscale_(); three times, because once may be a trial."""

    cause, opens, closes = "unscaled-amp", 3, 10

    def look(self, facts: Facts) -> Trouble | None:
        if not facts.clipped_while_scaled:
            return None
        return Trouble("fault", (), {"scale": f"{facts.scalar('grad_scale'):.0f}"})


RUN_RULES = (Exploding, AlwaysClipped, LossSpike, ZeroRate, Accumulating, UnscaledAmp)
