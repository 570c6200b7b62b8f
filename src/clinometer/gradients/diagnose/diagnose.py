"""diagnose(): why each gradient is missing, zero or not finite, and on which line."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from torch.optim import Optimizer

from clinometer.distributed.ranks import Ranks, refuse_flattened
from clinometer.gradients.diagnose import loop_checks
from clinometer.gradients.diagnose.evidence import read_clue
from clinometer.gradients.diagnose.existing_gradients import without_closure
from clinometer.gradients.diagnose.finiteness import Origin
from clinometer.gradients.diagnose.optimizer_membership import Membership
from clinometer.gradients.diagnose.outside_tensors import find_outside
from clinometer.gradients.diagnose.second_runs import look_at_values, only_looked_at, used_by_chance
from clinometer.gradients.diagnose.why_blocks_zero import explain_lines
from clinometer.gradients.diagnose.why_constant import judge_zeros
from clinometer.gradients.diagnose.why_none import before_any_run, why_none
from clinometer.gradients.diagnose.why_nonfinite import from_forward, trace_back, why_nonfinite
from clinometer.gradients.diagnose.why_partly_zero import merge_units, why_partly
from clinometer.gradients.diagnose.why_zero import why_zero
from clinometer.gradients.report.document import BLANK, Document, Line, dim, ok, sentence
from clinometer.gradients.report.finding import EXPLAINED, FAULT, Finding, Reason, Severity
from clinometer.gradients.report.formatting import format_count
from clinometer.gradients.report.module_names import owners
from clinometer.gradients.report.places import Where
from clinometer.gradients.report.result import Result
from clinometer.gradients.sandbox.closure import Closure
from clinometer.gradients.sandbox.public_calls import public_call
from clinometer.gradients.sandbox.sandbox import Before, modules_named_by, untouched
from clinometer.gradients.sandbox.subject import Subject
from clinometer.gradients.trace.circumstances import in_order, run_eagerly
from clinometer.gradients.trace.observed_run import ObservedRun, gradients_kept, observe
from clinometer.messages import InputError, say

_TRIED = 4
"""Lines at which numbers leave torch that are tried one by one: a forward each."""
_OFTEN_MEANT = ("detach", "data", "no_grad", "inference_mode")
"""Cuts that are usual where a loss should not train something."""
_SHOWN = 6
"""Findings written out in full: one screen."""


@dataclass(frozen=True)
class Entry:
    """What was found about one tensor."""

    name: str
    status: str
    """"ok", "none", "zero", "partly-zero" or "non-finite"."""
    finding: Finding | None = None
    """The finding it belongs to; None if the gradient is in order, or no cause is certain."""

    @property
    def cause(self) -> str | None:
        return self.finding.cause if self.finding else None

    @property
    def severity(self) -> Severity | None:
        return self.finding.severity if self.finding else None

    @property
    def where(self) -> Where | None:
        return self.finding.where if self.finding else None

    @property
    def message(self) -> str:
        """What happened and why, in the current language; "" when all is well."""
        if self.finding is None:
            return ""
        what, why = self.finding.say("what"), self.finding.say("why")
        return say("messages.two_sentences", first=what, second=why) if what and why else what or why

    @property
    def remedy(self) -> str:
        return self.finding.say("remedy") if self.finding else ""

    def to_dict(self) -> dict[str, Any]:
        return {
            "status": self.status,
            "cause": self.cause,
            "severity": self.severity,
            "where": None if self.where is None else self.where.to_dict(),
            "message": self.message,
            "remedy": self.remedy,
        }


class Diagnosis(Result):
    """Every tensor's status, and the findings: one for each cause and place, faults first."""

    def __init__(
        self,
        subject: Subject,
        entries: dict[str, Entry],
        findings: list[Finding],
        nodes: int | None,
        seconds: float,
        *,
        rank: tuple[int, int] = (0, 1),
    ) -> None:
        self._entries = entries
        self._others = dict(subject.canonical)
        self.findings = in_order(sorted(findings, key=lambda f: -len(f.names)))
        self.numbers = subject.size
        self.nodes = nodes
        self.seconds = seconds
        self.rank = rank
        """The process that looked, and how many train together."""

    @property
    def healthy(self) -> bool:
        """Whether nothing is very likely wrong; what is explained does not count."""
        return not any(finding.severity == FAULT for finding in self.findings)

    def entries(self) -> Mapping[str, Entry]:
        return self._entries

    def other_names(self) -> Mapping[str, str]:
        return self._others

    def document(self, language: str | None = None) -> Document:
        lines: Document = []
        for finding in self.findings[:_SHOWN]:
            lines += [*finding.document(language), BLANK]
        if (rest := len(self.findings) - _SHOWN) > 0:
            lines += [Line(sentence("diagnosis.more", language, count=rest)), BLANK]
        if self.rank[1] > 1:
            values = {"rank": self.rank[0], "count": self.rank[1]}
            lines.append(Line(tuple(map(dim_span, sentence("diagnosis.ranks", language, **values)))))
        mark = (ok("✓ "),) if not self.findings else ()
        lines.append(Line((*mark, *self._looked(language)), hang=2 if mark else 0))
        return lines

    def facts(self) -> Mapping[str, Any]:
        return {
            "healthy": self.healthy,
            "findings": [finding.to_dict() for finding in self.findings],
            "tensors": {name: entry.to_dict() for name, entry in self._entries.items()},
            "looked_at": {
                "tensors": len(self._entries),
                "numbers": self.numbers,
                "nodes": self.nodes,
                "seconds": self.seconds,
                "rank": self.rank[0],
                "ranks": self.rank[1],
            },
        }

    def _looked(self, language: str | None) -> Any:
        values = {
            "count": format_count(len(self._entries)),
            "numbers": format_count(self.numbers),
            "seconds": f"{self.seconds:.1f}",
        }
        if self.nodes is None:
            return sentence("diagnosis.looked_at_grads", language, **values)
        return sentence("diagnosis.looked", language, nodes=format_count(self.nodes), **values)


