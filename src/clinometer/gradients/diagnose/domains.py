"""Where functions of one number are defined, and where they or their slopes are infinite."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Domain:
    """A function is defined from `low` to `high`; at a finite end it or its slope is infinite."""

    low: float = -math.inf
    high: float = math.inf
    safe: float = 1.0
    """An argument for which value and slope are moderate."""
    argument: str = "self"
    """torch's name of the argument that has these limits."""
    inverse: Callable[[Tensor], Tensor] | None = None
    """The argument of a result, exact at the end, for operations that save their result only."""
    every_whole_number: bool = False
    """Infinite at `low` and at every whole number below it, and defined between them."""

    @property
    def symbol(self) -> str:
        """The argument in formulas: xlogy(x, y) is x log y, which limits y."""
        return "y" if self.argument == "other" else "x"

    @property
    def text(self) -> str:
        """The domain as a formula: "−1 ≤ x ≤ 1"."""
        low = "" if math.isinf(self.low) else f"{_sign(self.low)} ≤ "
        high = "" if math.isinf(self.high) else f" ≤ {_sign(self.high)}"
        if low and not high:
            return f"{self.symbol} ≥ {_sign(self.low)}"
        return f"{low}{self.symbol}{high}"

    def clamp(self, dtype: torch.dtype) -> str:
        """The call that keeps an argument off the ends: "clamp(min=1 + 1e-06)"."""
        ends = []
        for name, end, sign in (("min", self.low, "+"), ("max", self.high, "-")):
            if math.isfinite(end):
                far = distance(end, dtype)
                ends.append(f"{name}={end:g} {sign} {short(far)}" if end else f"{name}={short(far)}")
        return f"clamp({', '.join(ends)})"

    def end_at(self, values: Tensor) -> float | None:
        """The end that one of the values is; None if none is."""
        if self.every_whole_number:
            hit = values[(values <= self.low) & (values == values.floor())]
            return float(hit[0]) if hit.numel() else None
        return next((end for end in self._ends if bool((values == end).any())), None)

    def end_near(self, values: Tensor) -> tuple[float, float] | None:
        """A value that lies inside, but nearer to an end than `clamp` leaves it, and that end."""
        if self.every_whole_number:
            whole = values.round()
            hit = (whole <= self.low) & ((values - whole).abs() < distance(self.low, values.dtype))
            return (float(values[hit][0]), float(whole[hit][0])) if bool(hit.any()) else None
        for end in self._ends:
            near = values[(values - end).abs() < distance(end, values.dtype)]
            if near.numel():
                return float(near[0]), end
        return None

    def outside(self, values: Tensor) -> float | None:
        """A value for which the function is not defined; None if there is none."""
        if self.every_whole_number:
            return None
        hit = values[(values < self.low) | (values > self.high)]
        return float(hit[0]) if hit.numel() else None

    @property
    def _ends(self) -> list[float]:
        return [end for end in (self.low, self.high) if math.isfinite(end)]


def distance(end: float, dtype: torch.dtype) -> float:
    """How far from an end an argument of this type should stay: far more than its rounding there."""
    if dtype is torch.float16 or (dtype is torch.bfloat16 and end):
        return 1e-2
    return 1e-6 if end else 1e-12


def short(number: float) -> str:
    """A number as a person writes it in code: "1e-6"."""
    return f"{number:g}".replace("e-0", "e-").replace("e+0", "e")


def _sign(end: float) -> str:
    return f"{end:g}".replace("-", "−")


DOMAINS = {
    "sqrt": Domain(0, inverse=torch.square),
    "rsqrt": Domain(0, inverse=lambda result: result.reciprocal().square()),
    "log": Domain(0),
    "log2": Domain(0),
    "log10": Domain(0),
    "log1p": Domain(-1, safe=0.0),
    "acos": Domain(-1, 1, safe=0.0),
    "asin": Domain(-1, 1, safe=0.0),
    "acosh": Domain(1, safe=2.0),
    "atanh": Domain(-1, 1, safe=0.0),
    "logit": Domain(0, 1, safe=0.5),
    "erfinv": Domain(-1, 1, safe=0.0),
    "specialndtri": Domain(0, 1, safe=0.5),
    "specialentr": Domain(0),
    "xlogy": Domain(0, argument="other"),
    "specialxlog1py": Domain(-1, safe=0.0, argument="other"),
    "lgamma": Domain(0, every_whole_number=True),
    "digamma": Domain(0, every_whole_number=True),
    "polygamma": Domain(0, every_whole_number=True),
}
"""By canonical name."""
