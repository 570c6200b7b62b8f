"""Why rows or columns are zero while the rest is not: rows nobody looked up, silent units."""

from __future__ import annotations

import torch
from torch import Tensor

from clinometer.gradients.diagnose.why_none import Reason
from clinometer.gradients.diagnose.why_zero import place_above
from clinometer.gradients.report.finding import EXPLAINED
from clinometer.gradients.sandbox.subject import Subject
from clinometer.gradients.trace.backward_trace import Flow
from clinometer.gradients.trace.graph import Node, operation
from clinometer.gradients.trace.node_kinds import PICK, PRODUCT, RELU


def zero_lines(gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Which rows (index of dimension 0) and which columns (of dimension 1) are zero; None for none."""
    if gradient.layout is torch.sparse_coo:
        rows = torch.ones(gradient.shape[0], dtype=torch.bool, device=gradient.device)
        rows[gradient.coalesce().indices()[0]] = False
        return (rows if bool(rows.any()) else None), None
    if gradient.layout is not torch.strided or not gradient.is_floating_point() or gradient.dim() == 0:
        return None, None
    if gradient.is_meta or gradient.is_nested:
        return None, None
    return tuple(_zero(gradient, dim) if dim < gradient.dim() else None for dim in (0, 1))  # pyright: ignore[reportReturnType]


def _zero(gradient: Tensor, dim: int) -> Tensor | None:
    if gradient.dim() == 1:
        mask = gradient == 0
        return mask if bool(mask.any()) else None
    if gradient.shape[dim] == 1:
        return None
    others = [d for d in range(gradient.dim()) if d != dim]
    # A sum of 0 is a quick and nearly certain sign; only those lines are read number by number.
    suspects = (gradient.sum(others) == 0).nonzero().flatten()
    if not len(suspects):
        return None
    mask = torch.zeros(gradient.shape[dim], dtype=torch.bool, device=gradient.device)
    if len(suspects) * 2 > gradient.shape[dim]:
        mask = (gradient.amax(others) == 0) & (gradient.amin(others) == 0)
    else:
        lines = gradient.index_select(dim, suspects).movedim(dim, 0).flatten(1)
        mask[suspects] = (lines.amax(1) == 0) & (lines.amin(1) == 0)
    return mask if bool(mask.any()) else None


def why_partly(
    name: str, subject: Subject, flow: Flow, rows: Tensor | None, columns: Tensor | None
) -> Reason | None:
    """Why these rows or columns are zero; None when nothing certain can be said."""
    node = flow.graph.leaves.get(id(subject.tensors[name]))
    if node is None:
        return None
    above = list(flow.above(node))
    mask = rows if rows is not None else columns
    assert mask is not None
    values = {"zero": int(mask.sum()), "all": len(mask), "name": name}
    for consumer, _ in above:
        if operation(consumer) in PICK and rows is not None:
            where = flow.trace.places.get(consumer) or place_above(consumer, flow)
            variant = "rows" if operation(consumer).startswith("Embedding") else "picked"
            return Reason("partly-zero", "absent-rows", EXPLAINED, variant, where, values, group=consumer)
    for consumer, _ in above:
        if operation(consumer) in PRODUCT | {"NativeLayerNorm", "NativeBatchNorm", "Add", "Mul"}:
            if rows is not None and (found := _silent(consumer, rows, flow, up=True)):
                return _dead(*found, flow)
            if columns is not None and (found := _silent(consumer, columns, flow, up=False)):
                return _dead(*found, flow)
    return None


def _dead(node: Node, dead: Tensor, flow: Flow) -> Reason:
    where = flow.trace.places.get(node) or place_above(node, flow)
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
