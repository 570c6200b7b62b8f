"""The anatomy of one step of one weight, line by line as the optimizer computed it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from torch import Tensor

from clinometer.gradients.optimizers.made_nonfinite import MadeNonfinite, made_nonfinite
from clinometer.gradients.report.document import (
    Document,
    Line,
    Spans,
    Table,
    dim,
    fault,
    name,
    number,
    sentence,
)
from clinometer.gradients.report.formatting import MINUS, format_number
from clinometer.gradients.report.result import Result
from clinometer.gradients.step.formulas import FORMULAS
from clinometer.gradients.step.measures import ULP_ALLOWED, WeightMove, ulps_apart
from clinometer.gradients.step.optimizer_state import ReplayedUpdate, count_in, wide
from clinometer.messages import say


@dataclass
class StepContext:
    """What belongs to the step as a whole."""

    optimizer: str
    formula: str | None = None
    losses: tuple[float, ...] | None = None
    apart: bool = False
    """Whether the losses are of this rank's part of the batch, and the gradient of all (DDP)."""
    whole: bool = False
    """Whether every parameter of the optimizer was looked at."""
    skipped: str | None = None
    predict: Callable[[], float] = float
    basis: str = ""
    """How the formula is known: `Claim.basis`."""
    ancestor: str = ""
    """The class of torch.optim that the optimizer's class descends from."""
    accuses: Callable[[str], bool] = lambda name: True
    """Whether a tensor that does not follow the formula is a fault."""
    made: Mapping[str, MadeNonfinite] = field(default_factory=dict)
    """Tensors that the step made NaN or infinite."""
    stuck: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """The counts before and after the step, of tensors whose count did not advance by one."""
    shared: tuple[tuple[str, str], ...] = ()
    """Tensors that the step moved and that lie in the same memory."""

    def step_of(self, moved: WeightMove) -> int | None:
        """The count of this step, where the optimizer counts."""
        held = moved.held
        if held is None:
            return None
        counts = count_in(held.state, held.options) is not None or moved.formula in _COUNTING
        return held.t if counts else None

    def prediction(self, language: str | None) -> Document:
        """The change of the loss, foretold and real; nothing where only a part was looked at."""
        if self.skipped or not self.whole:
            return []
        values = {"predicted": number(format_number(self.predict(), sign=True, place=""))}
        if self.losses is None:
            return [Line(sentence("step.predicted", language, **values), 2)]
        happened = format_number(self.losses[1] - self.losses[0], sign=True, place="")
        values |= {"happened": number(happened)}
        if self.apart:
            return [Line(sentence("step.predicted_apart", language, **values), 2)]
        return [Line(sentence("step.predicted_happened", language, **values), 2)]


_COUNTING = {"adam", "adamw", "adamw-after"}
_AGAINST = ("up_raised", "down_lowered", "unpushed")


