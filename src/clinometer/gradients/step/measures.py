"""What one optimizer step did to a tensor, in numbers: the real step against its float64 replay."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from clinometer.gradients.step.formulas import FORMULAS, Formula
from clinometer.gradients.step.optimizer_state import OptimizerState, ReplayedUpdate, wide
from clinometer.gradients.step.rounding import spread_of_roundings, ulp

ULP_ALLOWED = 4.0
"""Measured over a million entries a step of torch's single, foreach and fused updates: at most 1.9."""
_SPREADS = 1.5
"""Times the spread of the roundings that were tried, a step may lie apart."""
_COARSE = 1e-4
"""Dtypes with a larger ε are compared with the spread of their roundings from the first."""


@dataclass(frozen=True, eq=False)
class WeightMove:
    """One tensor around a step: copies, so that what happens afterwards changes nothing here."""

    name: str
    status: str
    """"stepped"; "unknown" (no formula); "shared" (its memory is another parameter's too); "no-gradient";
    "not-held" (by the optimizer); "skipped"."""
    before: Tensor
    after: Tensor
    held: OptimizerState | None = None
    raw: Tensor | None = None
    """The gradient before clipping, where it was seen."""
    clip: float | None = None
    """The factor of clipping, where it is known."""
    formula: str | None = None

    def part(self, index: Any) -> WeightMove:
        """The same of some entries only."""
        held = self.held
        if held is not None:
            state = {
                key: value[index]
                if isinstance(value, Tensor) and value.shape == self.before.shape and value.dim()
                else value
                for key, value in held.state.items()
            }
            held = replace(held, theta=held.theta[index], grad=held.grad[index], state=state)
        raw = None if self.raw is None else self.raw[index]
        return WeightMove(
            self.name,
            self.status,
            self.before[index],
            self.after[index],
            held,
            raw,
            self.clip,
            self.formula,
        )

    def replay(self, function: Formula, index: Any = None) -> ReplayedUpdate:
        """The step in float64; by `index` only those entries, as cheaply as the formula allows."""
        if self.held is None:
            raise ValueError(f"nothing to replay: {self.status}")
        if index is None:
            return function(self.held)
        if self.formula is None or not FORMULAS[self.formula].of_whole:
            return function(self.part(index).held)  # pyright: ignore[reportArgumentType]
        whole = function(self.held)
        chosen = {
            f.name: getattr(whole, f.name)[index]
            for f in fields(whole)
            if f.name not in ("quantities", "numbers")
        }
        quantities = tuple(
            q._replace(before=_at(q.before, index), after=_at(q.after, index)) for q in whole.quantities
        )
        return ReplayedUpdate(quantities=quantities, numbers=whole.numbers, **chosen)

    @property
    def precision(self) -> torch.dtype:
        """The dtype the step is rounded to: the weight's, or that of an lr tensor that is coarser."""
        options = self.held.options.values() if self.held is not None else ()
        kinds = [v.dtype for v in options if isinstance(v, Tensor) and v.is_floating_point()]
        return max([_real(self.before.dtype), *kinds], key=lambda dtype: torch.finfo(dtype).eps)

    @property
    def coarsest(self) -> torch.dtype:
        """The coarsest dtype among those of the weight, its gradient and its state: the step computes in
        it."""
        kinds = [self.precision]
        if self.held is not None:
            kept = [self.held.grad, *self.held.state.values()]
            kinds += [
                _real(value.dtype)
                for value in kept
                if isinstance(value, Tensor)
                and value.dim()
                and (value.is_floating_point() or value.is_complex())
            ]
        return max(kinds, key=lambda dtype: torch.finfo(dtype).eps)

    @property
    def gradient(self) -> Tensor | None:
        """The loss's own gradient in float64: before clipping, where that was seen or its factor is known."""
        if self.raw is not None:
            return wide(self.raw)
        if self.held is None:
            return None
        return wide(self.held.grad) / (self.clip or 1.0)


