"""Whether a zero gradient can ever be another: verdicts from runs at other values of the parameters.

What `why_zero` says of one run may be a matter of the values at this moment (a weight of zero, a minimum) or
hold for all values (a loss over one class, a term that cancels). `other_values` tries which; here the reasons
are made those that hold.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from clinometer.distributed.ranks import Ranks
from clinometer.gradients.diagnose.other_values import OtherValues, Outcome, has_gradient
from clinometer.gradients.report.finding import EXPLAINED, FAULT, Reason
from clinometer.gradients.report.formatting import words
from clinometer.gradients.sandbox.closure import Closure
from clinometer.gradients.sandbox.sandbox import Before
from clinometer.gradients.sandbox.subject import Subject
from clinometer.gradients.trace.observed_run import ObservedRun

Reasons = dict[str, Reason | str]
_OPEN = {
    "cancellation": {"", "read", "elsewhere", "paths"},
    "zero-loss-gradient": {"minimum", "flat"},
    "zero-weight-downstream": {"product", "forward"},
    "clamped": {"flat"},
    "unknown": {""},
}
"""Causes and variants that are judged anew: one run does not tell whether they can change."""
_OF_BIASES = {("cancellation", variant) for variant in ("", "read", "elsewhere", "paths")} | {
    ("constant", ""),
    ("constant", "slope"),
}
_DIFFERENCES = words("mse_loss l1_loss smooth_l1_loss huber_loss")


def judge_zeros(
    subject: Subject, closure: Closure, before: Before, ranks: Ranks, run: ObservedRun, reasons: Reasons
) -> Reasons:
    """Returns the reasons, those of zero gradients as they hold at other values of the parameters too.

    Where several ranks train, and where the closure cannot be run again, they stay what one run can tell.
    """
    known = {name: reason for name, reason in reasons.items() if isinstance(reason, Reason)}
    open_ones = {name: reason for name, reason in known.items() if _is_open(reason)}
    if not open_ones or run.flow is None:
        return reasons
    still = [name for name in subject.tensors if not has_gradient(run, subject, name)]
    groups: dict[Any, list[str]] = {}
    for name, reason in open_ones.items():
        groups.setdefault((reason.cause, reason.group), []).append(name)
    outcomes: dict[str, Outcome] = {}
    if ranks.alone and not ranks.unseen:
        tried = OtherValues(subject, closure, before, ranks, run, still)
        outcomes = tried.judge((names, cause == "cancellation") for (cause, _), names in groups.items())
    judged = {name: _judged(reason, name, run, outcomes.get(name)) for name, reason in open_ones.items()}
    for names in groups.values():
        if len(still) < len(subject.tensors) and all(_has_redundancy(name, subject) for name in names):
            judged |= {name: _by_construction(judged[name], run.sizes[name]) for name in names}
    return {**reasons, **judged}


def _has_redundancy(name: str, subject: Subject) -> bool:
    """Biases, and what a parametrization (weight_norm) makes a weight of: not every change matters."""
    return subject.tensors[name].dim() < 2 or "parametrizations." in name


def _by_construction(reason: Reason | str, size: float | None) -> Reason | str:
    """Such tensors alone, while weights learn: a bias does not enter a difference of results, or a slope."""
    if not isinstance(reason, Reason) or (reason.cause, reason.variant) not in _OF_BIASES:
        return reason
    exact = "" if size else "cancels"
    variant = "differentiated" if reason.variant == "slope" else exact
    return replace(reason, cause="structural", severity=EXPLAINED, variant=variant)


def _is_open(reason: Reason) -> bool:
    return reason.status == "zero" and reason.variant in _OPEN.get(reason.cause, ())


def _judged(reason: Reason, name: str, run: ObservedRun, outcome: Outcome | None) -> Reason | str:
    if reason.cause == "cancellation":
        if outcome in ("constant", "stuck"):
            return reason
        if run.sizes[name]:
            return "ok"
        return replace(reason, cause="structural", severity=EXPLAINED, variant="cancels")
    if outcome is None or (outcome == "constant" and reason.severity == FAULT):
        return reason
    if outcome == "constant":
        return replace(reason, cause="constant", severity=FAULT, variant=_constant(reason))
    if reason.cause == "zero-loss-gradient":
        at_zero = float(run.loss.detach()) == 0
        variant = {"stuck": "flat", "minimum": "minimum" if at_zero else "lowest"}.get(outcome, "")
        return replace(reason, severity=FAULT if outcome == "stuck" else EXPLAINED, variant=variant)
    if outcome == "stuck" and reason.cause == "zero-weight-downstream":
        return replace(reason, severity=FAULT, variant="fixed")
    if outcome == "stuck" and reason.cause == "clamped":
        return replace(reason, severity=FAULT)
    return reason


def _constant(reason: Reason) -> str:
    """Which sentence says why the gradient is zero at all values."""
    op = "" if reason.where is None else reason.where.op
    if op == "grad":
        return "slope"
    return "equal" if reason.variant == "forward" or op in _DIFFERENCES else ""
