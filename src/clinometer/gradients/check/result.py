"""What `check_gradients` found: one verdict a tensor, one a layer, and the findings drawn from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from clinometer.gradients.check.layer_checks import LayerCheck
from clinometer.gradients.check.likely_mistakes import Hint
from clinometer.gradients.check.localise import EntryCheck, Range, WrongRegion
from clinometer.gradients.check.numerics.finite_differences import Judgement
from clinometer.gradients.report.document import (
    Document,
    Line,
    Table,
    dim,
    name,
    number,
    ok,
    sentence,
)
from clinometer.gradients.report.finding import FAULT, Finding
from clinometer.gradients.report.formatting import format_count, format_number, shorten
from clinometer.gradients.report.places import Where
from clinometer.gradients.report.result import Result
from clinometer.gradients.trace.circumstances import in_order

Status = Literal["passed", "approximate", "wrong", "surrogate", "kink", "unclear", "no-gradient", "unchecked"]
AS_GOOD_AS_EXACT = 1e-6
"""A relative error of a few roundings of float32: no training can notice it."""
_SHOWN = 3


@dataclass(frozen=True)
class TensorCheck:
    """One tensor: `⟨g, v⟩` against the difference of the loss along `v`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    status: Status
    analytic: float = 0.0
    numeric: float = 0.0
    tolerance: float = 0.0
    step: float = 0.0
    jump: float = 0.0
    """Right-hand minus left-hand slope, where the loss has a corner at the point."""
    has_gradient: bool = True
    narrowed: WrongRegion | None = None
    entries: tuple[EntryCheck, ...] = ()
    """The entries given by `entries`."""
    own_precision: float | None = None
    """‖g − g₆₄‖/‖g₆₄‖ of the gradient at the model's own precision; None if there is nothing to compare."""
    where: Where | None = None
    scale: float = 0.0
    """‖g⊙v‖₂ along the direction that was judged."""
    reason: str = ""
    """Why there is no verdict: "rounding", "vmap"."""

    @property
    def passed(self) -> bool:
        return self.status == "passed" or (self.status == "approximate" and self.share <= AS_GOOD_AS_EXACT)

    @property
    def share(self) -> float:
        """The error, relative to the gradient or to the differences, whichever is larger."""
        return self.error / max(self.scale, abs(self.numeric), 1e-300)

    @property
    def error(self) -> float:
        return abs(self.numeric - self.analytic)

    @property
    def wrong_entries(self) -> tuple[EntryCheck, ...]:
        asked = tuple(entry for entry in self.entries if not entry.passed)
        return asked or (self.narrowed.entries if self.narrowed else ())

    def to_dict(self) -> dict[str, Any]:
        narrowed = self.narrowed
        return {
            "name": self.name,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "status": self.status,
            "passed": self.passed,
            "analytic": self.analytic,
            "numeric": self.numeric,
            "error": self.error,
            "tolerance": self.tolerance,
            "step": self.step,
            "has_gradient": self.has_gradient,
            "rows": None if narrowed is None else [list(part) for part in narrowed.rows],
            "columns": None if narrowed is None else [list(part) for part in narrowed.columns],
            "factor": None if narrowed is None else narrowed.factor,
            "transposed": None if narrowed is None else narrowed.transposed,
            "wrong_entries": [_entry(entry) for entry in self.wrong_entries],
            "entries": [_entry(entry) for entry in self.entries],
            "own_precision": self.own_precision,
            "where": None if self.where is None else self.where.to_dict(),
        }


def _entry(entry: EntryCheck) -> dict[str, Any]:
    return {
        "index": list(entry.index),
        "analytic": entry.analytic,
        "numeric": entry.numeric,
        "error": entry.error,
        "tolerance": entry.tolerance,
        "passed": entry.passed,
    }


