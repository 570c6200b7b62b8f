"""From verdicts to findings: which layer explains which tensors, and what was most likely meant."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from torch import Tensor

from clinometer.gradients.check.determinism import first_difference
from clinometer.gradients.check.layer_checks import LayerCheck
from clinometer.gradients.check.numerics.stop_gradients import StopGradients
from clinometer.gradients.check.reason_search import TriedReason
from clinometer.gradients.check.result import TensorCheck
from clinometer.gradients.report.finding import EXPLAINED, FAULT, Finding
from clinometer.gradients.report.formatting import format_count, format_number, shorten
from clinometer.gradients.report.places import Where

_COMPRESSED = 0.1
"""Up to this relative error, hooks on saved tensors that give back something else compress on purpose."""
_COARSE = {"float32": 1e-3, "bfloat16": 0.2, "float16": 0.05}
"""How far a gradient at its own precision may be from float64's before it is mentioned."""


def conclude(
    tensors: Mapping[str, TensorCheck],
    layers: Sequence[LayerCheck],
    held: StopGradients | None,
    broken: Exception | None,
    reasons: Sequence[TriedReason] = (),
    computed: str = "",
) -> tuple[list[Finding], dict[str, Any]]:
    """The findings, and the status of tensors whose error a layer or a hook shows to be meant."""
    findings: list[Finding] = []
    statuses: dict[str, Any] = {}
    total = format_count(len(tensors))
    for reason in reasons:
        findings.append(_of_reason(reason, tensors))
        if findings[-1].severity == EXPLAINED:
            statuses |= dict.fromkeys(reason.names, "surrogate")
    solved = {name for reason in reasons for name in reason.names}
    wrong = [name for name, tensor in tensors.items() if tensor.status == "wrong" and name not in solved]
    left = dict.fromkeys(wrong)
    groups = culprits(layers)
    meant = bool(groups) and all(group[0].surrogate for group in groups)
    for group in sorted(groups, key=lambda group: bool(group[0].surrogate)):
        names = _concerned(group, groups, wrong)
        if group[0].surrogate and not meant:
            names = []
        for name in names:
            left.pop(name, None)
            if meant:
                statuses[name] = "surrogate"
        findings.append(_of_layer(group, names, held, _parts(group, tensors)))
    if left:
        where = held.written[0] if held is not None and held.written else None
        key = "written" if where else "tensor"
        values = {"total": total, **_asked(where)}
        findings.append(Finding("wrong-gradient", "wrong", FAULT, f"check.{key}", tuple(left), where, values))
    findings += _approximate(tensors, layers)
    findings += _corners(tensors, held)
    findings += _precision(tensors, computed)
    if broken is not None:
        findings.append(_finding("own_precision", EXPLAINED, [], values={"error": _short(broken)}))
    return findings, statuses


def culprits(layers: Sequence[LayerCheck]) -> list[list[LayerCheck]]:
    """Failing layers with nothing failing inside, those of one class and line together."""
    wrong = [layer for layer in layers if not layer.passed]
    grouped: dict[Any, list[LayerCheck]] = {}
    for layer in wrong:
        if any(_inside(other, layer) for other in wrong):
            continue
        place = (layer.where.file, layer.where.line) if layer.where else layer.path
        grouped.setdefault((layer.kind, place, layer.surrogate), []).append(layer)
    return list(grouped.values())


def _inside(inner: LayerCheck, outer: LayerCheck) -> bool:
    if outer.function or inner is outer:
        return False
    below = not outer.path or inner.path.startswith(outer.path + ".")
    return (below and inner.path != outer.path) or (inner.function and (below or inner.path == outer.path))


def accounted_for(layers: Sequence[LayerCheck], wrong: list[str]) -> set[str]:
    """Wrong tensors that a custom Function, an operator or a call of torch accounts for."""
    groups = culprits(layers)
    return {n for group in groups if group[0].function for n in _concerned(group, groups, wrong)}


def _of_reason(reason: TriedReason, tensors: Mapping[str, TensorCheck]) -> Finding:
    """What was found by trying: the gradients are right without it."""
    worst = max((tensors[name] for name in reason.names), key=lambda tensor: tensor.share)
    meant = reason.key == "hooked" or (reason.key == "saved_tensors" and worst.share <= _COMPRESSED)
    where = next((place for place in reason.places if place is not None), None)
    labels = [place.label for place in reason.places if place is not None]
    values = {
        "total": format_count(len(tensors)),
        "worst": worst.name,
        "analytic": format_number(worst.analytic, sign=True, place=""),
        "numeric": format_number(worst.numeric, sign=True, place=""),
        "share": format_share(worst.share),
        "function": reason.function,
        "lines": shorten(labels) if labels else "?",
        **_asked(where),
    }
    cause = "hooked" if reason.key == "hooked" else "saved-tensors" if meant else "wrong-gradient"
    status, severity = ("explained", EXPLAINED) if meant else ("wrong", FAULT)
    names = tuple(name for name in tensors if name in reason.names)
    return Finding(cause, status, severity, f"check.{reason.key}", names, where, values)


