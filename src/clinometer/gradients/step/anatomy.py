"""The anatomy of one optimizer step: of the model, of a tensor, of a part of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from typing import Any

from torch import Tensor

from clinometer.gradients.optimizers.made_nonfinite import MadeNonfinite
from clinometer.gradients.report.document import Document, Line, Table, code, dim, fault, name, note, sentence
from clinometer.gradients.report.formatting import format_count, format_number, shorten
from clinometer.gradients.report.result import Result
from clinometer.gradients.sandbox.subject import Subject
from clinometer.gradients.step.formulas import FORMULAS, SLIPS
from clinometer.gradients.step.measures import Measures, WeightMove, constant_ratio, fitting, measure
from clinometer.gradients.step.weight_step import StepContext, WeightStep, percent, title, ulps
from clinometer.messages import InputError

_LISTED = 12
_SLIPS_TRIED = 1_000_000
"""Entries of a larger tensor are not searched for what its optimizer does instead."""


class TensorStep(Result):
    """What the step did to one tensor; `[3, 5]` is one weight of it, `[3]` a row."""

    def __init__(self, moved: WeightMove, context: StepContext, index: Any = None) -> None:
        self._whole = moved
        self._index = index
        self._context = context
        self.moved = moved if index is None else moved.part(index)
        self.name = moved.name
        self.status = moved.status

    @property
    def formula(self) -> str | None:
        """The key of the formula it was replayed by."""
        return self.moved.formula if self.status == "stepped" else None

    @cached_property
    def measures(self) -> Measures:
        """Ratio, shares, rounding; float64 sums over the entries."""
        if self._index is not None and self.formula and FORMULAS[self.formula].of_whole:
            function = FORMULAS[self.formula]
            return measure(self.moved, function, partial(self._whole.replay, function, self._index))
        return measure(self.moved, FORMULAS[self.formula] if self.formula else None)

    @cached_property
    def predicted(self) -> float:
        """Σ⟨g, Δθ⟩ of this tensor; costs no replay."""
        return measure(self.moved, None).predicted

    @property
    def faithful(self) -> bool | None:
        """Whether every entry is what the formula gives, within rounding; None without a formula."""
        return self.measures.missed == 0 if self.formula else None

    @cached_property
    def slip(self) -> tuple[str, float] | None:
        """What the optimizer most likely does instead of its formula, as a sentence's key and a factor."""
        if self.faithful is not False or self.formula is None or self.moved.before.numel() > _SLIPS_TRIED:
            return None
        if self.formula.startswith("adam"):
            others = {key: f for key, f in FORMULAS.items() if key.startswith("adam") and key != self.formula}
            key, missed = fitting(self.moved, SLIPS | others)[0]
            if missed == 0:
                return key, 1.0
        ratio = constant_ratio(self.moved, FORMULAS[self.formula])
        return None if ratio is None else ("factor", ratio)

    def __getitem__(self, index: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One weight where the index says one entry, else the part; raises InputError outside the tensor."""
        if self._index is not None:
            return TensorStep(self.moved, self._context)[index]
        try:
            chosen = self._whole.before[index]
        except (IndexError, TypeError) as error:
            shape = list(self._whole.before.shape)
            raise InputError("step.index", name=self.name, index=index, shape=shape) from error
        if chosen.dim() == 0:
            return WeightStep(self._whole, index, self._context)
        return TensorStep(self._whole, self._context, index)

    def entries(self) -> Mapping[str, Any]:
        return {}

    def facts(self) -> Mapping[str, Any]:
        told = {
            "name": self.name,
            "index": None if self._index is None else str(self._index),
            "shape": list(self.moved.before.shape),
            "dtype": self.moved.before.dtype,
            "status": self.status,
            "formula": self.formula,
            "step": self._context.step_of(self._whole),
            "clip": self.moved.clip,
            **self.measures.to_dict(),
        }
        if self.formula:
            told |= {"faithful": self.faithful, "slip": self.slip[0] if self.slip else None}
        return told

    def document(self, language: str | None = None) -> Document:
        context = self._context
        shape = "×".join(map(str, self.moved.before.shape)) or "1"
        what = title(
            context, self._whole, self.name + ("" if self._index is None else _brackets(self._index))
        )
        dtype = str(self.moved.before.dtype).removeprefix("torch.")
        lines: Document = [Line((*what(language), dim(f"  {shape} {dtype}")), hang=2)]
        if self.status not in ("stepped", "unknown"):
            lines.append(_unmoved(self.status, [self.name], self.measures.change_sq > 0, context, language))
            return lines
        lines += [*_made(context, [self.name], language), *_stuck(context, [self.name], language)]
        if self.faithful is False:
            lines += _accusation(self, language)
        m = self.measures
        rows = [
            ("rms", format_number(m.rms_update), "‖Δθ‖/√n"),
            ("ratio", format_number(m.update_ratio, place=""), "‖Δθ‖/‖θ‖"),
        ]
        if self.formula:
            rows += [
                ("momentum_share", percent(m.momentum_share), ""),
                ("decay_share", percent(m.decay_share), ""),
                ("worst", f"{ulps(m.worst_ulp)} ulp", _brackets(m.worst_index or ())),
            ]
        else:
            rows.append(("cosine", format_number(m.cosine, sign=True), "cos(Δθ, −g)"))
        rows.append(("predicted", format_number(m.predicted, sign=True), "Σ g Δθ"))
        table = [(*sentence(f"step.measure.{key}", language),) for key, *_ in rows]
        lines.append(Table([(t, v, dim(f)) for t, (_, v, f) in zip(table, rows, strict=True)], "lrl", 2))
        if m.swallowed > 0.005:
            lines.append(_swallowed(m, language))
        if not self.formula:
            lines.append(Line(sentence("step.unknown", language, optimizer=context.optimizer), 2))
        return lines


class StepAnatomy(Result):
    """One optimizer step: `anatomy[name]` is a tensor's, `anatomy[name][3, 5]` one weight's."""

    def __init__(self, subject: Subject, optimizer: str, before_clipping: Callable[[], None]) -> None:
        self._canonical = dict(subject.canonical)
        self._context = StepContext(optimizer)
        self._note: Callable[[], None] | None = before_clipping
        self._tensors: dict[str, TensorStep] | None = None

    def before_clipping(self) -> None:
        """Call it before clipping, if the block began before the gradients were there (or were unscaled)."""
        if self._note is not None:
            self._note()

    def complete(
        self,
        moved: dict[str, WeightMove],
        formula: str | None,
        *,
        losses: tuple[float, ...] | None,
        apart: bool,
        whole: bool,
        skipped: str | None,
        **more: Any,
    ) -> None:
        """Called by explain_step when its block ends; `more` are attributes of StepContext."""
        context = self._context
        for attribute, value in more.items():
            setattr(context, attribute, value)
        context.accuses = self._accuses
        context.formula, context.losses, context.whole = formula, losses, whole
        context.apart = apart
        context.skipped, self._note = skipped, None
        self._tensors = {key: TensorStep(m, context) for key, m in moved.items()}
        context.predict = lambda: sum(t.predicted for t in self.entries().values())

    def within(self, predicted: float, losses: tuple[float, float]) -> None:
        """Say what the whole step did where only a part of it was looked at: Σ⟨g, Δθ⟩ of all parameters, and
        the loss before and after."""
        self._context.whole, self._context.losses = True, losses
        self._context.predict = lambda: predicted

    @property
    def optimizer(self) -> str:
        """The optimizer's class."""
        return self._context.optimizer

    @property
    def skipped(self) -> str | None:
        """ "scaler" (it found gradients that are not finite), "no-step", or None for a step taken."""
        return self._context.skipped

    @cached_property
    def measures(self) -> Measures:
        """Those of all tensors together."""
        total = Measures()
        for tensor in self.entries().values():
            total = total + tensor.measures
        return total

    @property
    def faithful(self) -> bool | None:
        """Whether the optimizer is what it claims to be; None when it claims nothing known here."""
        judged = [t.faithful for t in self.entries().values() if t.faithful is not None]
        return all(judged) if judged else None

    def _accuses(self, name: str) -> bool:
        """Whether it is a fault that this tensor does not follow the formula.

        Of an optimizer with a step of its own only with evidence: it does what a known slip does, or takes
        every tensor's update times one factor. A step of its own may do something else on purpose.
        """
        if self._context.basis != "descent":
            return True
        slip = self.entries()[name].slip
        if slip is None or slip[0] != "factor":
            return slip is not None
        others = [t.slip for t in self.entries().values() if t.faithful is False]
        alike = [s for s in others if s is not None and s[0] == "factor" and abs(s[1] / slip[1] - 1) < 2e-3]
        return len(alike) == len(others) > 1

    @property
    def made_nonfinite(self) -> Mapping[str, MadeNonfinite]:
        """Tensors that the step made NaN or infinite, though weight and gradient were finite before it."""
        return self._context.made

    @property
    def predicted(self) -> float:
        """Σ⟨g, Δθ⟩: the change of the loss, to first order, of the tensors looked at."""
        return sum(tensor.predicted for tensor in self.entries().values())

    @property
    def loss_change(self) -> float | None:
        """The change that happened, where a loss closure was given."""
        losses = self._context.losses
        return None if losses is None else losses[1] - losses[0]

    def entries(self) -> Mapping[str, TensorStep]:
        if self._tensors is None:
            raise InputError("step.not_done")
        return self._tensors

    def other_names(self) -> Mapping[str, str]:
        return self._canonical

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries())

    def facts(self) -> Mapping[str, Any]:
        context = self._context
        return {
            "optimizer": self.optimizer,
            "formula": context.formula,
            "step": self._step,
            "faithful": self.faithful,
            "basis": context.basis,
            "made_nonfinite": {name: made.variant or "other" for name, made in context.made.items()},
            "count_not_advanced": sorted(context.stuck),
            "shared_memory": [list(pair) for pair in context.shared],
            "skipped": self.skipped,
            "loss_before": context.losses[0] if context.losses else None,
            "loss_after": context.losses[1] if context.losses else None,
            "covers_optimizer": context.whole,
            "total": self.measures.to_dict(),
            "tensors": [tensor.facts() for tensor in self.entries().values()],
        }

    @property
    def _step(self) -> int | None:
        steps = [self._context.step_of(t.moved) for t in self.entries().values()]
        return max((s for s in steps if s is not None), default=None)

    def document(self, language: str | None = None) -> Document:
        context, tensors = self._context, list(self.entries().values())
        key = "step.model" if self._step is not None else "step.model_uncounted"
        values = {
            "step": self._step,
            "optimizer": self.optimizer,
            "tensors": format_count(len(tensors)),
            "numbers": format_count(self.measures.numbers),
        }
        lines: Document = [Line(sentence(key, language, **values))]
        if self.skipped is not None:
            lines.append(Line((note("· "), *sentence(f"step.skipped.{self.skipped}", language)), 2, 2))
            return lines
        names = [t.name for t in tensors]
        lines += [*_made(context, names, language), *_stuck(context, names, language)]
        for one, other in context.shared:
            values = {"one": name(one), "other": name(other)}
            lines.append(Line((fault("✗ "), *sentence("step.shared", language, **values)), 2, 2))
        wrong = [t for t in tensors if t.faithful is False]
        if wrong:
            lines += _accusation(max(wrong, key=lambda t: t.measures.worst_ulp), language, len(wrong))
        moved = [t for t in tensors if t.status in ("stepped", "unknown")]
        if moved:
            lines.append(_table(moved, self.measures, bool(context.formula), language))
        for status in ("no-gradient", "not-held"):
            for went in (False, True):
                names = [t.name for t in tensors if t.status == status and (t.measures.change_sq > 0) == went]
                if names:
                    lines.append(_unmoved(status, names, went, context, language))
        if self.measures.swallowed > 0.005:
            lines.append(_swallowed(self.measures, language))
        if context.formula is None and moved:
            lines.append(Line(sentence("step.unknown", language, optimizer=self.optimizer), 2))
        return [*lines, *context.prediction(language)]