def dim_span(span: Any) -> Any:
    return dim(span.text)


@public_call
def diagnose(
    params: Any, closure: Closure | None = None, *, optimizer: Optimizer | Iterable[Optimizer] | None = None
) -> Diagnosis:
    """Returns why each gradient is None, zero, partly zero or not finite, with the line at fault.

    `closure` computes the loss; it is run once, with a backward, and again where one run does not tell: its
    forward when the loss is not finite or a layer was not used, both at other values of the parameters when
    a gradient is zero. Nothing is changed by it. Without one, what can be known from
    the gradients that are there is said, and no more. With `optimizer` (one or several), what a step would
    do is too. Of sharded tensors, and under DDP, every rank must call: they agree on what is missing or
    zero. Raises InputError for arguments that cannot be used, and whatever the closure raises.
    """
    begun = time.perf_counter()
    subject = Subject.of(params)
    optimizers = _optimizers(optimizer)
    membership = Membership(subject, optimizers)
    if closure is None:
        refuse_flattened(() if subject.module is None else subject.module.modules())
        ranks = Ranks(subject.tensors)
        reasons = without_closure(subject, ranks)
        findings = loop_checks.check_optimizers(membership)
        entries, found = collect(subject, reasons)
        return Diagnosis(
            subject, entries, [*found, *findings], None, time.perf_counter() - begun, rank=ranks.place
        )
    modules = [m for m in (subject.module, *modules_named_by(closure)) if m is not None]
    ranks = Ranks(subject.tensors, modules)
    with (
        ranks.apart(),
        run_eagerly(subject.compiled) as circumstances,
        untouched(subject, closure=closure, optimizer=optimizers) as before,
    ):
        result = observe(subject, closure, before, ranks, read_clue)
        with gradients_kept(subject):
            reasons, origin = explain(subject, closure, result, before, ranks)
            reasons = judge_zeros(subject, closure, before, ranks, result, reasons)
        unknown = {name: result.lines[name] for name, reason in reasons.items() if reason == "partly-zero"}
        reasons = merge_units(reasons | explain_lines(subject, closure, before, unknown, ranks))
        reasons = _without_chance(subject, closure, reasons, ranks)
        reasons = _awaited(reasons, ranks, result)
        reasons, apart = _kept_apart(reasons, membership.outside(result.getting))
        reasons = _of_other_steps(reasons, membership, result.reached)
        findings = find_outside(subject, result, before, membership)
        findings += loop_checks.check_run(
            subject, result, membership, before, ranks, closure=closure, apart=apart
        )
        nodes = len(result.flow.graph.nodes) if result.flow else 0
        older = result.older
        if older is not None and older.live and older.saved and not older.whole:
            findings.append(older.finding())
        findings += circumstances.findings(closure, before)
    entries, found = collect(subject, reasons)
    if origin is not None and not any(f.status == "non-finite" for f in found):
        found.append(_finding(from_forward(origin), ()))
    nothing = result.loss.grad_fn is None and not result.getting
    if nothing and not any(f.cause == "loss-without-graph" for f in found):
        found.append(_finding(Reason("none", "loss-without-graph", FAULT, "frozen"), ()))
    return Diagnosis(
        subject, entries, [*found, *findings], nodes, time.perf_counter() - begun, rank=ranks.place
    )