class WeightStep(Result):
    """One weight's step; each quantity is a float, named as in the formula."""

    def __init__(self, moved: WeightMove, index: Any, context: StepContext) -> None:
        self._context = context
        self._part = moved.part(index)
        self.name = moved.name
        index = index if isinstance(index, tuple) else (index,)
        self.index = tuple(int(i) % size for i, size in zip(index, moved.before.shape, strict=True))
        self.status = moved.status
        self.step = context.step_of(moved)
        self.before = _float(self._part.before)
        self.after = _float(self._part.after)
        self._replay: ReplayedUpdate | None = None
        if self.status == "stepped" and moved.formula is not None:
            self._again = partial(moved.replay, FORMULAS[moved.formula], index)
            self._replay = self._again()

    @property
    def change(self) -> float:
        """Δθ as it happened."""
        return self.after - self.before

    @property
    def gradient(self) -> float | None:
        """∂L/∂θ: before clipping, as far as that is known."""
        gradient = self._part.gradient
        return None if gradient is None else _float(gradient)

    @property
    def gradient_used(self) -> float | None:
        """What the optimizer got: after clipping and unscaling."""
        return None if self._part.held is None else _float(self._part.held.grad)

    @property
    def clip(self) -> float | None:
        """gradient_used / gradient, where the two differ."""
        raw, used = self.gradient, self.gradient_used
        if not raw or used is None or raw == used or not math.isfinite(raw):
            return None
        return used / raw

    @cached_property
    def quantities(self) -> dict[str, dict[str, Any]]:
        """By key: symbol, before (None where there is none), after, formula; empty without a formula."""
        if self._replay is None:
            return {}
        return {
            q.key: {
                "symbol": q.symbol,
                "before": None if q.before is None else _float(q.before),
                "after": _float(q.after),
                "formula": q.formula,
            }
            for q in self._replay.quantities
        }

    @property
    def replayed(self) -> float | None:
        """θ after the step, by the formula in float64."""
        return None if self._replay is None else _float(self._replay.theta)

    @cached_property
    def ulp(self) -> float | None:
        """|after − replayed| in ulp of the weight, and of its update where that is larger."""
        if self._replay is None:
            return None
        return float(ulps_apart(self._part, self._replay, self._again).max())

    @property
    def faithful(self) -> bool | None:
        """Whether this weight is what the formula gives, within rounding."""
        return None if self.ulp is None else self.ulp <= ULP_ALLOWED

    @property
    def momentum_share(self) -> float | None:
        """|from earlier batches| / (|from earlier batches| + |from this batch|)."""
        if self._replay is None:
            return None
        old, new = abs(_float(self._replay.momentum)), abs(_float(self._replay.fresh))
        return old / (old + new) if old + new else 0.0

    @property
    def decay_share(self) -> float | None:
        """|decay| / (|decay| + |update|)."""
        if self._replay is None:
            return None
        decay, update = abs(_float(self._replay.decay)), abs(_float(self._replay.update))
        return decay / (decay + update) if decay + update else 0.0

    @property
    def predicted(self) -> float | None:
        """g Δθ: what this weight's move changes the loss by, to first order."""
        return None if self.gradient is None else self.gradient * self.change

    def entries(self) -> Mapping[str, Any]:
        """`weight_step["momentum"]["after"]`: the quantities."""
        return self.quantities

    def facts(self) -> Mapping[str, Any]:
        context = self._context
        return {
            "name": self.name,
            "index": list(self.index),
            "step": self.step,
            "optimizer": context.optimizer,
            "formula": self._part.formula,
            "status": self.status,
            "dtype": self._part.before.dtype,
            "gradient": self.gradient,
            "clip": self.clip,
            "gradient_used": self.gradient_used,
            "quantities": [{"key": key, **q} for key, q in self.quantities.items()],
            "numbers": {} if self._replay is None else dict(self._replay.numbers),
            "before": self.before,
            "after": self.after,
            "change": self.change,
            "replayed": self.replayed,
            "ulp": self.ulp,
            "faithful": self.faithful,
            "momentum_share": self.momentum_share,
            "decay_share": self.decay_share,
            "predicted": self.predicted,
            "loss_before": context.losses[0] if context.losses else None,
            "loss_after": context.losses[1] if context.losses else None,
        }

    def document(self, language: str | None = None) -> Document:
        context = self._context
        place = self.name + (f"[{', '.join(map(str, self.index))}]" if self.index else "")
        lines: Document = [Line(title(context, self._part, place)(language), hang=2)]
        if self.faithful is False and self.replayed is not None and context.accuses(self.name):
            values = {"optimizer": context.optimizer, "ulp": ulps(self.ulp or 0.0)}
            should, _ = _pair(self.replayed, self.after)
            lines.append(
                Line(
                    (fault("✗ "), *sentence("step.weight_unfaithful", language, should=should, **values)),
                    2,
                    2,
                )
            )
        lines.append(Table(self._rows(language), "lll", 2))
        if said := self._said(language):
            lines.append(Line(said, 2))
        return [*lines, *context.prediction(language)]

    def _rows(self, language: str | None) -> list[list[Any]]:
        rows: list[list[Any]] = []
        if self.gradient is not None:
            value: Spans = [number(format_number(self.gradient, sign=True, place=""))]
            clipped: Spans = []
            if self.clip is not None and self.gradient_used is not None:
                used = number(format_number(self.gradient_used, sign=True, place=""))
                value = [*value, " → ", used]
                clipped = sentence("step.clipped", language, factor=format_number(self.clip, place=""))
            rows.append([self._label("gradient", language), "g", value, clipped])
        for key, q in self.quantities.items():
            if key == "gradient":
                continue
            signed = key not in ("scale", "largest", "rate", "denominator")
            after = number(format_number(q["after"], sign=signed, place=""))
            value = [after]
            if q["before"] is not None:
                value = [format_number(q["before"], sign=signed, place=""), " → ", after]
            rows.append([self._label(key, language), q["symbol"], value, dim(q["formula"])])
        if self._replay is None:
            change = number(format_number(self.change, sign=True, place=""))
            rows.append([self._label("change", language), "Δθ", change])
        before, after = _pair(self.before, self.after)
        left = "" if self.ulp is None else say("step.rounding", language, ulp=ulps(self.ulp))
        rows.append([self._label("weight", language), "θ", [before, " → ", number(after)], dim(left)])
        return rows

    def _label(self, key: str, language: str | None) -> str:
        return say(f"step.label.{key}", language)

    def _made(self) -> MadeNonfinite | None:
        """What the step did, if it made this weight NaN or infinite of finite numbers."""
        held = self._part.held
        if held is None:
            return None
        return made_nonfinite(self._part.before, held.grad, self._part.after, held.state, held.options)

    def _against(self) -> str:
        """What moved the weight where the gradient did not: measured by the replay, "" without one."""
        if self._replay is None:
            return ""
        old, decay = abs(_float(self._replay.momentum)), abs(_float(self._replay.decay))
        fresh = abs(_float(self._replay.fresh))
        if max(old, decay) <= fresh:
            return ""
        return "both" if min(old, decay) > fresh else "momentum" if old > decay else "decay"

    def _said(self, language: str | None) -> list[Any]:
        context = self._context
        if self.status == "skipped":
            return [*sentence(f"step.skipped.{context.skipped}", language)]
        if self.status in ("not-held", "no-gradient"):
            key = f"step.{self.status.replace('-', '_')}{'_moved' if self.change else ''}"
            return [*sentence(key, language, names=name(self.name), optimizer=context.optimizer)]
        if self.status == "shared":
            return []
        sense = _sense(self.gradient or 0.0, self.change)
        if sense == "not_finite" and (made := self._made()):
            return [*sentence(f"step.made.{made.variant or 'other'}", language, **made.values)]
        if (
            self._part.held is not None
            and self._part.held.option("maximize")
            and sense not in ("stayed", "not_finite")
        ):
            sense = "maximized"
        spans = [*sentence(f"step.sense.{sense}", language)]
        if sense in _AGAINST and (because := self._against()):
            gap = say("step.joined", language, first="", second="")
            spans += [gap, *sentence(f"step.because.{because}", language)]
        gap = say("step.joined", language, first="", second="")
        if self._replay is None:
            return [*spans, gap, *sentence("step.unknown", language, optimizer=context.optimizer)]
        if sense == "not_finite":
            return spans
        if self._replay.numbers.get("beta1") or self._replay.numbers.get("momentum"):
            share = percent(self.momentum_share or 0.0)
            spans += [gap, *sentence("step.momentum_share", language, share=share)]
        return spans