def _table(tensors: list[TensorStep], total: Measures, known: bool, language: str | None) -> Table:
    shown = tensors
    if len(tensors) > _LISTED:
        ranked = sorted(tensors, key=lambda t: t.measures.update_ratio, reverse=True)
        shown = [*ranked[:6], *ranked[-4:]]
    columns = ("tensor", "ratio", "rms", *(("momentum", "decay", "ulp") if known else ("cosine",)))
    rows = [[dim(_plain(f"step.column.{c}", language)) for c in columns]]
    for position, tensor in enumerate(shown):
        if len(shown) < len(tensors) and position == 6:
            left = format_count(len(tensors) - len(shown))
            rows.append([dim(_plain("step.between", language, count=left)), *[dim("")] * (len(columns) - 1)])
        rows.append([name(tensor.name), *map(note_free, _cells(tensor.measures, known))])
    if len(tensors) > 1:
        rows.append([dim(_plain("step.column.total", language)), *map(note_free, _cells(total, known))])
    return Table(rows, "l" + "r" * (len(columns) - 1), 2)


def note_free(text: str) -> Any:
    return dim("") if not text else code(text)


def _cells(m: Measures, known: bool) -> list[str]:
    shared = [format_number(m.update_ratio, place=""), format_number(m.rms_update, place="")]
    if not known:
        return [*shared, format_number(m.cosine, sign=True, place="")]
    return [*shared, percent(m.momentum_share), percent(m.decay_share), ulps(m.worst_ulp)]


