"""Why is it None: asked in the order in which one answer makes the next question meaningless."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from clinometer.gradients.diagnose.optional_modules import may_be_skipped
from clinometer.gradients.report.finding import EXPLAINED, FAULT, Reason
from clinometer.gradients.report.places import definition_of
from clinometer.gradients.sandbox.code_origin import is_installed
from clinometer.gradients.sandbox.subject import Subject
from clinometer.gradients.trace.backward_trace import Flow
from clinometer.gradients.trace.cuts import Cut, Escape
from clinometer.gradients.trace.forward_trace import Trace
from clinometer.gradients.trace.graph import Node
from clinometer.gradients.trace.graph_search import receives
from clinometer.torch_internals.custom_functions import function_of
from clinometer.torch_internals.tensors import has_hooks

_MEANT = {"detach": 1, "no_grad": 1, "inference_mode": 1}
"""Cuts that are often meant come after those that are not."""


def before_any_run(tensor: Tensor) -> Reason | None:
    """Returns the reason if the tensor alone shows it; None if a run is needed."""
    if tensor.is_meta and tensor.requires_grad and tensor.is_leaf:
        return Reason("none", "unused", EXPLAINED, "meta", group="meta")
    if not tensor.requires_grad:
        if tensor.is_floating_point() or tensor.is_complex():
            return Reason("none", "frozen", EXPLAINED)
        return Reason("none", "frozen", EXPLAINED, "integer", values={"dtype": _short(tensor.dtype)})
    if not tensor.is_leaf and not tensor.retains_grad:
        made = tensor.grad_fn.name() if tensor.grad_fn else "?"
        return Reason("none", "not-leaf", values={"made": made})
    return None


def why_none(name: str, subject: Subject, trace: Trace, flow: Flow | None, loss: Tensor) -> Reason:
    """Returns why the backward from `loss` left no gradient on a leaf with requires_grad."""
    tensor = subject.tensors[name]
    bit = trace.bits[id(tensor)]
    node = flow.graph.leaves.get(id(tensor)) if flow else None
    if flow is not None and node is not None:
        return _undefined(node, flow) or Reason("none", "cleared", EXPLAINED)
    cuts = [cut for i, cut in enumerate(trace.cuts) if cut.live & bit]
    reaching = trace.cuts_in(loss)
    to_loss = [cut for i, cut in enumerate(trace.cuts) if cut.live & bit and reaching >> i & 1]
    if loss.grad_fn is None and not (loss.requires_grad and has_hooks(loss)):
        # A loss made from a Python number has no cut in it: the place is where the number left torch.
        found = _first(to_loss) or (trace.escapes[-1] if trace.escapes else _first(trace.cuts))
        where = found.where if found else None
        return Reason("none", "loss-without-graph", FAULT, found.kind if found else "", where, group=0)
    if to_loss:
        return _cut_on_each_path(to_loss)
    if escapes := [escape for escape in trace.escapes if escape.concerns(bit, trace.cuts)]:
        return _escaped(escapes[-1])
    if stray := [cut for cut in cuts if cut.kind in ("parameter", "overwritten", "deepcopy", "function")]:
        return _cut(stray[0])
    if trace.vanished & bit:
        return Reason("none", "not-reaching-loss", EXPLAINED, "differentiated", trace.end_of(bit))
    if bit in trace.first_use:
        where = trace.end_of(bit) or trace.first_use[bit]
        if where is not None and is_installed(
            where.file
        ):  # BertModel's pooler, which the user's loss does not use
            return Reason("none", "not-reaching-loss", EXPLAINED, "extra_output", where)
        return Reason("none", "not-reaching-loss", FAULT, "", where)
    if skip := may_be_skipped(name, subject, trace):
        return Reason("none", "unused", EXPLAINED, skip, group=skip)
    return Reason("none", "unused", FAULT, group=0)


def _undefined(node: Node, flow: Flow) -> Reason | None:
    if receives(node, flow, lambda size: size is not None):
        return None
    event = next((event for event, _ in flow.origins(node, lambda size: size is None)), None)
    if event is None:
        return None
    where, variant, name = flow.trace.places.get(event.node), "built_in", event.node.name()
    if (function := function_of(event.node)) is not None:
        where, variant, name = definition_of(function.backward) or where, "", function.__name__
    values = {"function": name}
    return Reason("none", "undefined-in-backward", FAULT, variant, where, values, group=event.node)


def _cut_on_each_path(cuts: list[Cut]) -> Reason:
    """Each of these cuts is on a path of its own, for behind one nothing leads to the tensor any more.

    First the one that is least often meant: beside the detach() of an advantage or a target, a .data.
    """
    places: dict[Any, Cut] = {}
    real = [cut for cut in cuts if cut.kind != "integer"] or cuts
    for cut in sorted(real, key=lambda cut: _MEANT.get(cut.kind, 0)):
        places.setdefault(cut.group or (cut.where and (cut.where.file, cut.where.line)), cut)
    first, *others = places.values()
    reason = _cut(first)
    further = tuple(cut.where for cut in others if cut.where is not None)
    return replace(reason, others=further, group=(reason.group, tuple((w.file, w.line) for w in further)))


def _cut(cut: Cut) -> Reason:
    group = cut.group or (cut.where and (cut.where.file, cut.where.line))
    return Reason("none", "cut", FAULT, cut.kind, cut.where, {"op": cut.where.op if cut.where else ""}, group)


def _escaped(escape: Escape) -> Reason:
    return Reason("none", "cut", FAULT, "escape", escape.where, {"op": escape.kind}, escape.place)


def _first(cuts: list[Cut]) -> Any:
    """The first cut that is not a mere comparison or index, else the first."""
    return next((cut for cut in cuts if cut.kind != "integer"), cuts[0] if cuts else None)


def _short(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