def _optimizers(given: Any) -> tuple[Optimizer, ...]:
    several = isinstance(given, Iterable) and not isinstance(given, str | Mapping)
    optimizers: tuple[Any, ...] = () if given is None else tuple(given) if several else (given,)
    for optimizer in optimizers:
        if not isinstance(getattr(optimizer, "param_groups", None), list):  # wrappers need not inherit
            raise InputError("diagnosis.optimizer", type=type(optimizer).__name__)
    return optimizers


def explain(
    subject: Subject, closure: Closure, result: ObservedRun, before: Before, ranks: Ranks
) -> tuple[dict[str, Reason | str], Origin | None]:
    """Returns for each tensor a reason, or its status if no reason is known."""
    loss = float(result.loss.detach())
    reasons: dict[str, Reason | str] = {}
    flow = result.flow
    _forget_logs(subject, closure, result, before, ranks)
    lost = _lost(subject, result, ranks)
    sizes = result.sizes | dict.fromkeys(lost, 0.0)
    nonfinite = [n for n, size in result.sizes.items() if size is not None and not math.isfinite(size)]
    for name, tensor in subject.tensors.items():
        size = result.sizes[name]
        if not size and (own := result.own.get(name)) and math.isfinite(own):
            reasons[name] = "ok"  # a backward of the closure's own brought it one
        elif size is None:
            reasons[name] = before_any_run(tensor) or why_none(name, subject, result.trace, flow, result.loss)
        elif tensor.numel() == 0:
            reasons[name] = "ok"
        elif not math.isfinite(size):
            continue  # below, when the forward has perhaps been run once more
        elif flow is None:
            reasons[name] = "ok" if size else "zero"
        elif size == 0 and not math.isfinite(loss):
            reasons[name] = "zero"  # after a NaN in the forward nothing further follows from it
        elif flow.graph.leaves.get(id(tensor)) in flow.cancelled:
            reasons[name] = Reason("zero", "structural", group=0, severity=EXPLAINED, values={"size": size})
        elif name in lost:
            reasons[name] = why_zero(name, subject, flow, loss, sizes)
        elif name in result.lines:
            reasons[name] = why_partly(name, subject, flow, *result.lines[name]) or "partly-zero"
        else:
            reasons[name] = "ok"
    origin = values = None
    if ranks.any(not math.isfinite(loss)):
        values, returned = look_at_values(subject, closure, before, ranks)
        origin = values.of(returned)
    for name in nonfinite:
        if flow is None:
            reasons[name] = Reason("non-finite", "unknown", FAULT, "own", group=0)
            continue
        reason = why_nonfinite(name, subject, flow, origin, ranks.alone)
        if reason.cause == "backward" and ranks.alone:  # others would wait for a forward of this rank's own
            with suppress(Exception):  # a closure that cannot be run twice keeps its first answer
                values = values or look_at_values(subject, closure, before, ranks)[0]
                reason = trace_back(reason, values)
        reasons[name] = reason
    return {name: reasons[name] for name in subject.tensors}, origin


def _lost(subject: Subject, result: ObservedRun, ranks: Ranks) -> set[str]:
    """The tensors whose gradient is zero or, where one process has it whole, nothing but rounding."""
    found = set()
    for name, tensor in subject.tensors.items():
        leaf = None if result.flow is None else result.flow.graph.leaves.get(id(tensor))
        size = result.sizes[name]
        if size is None or not math.isfinite(size):
            continue
        if (
            leaf is not None
            and result.flow is not None
            and tensor.grad is not None
            and (ranks.alone or not size)
        ):
            rounding = result.flow.is_rounding(leaf, tensor.grad)
            found |= {name} if rounding else set()
        elif not size:
            found.add(name)
    return found


def _forget_logs(
    subject: Subject, closure: Closure, result: ObservedRun, before: Before, ranks: Ranks
) -> None:
    """Of the numbers that left torch, keep those the loss depends on, as far as can be tried.

    Where one rank tries, all run their forward.
    """
    missing = sum(
        result.trace.bits[id(tensor)]
        for name, tensor in subject.tensors.items()
        if result.sizes[name] is None and tensor.requires_grad and tensor.is_leaf
    )
    trace = result.trace
    suspects = {e.place: e for e in trace.escapes if e.concerns(missing, trace.cuts)}
    logs = set()
    if ranks.sharded:
        # With another number a rank may go another way, or fail, while the others wait for its shards.
        # What cannot be tried is not accused, unless it is all there is to say.
        logs = set() if result.loss.grad_fn is None else set(suspects)
        suspects = {}
    if len(suspects) > _TRIED or not math.isfinite(result.returned):
        suspects = {}
    waiting = list(suspects.values())
    with gradients_kept(subject):
        while ranks.any(bool(waiting)):
            escape = waiting.pop() if waiting else None
            if only_looked_at(escape, subject, closure, before, result.returned) and escape:
                logs.add(escape.place)
    trace.escapes[:] = [escape for escape in trace.escapes if escape.place not in logs]