def _accusation(tensor: TensorStep, language: str | None, count: int = 1) -> Document:
    m, context = tensor.measures, tensor._context
    accuses = context.accuses(tensor.name)
    key = "unfaithful" if count == 1 else "unfaithful_several"
    said = sentence(
        f"step.{key}" if accuses else "step.own_step",
        language,
        optimizer=context.optimizer,
        ancestor=context.ancestor,
        count=format_count(count),
        missed=format_count(m.missed),
        numbers=format_count(m.replayed),
        place=name(f"{tensor.name}{_brackets(m.worst_index or ())}"),
        ulp=ulps(m.worst_ulp),
    )
    lines: Document = [Line((fault("✗ ") if accuses else note("· "), *said), 2, 2)]
    if (slip := tensor.slip) is not None:
        key = slip[0] if accuses or slip[0] != "factor" else "factor_only"
        lines.append(Line(sentence(f"step.slip.{key}", language, factor=format_number(slip[1])), 4))
    return lines


def _made(context: StepContext, names: list[str], language: str | None) -> Document:
    """The tensors that the step made NaN or infinite, grouped by the term that did it."""
    groups: dict[str, list[str]] = {}
    for each in names:
        if each in context.made:
            groups.setdefault(context.made[each].variant, []).append(each)
    lines: Document = []
    for variant, members in groups.items():
        first = context.made[members[0]]
        what = sentence(
            "step.made.what",
            language,
            count=sum(context.made[each].count for each in members),
            place=name(members[0] + _brackets(first.index)),
            names=name(shorten(members, language=language)),
        )
        lines.append(Line((fault("✗ "), *what), 2, 2))
        lines.append(Line(sentence(f"step.made.{variant or 'other'}", language, **first.values), 4))
    return lines


