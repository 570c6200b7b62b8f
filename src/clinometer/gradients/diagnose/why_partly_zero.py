"""Why rows or columns are zero while the rest is not: rows that were not looked up, silent units."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from clinometer.gradients.report.finding import EXPLAINED, Reason
from clinometer.gradients.sandbox.subject import Subject
from clinometer.gradients.trace.backward_trace import Flow
from clinometer.gradients.trace.graph import Node, operation
from clinometer.gradients.trace.graph_search import place_of
from clinometer.gradients.trace.node_kinds import PICK, PRODUCT, RELU


def why_partly(
    name: str, subject: Subject, flow: Flow, rows: Tensor | None, columns: Tensor | None
) -> Reason | None:
    """Returns why these rows or columns are zero; None if no cause is certain."""
    node = flow.graph.leaves.get(id(subject.tensors[name]))
    if node is None:
        return None
    above = list(flow.above(node))
    mask = rows if rows is not None else columns
    assert mask is not None
    values = {"zero": int(mask.sum()), "all": len(mask), "name": name}
    for consumer, _ in above:
        if operation(consumer) in PICK and rows is not None:
            where = place_of(consumer, flow)
            variant = "rows" if operation(consumer).startswith("Embedding") else "picked"
            return Reason("partly-zero", "absent-rows", EXPLAINED, variant, where, values, group=consumer)
    for consumer, _ in above:
        if operation(consumer) in PRODUCT | {"NativeLayerNorm", "NativeBatchNorm", "Add", "Mul"}:
            if rows is not None and (found := _silent(consumer, rows, flow, up=True)):
                return _dead(*found, flow)
            if columns is not None and (found := _silent(consumer, columns, flow, up=False)):
                return _dead(*found, flow)
    return None


def merge_units(reasons: Mapping[str, Reason | str]) -> dict[str, Reason | str]:
    """Returns the reasons, those of inactive units in several activations as one, with their sums."""
    units = {n: r for n, r in reasons.items() if isinstance(r, Reason) and r.variant == "units"}
    layers = {reason.group: reason for reason in units.values()}
    # The second look (`why_blocks_zero`) groups by place: an activation is not counted twice.
    seen = {_place(reason) for group, reason in layers.items() if not isinstance(group, tuple)}
    layers = {g: r for g, r in layers.items() if not isinstance(g, tuple) or _place(r) not in seen}
    if len(layers) < 2:
        return dict(reasons)
    totals = {key: sum(reason.values[key] for reason in layers.values()) for key in ("zero", "all")}
    lines = {_place(reason)[:2] for reason in layers.values()}
    where = next(iter(layers.values())).where if len(lines) == 1 else None
    values = {**totals, "layers": len(layers)}
    merged = Reason("partly-zero", "dead-activation", EXPLAINED, "layers", where, values, group=0)
    return {**reasons, **dict.fromkeys(units, merged)}


def _place(reason: Reason) -> tuple[str, int, str]:
    where = reason.where
    return ("", 0, "") if where is None else (where.file, where.line, where.module)


def _dead(node: Node, dead: Tensor, flow: Flow) -> Reason:
    where = place_of(node, flow)
    values = {"zero": int(dead.sum()), "all": len(dead)}
    return Reason("partly-zero", "dead-activation", EXPLAINED, "units", where, values, group=node)


def _silent(start: Node, zero: Tensor, flow: Flow, up: bool, most: int = 12) -> tuple[Node, Tensor] | None:
    """A ReLU nearby, towards the loss or away from it, silent in (at least) these channels; which it was."""
    queue, seen = [start], {start}
    while queue and len(seen) <= most:
        now = queue.pop(0)
        for channels in flow.dead.get(now, ()):
            if len(channels) == len(zero) and bool((channels | ~zero).all()):
                return now, channels
        if now is not start and operation(now) in PRODUCT | RELU:
            continue
        if up:
            near = [consumer for consumer, _ in flow.graph.consumers.get(now, ())]
        else:
            near = [below for below, _ in now.next_functions if below is not None]
        for node in near:
            if node not in seen:
                seen.add(node)
                queue.append(node)
    return None