@dataclass(frozen=True)
class Measures:
    """Sums over entries: those of several tensors add up."""

    numbers: int = 0
    weight_sq: float = 0.0
    change_sq: float = 0.0
    predicted: float = 0.0
    momentum: float = 0.0
    fresh: float = 0.0
    update: float = 0.0
    decay: float = 0.0
    wanted_sq: float = 0.0
    lost_sq: float = 0.0
    wanted_to_move: int = 0
    stayed: int = 0
    missed: int = 0
    worst_ulp: float = 0.0
    worst_index: tuple[int, ...] | None = None
    gradient_sq: float = 0.0
    replayed: int = 0
    """How many of the numbers were replayed by a formula."""

    def __add__(self, other: Measures) -> Measures:
        summed = {
            f.name: getattr(self, f.name) + getattr(other, f.name)
            for f in fields(self)
            if f.name not in ("worst_ulp", "worst_index")
        }
        worst = max(self, other, key=lambda m: m.worst_ulp)
        return Measures(**summed, worst_ulp=worst.worst_ulp, worst_index=worst.worst_index)

    @property
    def rms_update(self) -> float:
        """√mean Δθ²: how far a weight moved."""
        return math.sqrt(self.change_sq / self.numbers) if self.numbers else 0.0

    @property
    def update_ratio(self) -> float:
        """‖Δθ‖ / ‖θ‖; infinite for a tensor that was zero."""
        return _ratio(math.sqrt(self.change_sq), math.sqrt(self.weight_sq), math.inf)

    @property
    def momentum_share(self) -> float:
        """Σ|from earlier batches| / (Σ|from earlier batches| + Σ|from this batch|) of the update."""
        return _ratio(self.momentum, self.momentum + self.fresh)

    @property
    def decay_share(self) -> float:
        """Σ|decay| / (Σ|decay| + Σ|update|)."""
        return _ratio(self.decay, self.decay + self.update)

    @property
    def swallowed(self) -> float:
        """Of the entries that the float64 step moves, the share that stayed where they were."""
        return _ratio(self.stayed, self.wanted_to_move)

    @property
    def lost(self) -> float:
        """‖float64 step − real step‖ / ‖float64 step‖."""
        return math.sqrt(_ratio(self.lost_sq, self.wanted_sq))

    @property
    def cosine(self) -> float:
        """Of Δθ with −g, the direction in which the loss falls fastest."""
        return _ratio(-self.predicted, math.sqrt(self.gradient_sq * self.change_sq))

    def to_dict(self) -> dict[str, Any]:
        """What a machine reads; shares only where a formula was replayed."""
        told = {
            "numbers": self.numbers,
            "rms_update": self.rms_update,
            "update_ratio": self.update_ratio,
            "cosine": self.cosine,
            "predicted": self.predicted,
        }
        if self.replayed:
            told |= {
                "momentum_share": self.momentum_share,
                "decay_share": self.decay_share,
                "swallowed": self.swallowed,
                "lost": self.lost,
                "missed": self.missed,
                "worst_ulp": self.worst_ulp,
                "worst_index": None if self.worst_index is None else list(self.worst_index),
            }
        return told


def measure(
    moved: WeightMove, function: Formula | None, again: Callable[[], ReplayedUpdate] | None = None
) -> Measures:
    """The measures of one tensor; without a formula only what needs none.

    `again` computes the replay: for a part, where the formula needs the whole tensor.
    """
    if moved.before.is_meta:  # offloaded: its values are elsewhere
        return Measures()
    before, after = wide(moved.before), wide(moved.after)
    change = after - before
    gradient = moved.gradient
    told: dict[str, Any] = {
        "numbers": before.numel(),
        "weight_sq": _sum(before.square()),
        "change_sq": _sum(change.square()),
    }
    if gradient is not None:
        told |= {"predicted": _sum(gradient * change), "gradient_sq": _sum(gradient.square())}
    if function is None or moved.status != "stepped" or not before.numel():
        return Measures(**told)
    again = again or (lambda: moved.replay(function))
    replay = again()
    ulps = ulps_apart(moved, replay, again)
    wanted = replay.theta - before
    moving = wanted != 0
    worst = int(ulps.argmax())
    return Measures(
        **told,
        momentum=_sum(replay.momentum.abs()),
        fresh=_sum(replay.fresh.abs()),
        update=_sum(replay.update.abs()),
        decay=_sum(replay.decay.abs()),
        wanted_sq=_sum(wanted.square()),
        lost_sq=_sum((wanted - change).square()),
        wanted_to_move=int(moving.sum()),
        stayed=int((moving & (change == 0)).sum()),
        missed=int((ulps > ULP_ALLOWED).sum()),
        worst_ulp=float(ulps.reshape(-1)[worst]),
        worst_index=_unravel(worst, before.shape),
        replayed=before.numel(),
    )


