"""Do micro-batch gradients add up to the full batch's? `check_accumulation` proves it, or says why not."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from clinometer.distributed.ranks import Ranks
from clinometer.gradients.check.batch_sums import Cause, Runs, TensorSum
from clinometer.gradients.check.numerics.float64 import in_double
from clinometer.gradients.check.result import format_factor
from clinometer.gradients.report.document import Document, Line, dim, ok, sentence
from clinometer.gradients.report.finding import EXPLAINED, FAULT, Finding
from clinometer.gradients.report.formatting import format_count, format_number
from clinometer.gradients.report.result import Result
from clinometer.gradients.sandbox.closure import Closure, eagerly
from clinometer.gradients.sandbox.interrupts import uninterrupted
from clinometer.gradients.sandbox.sandbox import modules_named_by, untouched
from clinometer.gradients.sandbox.subject import Subject
from clinometer.messages import InputError


class AccumulationCheck(Result):
    """Whether accumulating over the parts gives the gradient of the full batch."""

    def __init__(
        self,
        tensors: Mapping[str, TensorSum],
        *,
        aliases: Mapping[str, str],
        cause: Cause,
        factor: float | None,
        weights: Sequence[float] | None,
        parts: int,
        dropout: bool,
        losses: tuple[float, float],
        seconds: float,
    ) -> None:
        self._tensors = dict(tensors)
        self._aliases = dict(aliases)
        self.cause: Cause = cause
        self.factor = factor
        """The sum is this many times the full gradient, in all tensors; None if there is no such number."""
        self.weights = None if weights is None else tuple(weights)
        """Multiply part k's loss by weights[k] and the sum is right; None if no such numbers exist."""
        self.parts = parts
        self.dropout = dropout
        """Whether dropout was switched off to compare: every part draws its own."""
        self.full_loss, self.parts_loss = losses
        self.seconds = seconds
        self.findings = tuple(self._findings())

    @property
    def passed(self) -> bool:
        """The sum is the full gradient, in every tensor."""
        return not self.cause

    healthy = passed

    def entries(self) -> Mapping[str, TensorSum]:
        return self._tensors

    def other_names(self) -> Mapping[str, str]:
        return self._aliases

    def facts(self) -> Mapping[str, Any]:
        return {
            "kind": "accumulation-check",
            "passed": self.passed,
            "cause": self.cause,
            "factor": self.factor,
            "weights": self.weights,
            "parts": self.parts,
            "dropout": self.dropout,
            "full_loss": self.full_loss,
            "parts_loss": self.parts_loss,
            "seconds": self.seconds,
            "findings": [finding.to_dict() for finding in self.findings],
            "tensors": self._tensors,
        }

    def document(self, language: str | None = None) -> Document:
        lines: Document = []
        for finding in self.findings:
            lines += [*finding.document(language), Line()]
        if self.passed:
            spans = sentence(
                "accumulation.passed",
                language,
                parts=format_count(self.parts),
                count=format_count(len(self._tensors)),
                difference=format_number(
                    max((t.difference for t in self._tensors.values()), default=0.0), place=""
                ),
            )
            lines.append(Line((ok("✓ "), *spans), hang=2))
        looked = sentence(
            "accumulation.looked_at",
            language,
            count=format_count(len(self._tensors)),
            parts=format_count(self.parts),
            seconds=f"{self.seconds:.1f}",
        )
        lines.append(Line(tuple(dim(span.text) for span in looked)))
        return lines

    def _findings(self) -> list[Finding]:
        found = []
        if self.cause:
            found.append(self._fault())
        if self.dropout:
            found.append(Finding("dropout", "explained", EXPLAINED, "accumulation.dropout"))
        return found

    def _fault(self) -> Finding:
        key, values = self.cause.replace("-", "_"), {"parts": format_count(self.parts)}
        if self.factor is not None:
            # Six digits: a closure that keeps a part in float32 spoils those beyond.
            values["factor"] = format_factor(float(f"{self.factor:.6g}"))
            key = "factor"
            if abs(self.factor - self.parts) < 1e-6:
                key = "factor_parts"
            elif abs(self.factor * self.parts - 1) < 1e-6:
                key = "factor_twice"
        if self.weights is not None:
            shown = ", ".join(format_number(w, place="") for w in self.weights[:6])
            values["weights"] = shown + (", …" if len(self.weights) > 6 else "")
        names = [t.name for t in self._tensors.values() if not t.passed]
        if key == "some_tensors":
            worst = max((self._tensors[n] for n in names), key=lambda t: t.difference)
            values |= {"worst": worst.name, "difference": format_number(worst.difference, place="")}
            values["total"] = format_count(len(self._tensors))
        return Finding(self.cause, "wrong", FAULT, f"accumulation.{key}", tuple(names), None, values)


@uninterrupted
def check_accumulation(
    params: Any, full: Closure, parts: Iterable[Closure] | Callable[[], Iterable[Closure]]
) -> AccumulationCheck:
    """Whether Σ ∂(part)/∂θ = ∂(full)/∂θ, in float64, for each tensor.

        ‖Σ parts − full‖ ≤ 1e-9 (Σ‖part‖ + ‖full‖) + 1e-13 ‖whole gradient‖

    `full` returns the loss of the full batch; each of `parts` the loss of one micro-batch, as it is handed
    to backward (so with its division, if there is one). If they differ: one factor, or weights for the
    parts, found by least squares; or batch statistics; or the tensors. Leaves no trace.

    Raises InputError for no parts, and for closures that return no loss.
    """
    subject = Subject.of(params)
    given = parts() if callable(parts) else parts
    if isinstance(given, Tensor) or not isinstance(given, Iterable):
        raise InputError("accumulation.not_parts", given=type(given).__name__)
    closures = list(given)
    if not closures:
        raise InputError("accumulation.no_parts")

    def everything() -> None:
        """Names what all closures name, for `untouched`."""
        return None

    everything.__defaults__ = (full, *closures)
    start = time.perf_counter()
    ranks = Ranks(
        subject.tensors, [m for m in (subject.module, *modules_named_by(everything)) if m is not None]
    )
    ranks.refuse_sharded("check.sharded")
    with ranks.apart(), untouched(subject, closure=everything) as before, eagerly():
        tensors = {n: t for n, t in subject.tensors.items() if t.requires_grad and t.is_leaf}
        modules = dict.fromkeys(
            m
            for m in [subject.module, *(m for c in [full, *closures] for m in modules_named_by(c))]
            if m is not None
        )
        also = [p for module in modules for p in module.parameters()]
        with in_double([*tensors.values(), *also]) as (mode, _):
            runs = Runs(tensors, full, closures, before, mode, list(modules))
            sums = runs.compare(batch_norm=False)
            cause, factor, weights = sums.explain()
            if cause and runs.normalised:
                instead, *_ = runs.compare(batch_norm=True).explain()
                if instead in ("", "factor", "weights") and instead != cause:
                    cause, factor, weights = "batch-norm", None, None
    return AccumulationCheck(
        sums.tensors(),
        aliases=subject.canonical,
        cause=cause,
        factor=factor,
        weights=weights,
        parts=len(closures),
        dropout=runs.drew,
        losses=(sums.full_loss, sums.parts_loss),
        seconds=time.perf_counter() - start,
    )