def _approximate(tensors: Mapping[str, TensorCheck], layers: Sequence[LayerCheck]) -> list[Finding]:
    """Gradients that are right but for a small error in every part, and whose error it is."""
    names = [name for name, tensor in tensors.items() if tensor.status == "approximate"]
    if not names:
        return []
    inexact = [layer for layer in layers if layer.share]
    inner = [one for one in inexact if not any(_inside(other, one) for other in inexact)]
    first = max(inner, key=lambda layer: layer.share, default=None)
    share = max(tensors[name].share for name in names)
    values = {"total": format_count(len(tensors)), "share": format_share(share)}
    if first is None:
        return [_finding("approximate", EXPLAINED, names, values=values)]
    values |= {"kind": first.kind, "own": format_share(first.share), "layer": first.path or first.kind}
    kind = "layer"
    if first.function and not first.operation:
        kind = "function"
    elif first.operation or (first.where is None and not first.function):
        kind = "torch"
    key = "check.approximate"
    return [Finding("approximate", "explained", EXPLAINED, key, tuple(names), first.where, values, kind)]


def format_share(share: float) -> str:
    """A relative error, to one digit: "4e-06"."""
    return f"{share:.0e}"


def _concerned(group: list[LayerCheck], groups: list[list[LayerCheck]], wrong: list[str]) -> list[str]:
    if group[0].operation:
        before = {name for layer in group for name in layer.upstream}
        return [name for name in wrong if name in before]
    own = {_own(layer, part) for layer in group for part in layer.wrong_parts}
    others = {
        _own(layer, part) for g in groups if g is not group for layer in g for part in layer.wrong_parts
    }
    upstream = any("input" in layer.wrong_parts for layer in group)
    return [name for name in wrong if name in own or (upstream and name not in others)]


def _own(layer: LayerCheck, part: str) -> str:
    return f"{layer.path}.{part}" if layer.path else part


def _parts(group: list[LayerCheck], tensors: Mapping[str, TensorCheck]) -> bool:
    """Whether the failing calls part the tensors: all upstream of them wrong, all others right.

    A layer's own tensors are on neither side.
    """
    own = {name for layer in group for name in layer.own}
    own |= {n for layer in group if not layer.function for n in tensors if n.startswith(f"{layer.path}.")}
    upstream = {name for layer in group for name in layer.upstream} - own
    judged = [t for t in tensors.values() if t.status not in ("unchecked", "no-gradient")]
    before = [t for t in judged if t.name in upstream]
    after = [t for t in judged if t.name not in upstream and t.name not in own]
    return (
        bool(before and after)
        and all(tensor.status == "wrong" for tensor in before)
        and all(tensor.passed for tensor in after)
    )


def _of_layer(group: list[LayerCheck], names: list[str], held: StopGradients | None, parts: bool) -> Finding:
    first = group[0]
    paths = list(dict.fromkeys(layer.path for layer in group if layer.path))
    where = first.where
    kind = "operator" if first.called else "function" if first.function else "layer"
    if first.surrogate:
        kind = f"surrogate_{first.surrogate}"
    elif first.flaw:
        kind = first.flaw
    elif first.operation:
        kind = "operation"
    elif not first.function and held is not None and held.written:
        kind, where = "layer_written", held.written[0]
    if not first.function and not first.path:
        kind = {"layer": "root", "layer_written": "root_written"}[kind]
    judged = max((layer.judgement for layer in group), key=lambda one: abs(one.error))
    values = {
        "kind": first.kind,
        "layer": shorten(paths) if paths else first.kind,
        "calls": format_count(len(group)),
        "analytic": format_number(judged.analytic, sign=True, place=""),
        "numeric": format_number(judged.numeric, sign=True, place=""),
        "called": first.called.label if first.called else "",
        "parts": parts and not first.operation,
        "kept": shorten(first.kept) if first.kept else "",
        "hint": next((layer.hint for layer in group if layer.hint is not None), None),
        **_asked(where),
    }
    severity = EXPLAINED if first.surrogate else FAULT
    cause = "surrogate-gradient" if first.surrogate else "wrong-backward"
    status = "explained" if first.surrogate else "wrong"
    alone = "root" if kind in ("function", "operator") and not paths else ""
    if kind == "second":
        alone = "kept" if first.kept else ""
    if first.operation and not first.surrogate:
        cause = "wrong-gradient"
    return Finding(cause, status, severity, f"check.{kind}", tuple(names), where, values, alone)