class GradientCheck(Result):
    """Whether every gradient is the derivative of the loss, and where not."""

    def __init__(
        self,
        tensors: Mapping[str, TensorCheck],
        layers: Sequence[LayerCheck],
        findings: Sequence[Finding],
        *,
        aliases: Mapping[str, str],
        size: int,
        everything: Judgement | None,
        loss: float,
        evaluations: int,
        seconds: float,
        frozen: int = 0,
        held: Sequence[Where] = (),
        stopped: Sequence[Where] = (),
    ) -> None:
        self._tensors = dict(tensors)
        self._aliases = dict(aliases)
        self.layers = tuple(layers)
        """One verdict for each call of a module or custom Function that could be repeated alone."""
        self.findings = tuple(in_order(findings))
        self.size = size
        self.everything = everything
        """One direction through all tensors at once."""
        self.loss = loss
        self.evaluations = evaluations
        self.seconds = seconds
        self.frozen = frozen
        """How many ask for no gradient, so that there is nothing to check."""
        self.held = tuple(held)
        """Lines whose values the gradient treats as constant; so did the check."""
        self.stopped = tuple(stopped)
        """Those of them whose values the loss depends on: the gradient is without that part."""

    @property
    def healthy(self) -> bool:
        """No fault: nothing is very likely wrong."""
        return all(finding.severity != FAULT for finding in self.findings)

    @property
    def passed(self) -> bool:
        """Healthy, and every tensor that asks for a gradient has one, which agreed with the numbers."""
        passed = sum(tensor.passed for tensor in self._tensors.values())
        return self.healthy and passed > 0 and passed + self.frozen == len(self._tensors)

    @property
    def wrong_layers(self) -> tuple[LayerCheck, ...]:
        return tuple(layer for layer in self.layers if not layer.passed)

    def entries(self) -> Mapping[str, TensorCheck]:
        return self._tensors

    def other_names(self) -> Mapping[str, str]:
        return self._aliases

    def facts(self) -> Mapping[str, Any]:
        return {
            "kind": "gradient-check",
            "passed": self.passed,
            "healthy": self.healthy,
            "loss": self.loss,
            "everything": self.everything,
            "parameters": self.size,
            "evaluations": self.evaluations,
            "seconds": self.seconds,
            "findings": [finding.to_dict() for finding in self.findings],
            "tensors": {key: tensor.to_dict() for key, tensor in self._tensors.items()},
            "layers": [layer.to_dict() for layer in self.layers],
            "held": [where.to_dict() for where in self.held],
            "stopped": [where.to_dict() for where in self.stopped],
        }

    def document(self, language: str | None = None) -> Document:
        lines: Document = []
        for finding in self.findings:
            lines += finding.document(language)
            if finding.status == "wrong":
                lines += self._evidence(finding, language)
            lines.append(Line())
        passed = sum(tensor.passed for tensor in self._tensors.values())
        if self.passed and not self.findings:
            worst = max((_share(t) for t in self._tensors.values()), default=0.0)
            values = {
                "count": format_count(passed),
                "share": format_number(worst, language=language, place=""),
            }
            key = "check.passed_but_frozen" if self.frozen else "check.passed"
            values |= {"frozen": format_count(self.frozen)} if self.frozen else {}
            lines.append(Line((ok("✓ "), *sentence(key, language, **values)), hang=2))
        elif passed or self.frozen == len(self._tensors):
            total, frozen = format_count(len(self._tensors)), format_count(self.frozen)
            key = "check.passed_of_frozen" if self.frozen else "check.passed_of"
            values = {"count": format_count(passed), "total": total}
            values |= {"frozen": frozen} if self.frozen else {}
            lines.append(Line(sentence(key, language, **values)))
        if self.stopped:
            places = [f"{w.label} ({w.op})" if w.op else w.label for w in self.stopped]
            listed = name(shorten(places, language=language))
            lines.append(Line(sentence("check.stopped", language, lines=listed), hang=2))
        looked = sentence(
            "check.looked_at",
            language,
            tensors=format_count(len(self._tensors)),
            numbers=format_count(self.size),
            layers=format_count(len(self.layers)),
            evaluations=format_count(self.evaluations),
            seconds=f"{self.seconds:.1f}",
        )
        lines.append(Line(tuple(dim(span.text) for span in looked)))
        return lines

    def _evidence(self, finding: Finding, language: str | None) -> Document:
        wrong = [self._tensors[n] for n in finding.names if n in self._tensors]
        wrong.sort(key=_share, reverse=True)
        rows = [
            (
                name(tensor.name),
                sentence("check.analytic", language, value=number(_signed(tensor.analytic, language))),
                sentence("check.numeric", language, value=number(_signed(tensor.numeric, language))),
                sentence(
                    "check.error",
                    language,
                    error=format_number(tensor.error, language=language, place=""),
                    tolerance=format_number(tensor.tolerance, language=language, place=""),
                ),
            )
            for tensor in wrong[:_SHOWN]
        ]
        lines: Document = [Table(rows, indent=4)] if rows else []
        for tensor in wrong[:_SHOWN]:
            lines += [Line(spans, indent=4, hang=2) for spans in region_spans(tensor, language)]
        if finding.values.get("parts"):
            function = "layer" not in finding.key
            layer = finding.values["kind" if function else "layer"]
            lines.append(Line(sentence("check.parts", language, layer=name(str(layer))), indent=4, hang=2))
        if (hint := finding.values.get("hint")) is not None:
            lines.append(Line(hint_spans(hint, finding.where, language), indent=4, hang=2))
        return lines


