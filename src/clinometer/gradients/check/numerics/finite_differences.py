"""Numeric derivatives of a scalar along a direction, and when one may be trusted against a gradient.

    D(h) = [L(θ+hv) − L(θ−hv)] / 2h          R(h) = [4 D(h/2) − D(h)] / 3 = L'(0) + O(h⁴)

One disagreement is no verdict: near a corner (ReLU, max, a routing decision) R mixes two slopes. An error
counts as real only if smaller steps keep seeing the same one and both sides of the point have one slope.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps
STEP = EPS**0.2
"""Where Richardson's truncation h⁴ meets the rounding ε/h."""
RELATIVE = 1e-9
ROUNDING = 20.0
FLOOR = 1e-2
"""A tensor of zeros still has to be moved: its direction has at least this size."""
FINER = 8.0
AGREE = 0.05
"""Two steps see the same error if their estimates of it differ by less than this share."""
EXPLAINS = 10.0
"""Where many corners meet, jumps cancel in the sum: one explains an error ten times as large."""
DIRECTIONS = 3
"""An error shows in every direction, a corner in some: only what this many see is called wrong."""
COARSEST = 1e-6
"""Of ‖g⊙v‖₂: where rounding hides more than this, a number says nothing."""
_SMALLEST = 1e-11
_NEAR = 1e-9
_LAST = 1e-13
"""So near that only the last digits move."""
_LOST = 1e-6
"""Of the scalar: what its own rounding may be, large numbers in it that cancel included."""

Verdict = Literal["passed", "wrong", "kink", "unclear"]
Along = Callable[[float], float]


@dataclass(frozen=True)
class Judgement:
    """One direction: the derivative by the gradient, by numbers, and what may be concluded."""

    verdict: Verdict
    analytic: float
    numeric: float
    tolerance: float
    step: float
    jump: float = 0.0
    """Right-hand minus left-hand slope, where it was looked at."""
    scale: float = 0.0
    """‖g⊙v‖₂: what the error is a share of."""

    @property
    def error(self) -> float:
        return self.numeric - self.analytic

    @property
    def share(self) -> float:
        """The error, relative to the gradient or to the differences, whichever is larger."""
        return abs(self.error) / max(self.scale, abs(self.numeric), 1e-300)


_UNMOVED = 1e100
"""Beside an entry of a tensor whose norm is infinite: from here on an entry is a mask's."""