def _corners(tensors: Mapping[str, TensorCheck], held: StopGradients | None) -> list[Finding]:
    found = []
    for op, (count, where) in (held.corners if held is not None and held.active else {}).items():
        values = {"op": op, "values": format_count(count)}
        found.append(_finding("corner", EXPLAINED, [], where=where, values=values))
    unheld = next(iter(held.unheld.values()), None) if held is not None else None
    for status, reason in (("kink", ""), ("unclear", ""), ("unclear", "rounding"), ("unclear", "vmap")):
        names = [n for n, tensor in tensors.items() if (tensor.status, tensor.reason) == (status, reason)]
        if names:
            where = unheld if reason == "vmap" else None
            values = {"total": format_count(len(tensors)), **_asked(where)}
            finding = _finding(status, EXPLAINED, names, where=where, values=values, variant=reason)
            found.append(finding)
    return found


def _precision(tensors: Mapping[str, TensorCheck], computed: str) -> list[Finding]:
    """Gradients that are coarse at the precision of the model, or at that in which autocast computes."""
    far = [
        t
        for t in tensors.values()
        if t.passed
        and t.own_precision is not None
        and t.own_precision > _COARSE.get(computed or t.dtype, 1.0)
    ]
    if not far:
        return []
    worst = max(far, key=lambda t: t.own_precision or 0.0)
    values = {
        "dtype": computed or worst.dtype,
        "total": format_count(len(tensors)),
        "worst": worst.name,
        "distance": format_number(100 * (worst.own_precision or 0.0), place=""),
    }
    variant = "autocast" if computed and computed != worst.dtype else ""
    names = [t.name for t in far]
    return [_finding("coarse", EXPLAINED, names, values=values, variant=variant)]


def not_repeatable(run: Callable[[], Tensor], mode: AbstractContextManager[Any]) -> Finding:
    """Two runs, two losses; where they part is the best explanation."""
    where = first_difference(run, mode)
    key = "not_repeatable" if where is None else "not_repeatable_at"
    return Finding("not-repeatable", "loop", FAULT, f"check.{key}", (), where, _asked(where))


def no_graph(names: Sequence[str], total: int) -> Finding:
    """The loss does not know what it came from: nothing can be compared."""
    return _finding("loss_without_graph", FAULT, names, values={"total": format_count(total)})


def no_gradient(names: Sequence[str], cut: Sequence[str], total: int) -> list[Finding]:
    """Tensors without a gradient to compare: those the loss changes with all the same, and the rest.

    An expert that no token chose and a target network are among them, so this is no accusation, unless
    nothing at all was left to check.
    """
    severity = FAULT if len(names) == total else EXPLAINED
    rest = [name for name in names if name not in set(cut)]
    return [
        _finding(cause, severity, group, values={"total": format_count(total)})
        for cause, group in (("no_gradient_cut", list(cut)), ("no_gradient", rest))
        if group
    ]


def accumulated_by_hooks(
    tensors: Mapping[str, TensorCheck], places: Mapping[str, Where | None]
) -> list[Finding]:
    """Gradients that are right and come from a backward inside a hook."""
    names = [name for name in places if tensors[name].status in ("passed", "approximate")]
    if not names:
        return []
    values = {"total": format_count(len(tensors))}
    return [_finding("hook_backward", EXPLAINED, names, where=places[names[0]], values=values)]


def divided(
    tensors: dict[str, TensorCheck], given: Mapping[str, Tensor], places: Mapping[int, Where | None]
) -> list[Finding]:
    """Gradients that `scale_grad_by_freq` divides on purpose; those that pass without do not pass with it."""
    found: dict[Any, list[str]] = {}
    for name, tensor in tensors.items():
        if id(given[name]) in places:
            found.setdefault(places[id(given[name])], []).append(name)
            if tensor.passed:
                tensors[name] = replace(tensor, status="surrogate")
    return [_finding("divided", EXPLAINED, names, where=where) for where, names in found.items()]


def not_finite(loss: float) -> Finding:
    key = "check.not_finite_gradient" if math.isfinite(loss) else "check.not_finite"
    values = {"loss": format_number(loss, place="")}
    return Finding("not-finite", "explained", FAULT, key, values=values)


def _finding(
    cause: str,
    severity: Any,
    names: Sequence[str],
    *,
    where: Any = None,
    values: Mapping[str, Any] | None = None,
    variant: str = "",
) -> Finding:
    return Finding(
        cause.replace("_", "-"),
        "explained",
        severity,
        f"check.{cause}",
        tuple(names),
        where,
        dict(values or {}),
        variant,
    )


def _asked(where: Any) -> dict[str, Any]:
    return {} if where is None else {"op": where.op, "line": where.label}


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__