def _stuck(context: StepContext, names: list[str], language: str | None) -> Document:
    """Tensors whose step count did not advance by one."""
    found = [each for each in names if each in context.stuck]
    if not found:
        return []
    before, after = context.stuck[found[0]]
    values = {"names": name(shorten(found, language=language)), "before": before, "after": after}
    return [Line((fault("✗ "), *sentence("step.stuck", language, **values)), 2, 2)]


def _unmoved(status: str, names: list[str], moved: bool, context: StepContext, language: str | None) -> Line:
    if status == "skipped":
        return Line((note("· "), *sentence(f"step.skipped.{context.skipped}", language)), 2, 2)
    key = f"step.{status.replace('-', '_')}{'_moved' if moved else ''}"
    listed = name(shorten(names, language=language))
    mark = fault("✗ ") if moved else note("· ")
    return Line((mark, *sentence(key, language, names=listed, optimizer=context.optimizer)), 2, 2)


def _swallowed(m: Measures, language: str | None) -> Line:
    values = {"stayed": percent(m.swallowed), "lost": percent(m.lost)}
    return Line((note("· "), *sentence("step.swallowed", language, **values)), 2, 2)


def _brackets(index: Any) -> str:
    if isinstance(index, Tensor):
        index = index.tolist()
    parts = index if isinstance(index, tuple) else (index,)
    return f"[{', '.join(_slice(p) if isinstance(p, slice) else str(p) for p in parts)}]" if parts else ""


def _slice(part: slice) -> str:
    return ":".join("" if x is None else str(x) for x in (part.start, part.stop))


def _plain(key: str, language: str | None, **values: Any) -> str:
    return "".join(span.text for span in sentence(key, language, **values))