def ulps_apart(
    moved: WeightMove, replay: ReplayedUpdate, again: Callable[[], ReplayedUpdate] | None = None
) -> Tensor:
    """|θ after − replay| in units of the rounding to expect: ulp(θ) + 5/4 ε·(|momentum| + |fresh|).

    ulp(θ) is that of max(|θ before|, |θ after|), and for most weights there is nothing else to see. Near
    zero the parts of the update are larger than the weight, and it cannot be more exact than they are:
    about ten roundings lie on the way to them. What is still outside is asked of the roundings themselves,
    if `again` computes the replay: the unit is then their spread, where that is larger. What the step
    itself made NaN or infinite of finite numbers is reported as that (`made_nonfinite`), not as another
    formula.
    """
    before, after = wide(moved.before), wide(moved.after)
    unit = ulp(torch.maximum(before.abs(), after.abs()), moved.precision)
    unit = unit + 1.25 * torch.finfo(moved.precision).eps * replay.rounded.nan_to_num(0.0, 0.0, 0.0)
    apart = _distance(after, replay.theta)
    found = apart / unit
    if again is None or not bool((found > ULP_ALLOWED).any()):
        return found
    spread = spread_of_roundings(lambda: again().theta, replay.theta, moved.coarsest)
    unit = torch.maximum(unit, _SPREADS / ULP_ALLOWED * spread)
    made = ~after.isfinite() & before.isfinite()
    if moved.held is not None:
        made &= wide(moved.held.grad).isfinite()
    return torch.where(made, 0.0, apart / unit)


def misses(moved: WeightMove, function: Formula) -> Tensor:
    """Where the step cannot be the formula's."""
    coarse = torch.finfo(moved.coarsest).eps > _COARSE
    again = (lambda: moved.replay(function)) if coarse else None
    return ulps_apart(moved, moved.replay(function), again) > ULP_ALLOWED


def fitting(moved: WeightMove, functions: dict[str, Formula]) -> list[tuple[str, int]]:
    """How many entries each formula misses, the best first."""
    counted: list[tuple[str, int]] = []
    for key, function in functions.items():
        counted.append((key, int(misses(moved, function).sum())))
    return sorted(counted, key=lambda pair: pair[1])


def moves_beyond_rounding(moved: WeightMove) -> bool:
    """Whether some entry moved by so much that another formula would have put it elsewhere."""
    before, after = wide(moved.before), wide(moved.after)
    return bool(((after - before).abs() > 64 * ulp(before.abs(), moved.coarsest)).any())


def constant_ratio(moved: WeightMove, function: Callable[[OptimizerState], ReplayedUpdate]) -> float | None:
    """The c for which every update is c times the formula's; None if there is none but 1."""
    replay = moved.replay(function)
    real = wide(moved.after) - wide(moved.before) - replay.decay
    useful = replay.update.abs() > 1e3 * ulp(wide(moved.before).abs(), moved.before.dtype)
    if not bool(useful.any()):
        return None
    ratios = (real / replay.update)[useful]
    c = float(ratios.median())
    scattered = float((ratios / c - 1).abs().quantile(0.9)) if c and ratios.numel() < 1_000_000 else 1.0
    return c if scattered < 2e-3 and abs(c - 1) > 1e-3 else None


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """|a − b|; both NaN or the same infinity is no distance, one of them alone an infinite one."""
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(same, 0.0, (a - b).abs().nan_to_num(nan=math.inf))


def _real(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype


def _sum(tensor: Tensor) -> float:
    return float(tensor.sum())


def _ratio(a: float, b: float, otherwise: float = 0.0) -> float:
    return a / b if b else (0.0 if a == 0 else otherwise)


def _at(value: Any, index: Any) -> Any:
    return value[index] if isinstance(value, Tensor) else value


def _unravel(flat: int, shape: torch.Size) -> tuple[int, ...]:
    index: list[int] = []
    for size in reversed(shape):
        flat, rest = divmod(flat, size)
        index.append(rest)
    return tuple(reversed(index))