def hint_spans(hint: Hint, where: Where | None, language: str | None) -> tuple[Any, ...]:
    """What the backward of a Function was measured to be, and where it is written."""
    place = "" if where is None else f"{where.label}, {where.function}"
    values = {"place": name(place), "argument": name(hint.argument)}
    values |= {
        "factor": number(format_factor(hint.factor)),
        "dim": str(hint.dim),
        "size": format_count(hint.size),
    }
    values |= {"total": number(_signed(hint.total, language))}
    return sentence(f"check.hint.{hint.kind}", language, **values)


def region_spans(tensor: TensorCheck, language: str | None) -> list[tuple[Any, ...]]:
    """What is known about where in the tensor the error is, and about its pattern."""
    narrowed = tensor.narrowed
    if narrowed is None:
        return []
    told = name(tensor.name)
    if not tensor.has_gradient or narrowed.factor == 0.0:
        key = "check.missing" if not tensor.has_gradient else "check.zero"
        return [sentence(key, language, name=told)]
    if narrowed.factor is not None:
        factor = format_factor(narrowed.factor)
        return [sentence("check.factor", language, name=told, factor=number(factor))]
    if narrowed.transposed:
        return [sentence("check.transposed", language, name=told)]
    spans = []
    if narrowed.entries:
        shown = [
            sentence(
                "check.entry",
                language,
                name=name(f"{tensor.name}[{', '.join(map(str, entry.index))}]"),
                analytic=_signed(entry.analytic, language),
                numeric=_signed(entry.numeric, language),
            )
            for entry in narrowed.entries[:_SHOWN]
        ]
        return shown
    rows, columns = format_ranges(narrowed.rows), format_ranges(narrowed.columns)
    if narrowed.rows and not narrowed.all_rows and narrowed.columns and not narrowed.all_columns:
        spans.append(sentence("check.block", language, name=told, rows=rows, columns=columns))
    elif narrowed.rows and not narrowed.all_rows:
        key = "check.rows" if len(narrowed.shape) > 1 else "check.places"
        spans.append(sentence(key, language, name=told, rows=rows))
    elif narrowed.columns and not narrowed.all_columns:
        spans.append(sentence("check.columns", language, name=told, columns=columns))
    return spans


def format_ranges(ranges: Sequence[Range]) -> str:
    """ "3", "32–63", "0–3, 8–11": indices, both ends inside."""
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in ranges)


def format_factor(factor: float) -> str:
    """A factor, with the digits that differences can vouch for: they are right to 5e-8 of it."""
    nearest = round(factor)
    if abs(factor - nearest) < 1e-8:
        return str(nearest).replace("-", "−")
    return f"{factor:.7g}".replace("-", "−")


def _signed(value: float | complex, language: str | None) -> str:
    if isinstance(value, complex):
        return str(value)
    return format_number(value, sign=True, language=language, place="")


def _share(tensor: TensorCheck) -> float:
    return tensor.error / tensor.tolerance if tensor.tolerance else 0.0