def direction(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """`v = s·z`, z ~ N(0, I), s = max(RMS(θ), 1e-2), in double precision.

    Gaussian, because ±1 misses an exact cancellation of two entries half the time, and any fixed sign
    pattern misses what is orthogonal to it. An entry near the largest number there is (what a mask fills in:
    finfo.min, infinity) stays: no step of the others' size moves it.
    """
    values = reals(tensor)
    z = torch.empty(values.shape, dtype=torch.float64).normal_(generator=generator).to(values.device)
    norm = float(torch.linalg.vector_norm(values, dtype=torch.float64))
    if not math.isfinite(norm):
        fixed = ~(values.abs() < _UNMOVED)
        z.masked_fill_(fixed, 0.0)
        norm = float(torch.linalg.vector_norm(values.masked_fill(fixed, 0.0), dtype=torch.float64))
    return z.mul_(max(norm / math.sqrt(max(1, values.numel())), FLOOR))


def reals(tensor: Tensor) -> Tensor:
    """The numbers of a tensor, a complex one as pairs; shares its memory."""
    tensor = tensor.detach()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def tolerance(scale: float, magnitude: float, step: float) -> float:
    """`1e-9·‖g⊙v‖₂ + 20·ε·|L|/h`: never a share of ⟨g,v⟩, which can vanish."""
    return RELATIVE * scale + ROUNDING * EPS * magnitude / step


def richardson(along: Along, h: float) -> float:
    """`R(h)`, from four values of the scalar."""
    wide = (along(h) - along(-h)) / (2 * h)
    narrow = (along(h / 2) - along(-h / 2)) / h
    return (4 * narrow - wide) / 3


def romberg(along: Along, h: float) -> float:
    """`[16 R(h/2) − R(h)] / 15 = L'(0) + O(h⁶)`: curvature's error is gone at a step that rounding bears."""
    return (16 * richardson(along, h / 2) - richardson(along, h)) / 15


def jump(along: Along, here: float, h: float) -> float:
    """Right-hand minus left-hand slope, each to second order; O(h²) where the scalar is smooth."""
    right = (4 * along(h / 2) - along(h) - 3 * here) / h
    left = (3 * here - 4 * along(-h / 2) + along(-h)) / h
    return right - left


def judge(along: Along, analytic: float, scale: float, magnitude: float, here: float) -> Judgement:
    """The verdict on one direction; `_judge` says what it means."""
    return replace(_judge(along, analytic, scale, magnitude, here), scale=scale)


def _judge(along: Along, analytic: float, scale: float, magnitude: float, here: float) -> Judgement:
    """Whether `analytic` is the slope at 0 of `along`.

    passed   within `tolerance` at the largest step that is free of corners and curvature; or within the
             rounding that was measured, where that is more
    wrong    the same error at three steps (8× apart, or 2× where rounding forbids smaller ones), and
             both sides of the point have one slope
    kink     a corner at the point itself may explain the error
    unclear  no step gives a number to trust
    """
    seen: dict[float, float] = {}

    def value(t: float) -> float:
        if t not in seen:
            seen[t] = along(t)
        return seen[t]

    def allow(step: float) -> float:
        """Rounding is that of the largest value in the stencil, be the one at the point ever so small."""
        near = [abs(v) for t, v in seen.items() if abs(t) <= step and math.isfinite(v)]
        return tolerance(scale, max([magnitude, *near]), step)

    h = STEP
    numeric = richardson(value, h)
    allowed = allow(h)
    error = numeric - analytic
    if abs(error) <= allowed:
        return Judgement("passed", analytic, numeric, allowed, h)
    stable, before = 0, math.nan
    while h / FINER > _SMALLEST:
        finer = h / FINER
        coarse = allow(finer)
        # Rounding would hide this error; unless it is shrinking with the step anyway, as curvature's does.
        if math.isfinite(error) and coarse > abs(error) / 4 and not abs(error) < abs(before) / 4:
            better, wider = romberg(value, h), allow(h / 4)
            if abs(better - analytic) <= min(wider, abs(error) / 4):  # it was curvature's
                return Judgement("passed", analytic, better, wider, h / 4)
            break
        h, before = finer, error
        numeric = richardson(value, h)
        allowed = allow(h)
        error = numeric - analytic
        if abs(error) <= allowed:
            return Judgement("passed", analytic, numeric, allowed, h)
        stable = stable + 1 if abs(error - before) <= AGREE * abs(error) + allowed else 0
        if stable == 2:
            break
    if stable < 2 and not _seen_nearby(value, analytic, error, h):
        first, measured = richardson(value, STEP), RELATIVE * scale + 4 * _noise(along, analytic, here) / STEP
        if abs(first - analytic) <= measured <= COARSEST * scale:
            return Judgement("passed", analytic, first, measured, STEP)
        return Judgement("unclear", analytic, numeric, allowed, h)
    steps = (h, FINER * h) if stable == 2 else (h, 2 * h, h / 2)
    if not _settled(value, here, steps, allow):
        return Judgement("unclear", analytic, numeric, allowed, h)
    corner = _corner(value, here, h, allowed)
    verdict = "kink" if abs(error) <= EXPLAINS * abs(corner) else "wrong"
    return Judgement(verdict, analytic, numeric, allowed, h, corner)


def _settled(along: Along, here: float, steps: tuple[float, ...], allow: Callable[[float], float]) -> bool:
    """Whether the differences are those of a scalar that is smooth down to the last digits.

    Beside an analytic slope of 1e20 every number is 0: past a pole, where a tanh is flat, or where a sine
    turns many times within the step, differences are no derivative. There they change with the step, or the
    scalar changes by more than rounding when only the last digits move.
    """
    h, first = steps[0], richardson(along, steps[0])
    noise = max(abs(along(t) - here - t * first) for t in (_LAST, -2 * _LAST))
    largest = max(abs(here), abs(along(h)), abs(along(-h)))
    margin = AGREE * abs(first) + allow(h / 2) + 8 * noise / h
    return noise <= _LOST * largest and all(abs(richardson(along, step) - first) <= margin for step in steps)


def _corner(along: Along, here: float, h: float, allowed: float) -> float:
    """The jump of the slope at the point; 0 where it shrinks with the step, as curvature does."""
    wide, narrow = jump(along, here, h), jump(along, here, h / 2)
    return narrow if abs(narrow) > max(0.7 * abs(wide), 4 * allowed) else 0.0


def _noise(along: Along, analytic: float, here: float) -> float:
    """What rounding makes of the scalar so near that it cannot have changed otherwise.

    ε·|L| is too little where L is small and made of large numbers, as the cross-entropy of a model that has
    learnt its batch is: log Σ exp − logit.
    """
    return max(abs(along(t) - here - t * analytic) for k in (1, 2, 3) for t in (k * _NEAR, -k * _NEAR))


def _seen_nearby(along: Along, analytic: float, error: float, h: float) -> bool:
    """Whether 2h and h/2 see the error that h saw: all there is when rounding hides it at h/8."""
    return all(
        abs(richardson(along, near) - analytic - error) <= 2 * AGREE * abs(error) for near in (2 * h, h / 2)
    )