def title(context: StepContext, moved: WeightMove, place: str) -> Callable[[str | None], Spans]:
    """ "weight[3, 5], step 137 (AdamW)"."""
    step = context.step_of(moved)
    key = "step.title" if step is not None else "step.title_uncounted"
    return lambda language: sentence(key, language, place=name(place), step=step, optimizer=context.optimizer)


def percent(share: float) -> str:
    """ "86 %"; small shares keep a digit, so that only nothing is "0 %"."""
    if math.isnan(share):
        return "NaN"
    percents = 100 * share
    text = "0" if share == 0 else f"{percents:.0f}" if percents >= 9.95 else f"{percents:.1f}"
    return f"{'< 0.1' if share and text == '0.0' else text} %"


def ulps(count: float) -> str:
    """ "0.4"; large counts as numbers are written."""
    return f"{count:.1f}" if count < 100 else format_number(count, place="")


def _sense(gradient: float, change: float) -> str:
    if not (math.isfinite(gradient) and math.isfinite(change)):
        return "not_finite"
    if change == 0:
        return "stayed"
    if gradient == 0:
        return "unpushed"
    if gradient > 0:
        return "up_lowered" if change < 0 else "up_raised"
    return "down_raised" if change > 0 else "down_lowered"


def _pair(before: float, after: float) -> tuple[str, str]:
    """Two numbers, written with the digits (6 to 12) that tell them apart by at least two."""
    if not (math.isfinite(before) and math.isfinite(after)):
        return format_number(before, place=""), format_number(after, place="")
    one = two = ""
    for digits in range(6, 13):
        one, two = (f"{x:#.{digits}g}".replace("-", MINUS) for x in (before, after))
        last = 10.0 ** _last_digit(max(abs(before), abs(after)), digits)
        if before == after or abs(before - after) >= 100 * last:
            break
    return one, two


def _last_digit(size: float, digits: int) -> int:
    exponent = int(f"{size:e}".partition("e")[2]) if size else 0
    return exponent - digits + 1


def _float(value: Any) -> float:
    return float(wide(value)) if isinstance(value, Tensor) else float(value)