def _without_chance(
    subject: Subject, closure: Closure, reasons: dict[str, Reason | str], ranks: Ranks
) -> dict[str, Reason | str]:
    """Before a layer is accused of never being used: do other random numbers use it, as in LayerDrop?"""
    unused = {
        name
        for name, reason in reasons.items()
        if isinstance(reason, Reason) and reason.cause == "unused" and reason.severity == FAULT
    }
    unused = ranks.named_by_any(unused)
    if not unused or subject.module is None or not subject.module.training:
        return reasons
    chance = Reason("none", "unused", EXPLAINED, "chance", group=0)
    return {**reasons, **dict.fromkeys(used_by_chance(subject, closure, unused, ranks), chance)}


def _kept_apart(
    reasons: dict[str, Reason | str], outside: set[str]
) -> tuple[dict[str, Reason | str], set[str]]:
    """Cut by detach() or no_grad(), or not used, and not in the optimizer either: two signs of one intention.

    Examples: a target network, a teacher, an average of the weights, the generator while the discriminator
    learns.
    """
    apart = {
        name: replace(reason, severity=EXPLAINED, variant="apart")
        for name, reason in reasons.items()
        if name in outside and isinstance(reason, Reason)
        if (reason.cause == "cut" and reason.variant in _OFTEN_MEANT)
        or (reason.cause == "unused" and reason.severity == FAULT and reason.variant != "replicated")
    }
    return {**reasons, **apart}, set(apart)


def _awaited(reasons: dict[str, Reason | str], ranks: Ranks, result: ObservedRun) -> dict[str, Reason | str]:
    """What DistributedDataParallel waits for and this forward does not use: every rank stops for it."""
    awaited = ranks.awaited(result.trace.outermost)
    replicated = Reason("none", "unused", FAULT, "replicated", group=0)
    return {
        name: replicated
        if name in awaited and isinstance(reason, Reason) and reason.cause == "unused"
        else reason
        for name, reason in reasons.items()
    }


def _of_other_steps(
    reasons: dict[str, Reason | str], membership: Membership, reached: set[int]
) -> dict[str, Reason | str]:
    """What this loss does not concern: tensors of optimizers to which it brings no gradient at all."""
    faults = {n: r for n, r in reasons.items() if isinstance(r, Reason) and r.severity == FAULT}
    cut = {n for n, r in faults.items() if r.cause == "cut" and r.variant in _OFTEN_MEANT}
    unused = {
        n
        for n, r in faults.items()
        if r.cause in ("unused", "not-reaching-loss") and r.variant != "replicated"
    }
    variants = dict.fromkeys(membership.of_other_steps(cut, reached), "other_step")
    if unused:
        variants |= dict.fromkeys(membership.of_other_losses(unused), "other_loss")
        variants |= dict.fromkeys(membership.of_other_steps(unused, reached, live=True), "other_step")
    apart = {
        name: replace(faults[name], severity=EXPLAINED, variant=variant, group=faults[name].group or 0)
        for name, variant in variants.items()
    }
    return {**reasons, **apart}


def collect(subject: Subject, reasons: Mapping[str, Reason | str]) -> tuple[dict[str, Entry], list[Finding]]:
    """One finding for each cause and place, and each tensor's entry."""
    groups: dict[Any, list[str]] = {}
    alike: dict[Any, Any] = {}
    keys = {name: _key(reason, alike) for name, reason in reasons.items() if isinstance(reason, Reason)}
    for name, key in keys.items():
        groups.setdefault(key, []).append(name)
    findings = {}
    for key, names in groups.items():
        reason = next(r for r in (reasons[names[0]],) if isinstance(r, Reason))
        findings[key] = _finding(reason, tuple(names), owners(names, subject))
    entries = {
        name: Entry(name, reason.status, findings[keys[name]])
        if isinstance(reason, Reason)
        else Entry(name, reason)
        for name, reason in reasons.items()
    }
    return entries, list(findings.values())


def _key(reason: Reason, alike: dict[Any, Any]) -> Any:
    """What tells findings apart; layers that run at one line are `alike` where nothing else does."""
    place = None if reason.where is None else (reason.where.file, reason.where.line)
    group = place if reason.group is None else reason.group
    if reason.where is not None and not isinstance(group, int | str | tuple):  # a node of the graph
        group = alike.setdefault(group, (place, repr(sorted(reason.values.items()))))
    return reason.status, reason.cause, reason.variant, group


def _finding(reason: Reason, names: tuple[str, ...], owned: tuple[str, ...] = ()) -> Finding:
    return Finding(
        reason.cause,
        reason.status,
        reason.severity,
        f"diagnosis.{reason.status}.{reason.cause}",
        names,
        reason.where,
        reason.values,
        reason.variant,
        others=reason.others,
        owners=owned,
    )
