"""Why whole rows or columns are zero in a block, as for a masked attention head: a second look.

The first backward notes only what is zero as a whole. Here forward and backward run once more, and of every
gradient it is noted which of its lines (index of one dimension) a node turned to zero. A pattern of lines
explains a parameter's zero rows when it is theirs, perhaps with each index standing for several neighbouring
rows (head h → rows h·K … h·K+K−1), or repeated (q, k and v in one matrix).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from clinometer.distributed.ranks import Ranks
from clinometer.gradients.report.finding import EXPLAINED, Reason
from clinometer.gradients.report.places import Where
from clinometer.gradients.sandbox.closure import Closure, evaluate
from clinometer.gradients.sandbox.interrupts import theirs
from clinometer.gradients.sandbox.sandbox import Before
from clinometer.gradients.sandbox.subject import Subject
from clinometer.gradients.trace.forward_trace import Trace
from clinometer.gradients.trace.graph import Graph, Node, leaf_through, operation
from clinometer.gradients.trace.graph_search import breadth_first, inputs
from clinometer.gradients.trace.node_kinds import MASK, PICK, PRODUCT, RELU, SMOOTH
from clinometer.gradients.trace.observed_run import gradients_kept
from clinometer.torch_internals.nodes import saved

Lines = tuple[Tensor | None, Tensor | None]
"""Zero rows and zero columns of a gradient."""
_FILLS = MASK | {"CopySlices", "IndexPut", "SliceScatter", "SelectScatter", "IndexCopy"}
_MOST_LINES = 1 << 16
_MOST_NODES = 80


def explain_lines(
    subject: Subject, closure: Closure, before: Before, lines: dict[str, Lines], ranks: Ranks
) -> dict[str, Reason]:
    """Reasons for those tensors whose zero rows or columns some node made; the gradients stay as they are.

    Nothing of sharded tensors, whose lines no rank has whole while a backward runs.
    """
    # Where one rank runs once more all do: what it waits for in the forward, another must send.
    if ranks.sharded or ranks.unseen or not ranks.any(bool(lines)):
        return {}
    try:
        with gradients_kept(subject):
            look = _Look(subject, closure, before)
    except Exception:  # a closure that cannot be run twice: a batch from an iterator, a graph used up
        return {}
    found = {name: look.explain(name, lines) for name in lines}
    return {name: reason for name, reason in found.items() if reason is not None}


@dataclass
class _Made:
    """Lines that a node turned to zero in the gradient of one of its inputs."""

    position: int
    zero: Tensor


class _Look:
    def __init__(self, subject: Subject, closure: Closure, before: Before) -> None:
        before.rewind()
        self.subject = subject
        self.trace = Trace(subject)
        self.made: dict[Node, list[_Made]] = {}
        self.inputs: dict[Node, list[Tensor]] = {}
        """Which features of what a product multiplies are zero throughout."""
        with self.trace.watching():
            loss = evaluate(closure)
        before.set_grads_aside()
        self.graph = Graph(loss)
        hooks = [node.register_hook(self._watcher(node)) for node in self.graph.nodes if _may_make(node)]
        try:
            keep = loss.grad_fn not in self.trace.places
            theirs(torch.autograd.backward, loss, torch.ones_like(loss) if loss.dim() else None, keep)
        finally:
            for hook in hooks:
                hook.remove()

    def explain(self, name: str, lines: dict[str, Lines]) -> Reason | None:
        """Why these lines of one tensor are zero."""
        leaf = self.graph.leaves.get(id(self.subject.tensors[name]))
        rows, columns = lines[name]
        if leaf is None:
            return None
        if rows is not None and (reason := self._upwards(leaf, rows, lines)):
            return reason
        return None if columns is None else self._downwards(leaf, columns, lines)

    def _watcher(self, node: Node) -> Callable[..., None]:
        def passed(into: Sequence[Tensor | None], out: Sequence[Tensor | None]) -> None:
            with torch.no_grad():
                made = list(_made_by(node, into, out))
                if operation(node) in PRODUCT and self.trace.may_read(node):
                    self.inputs[node] = list(_zero_inputs(node))
            if made:
                self.made.setdefault(node, []).extend(made)

        return passed

    def _upwards(self, leaf: Node, zero: Tensor, lines: dict[str, Lines]) -> Reason | None:
        """Rows: what is computed from them gets no gradient, from some node towards the loss on."""
        for node in breadth_first(leaf, self._consumers, _MOST_NODES):
            for made in self.made.get(node, ()):
                if (pattern := _pattern(made.zero, zero)) is not None:
                    return self._reason(node, made.position, pattern, lines)
            if operation(node) in PRODUCT:  # probabilities × values: the other factor may be what is masked
                for other, _ in node.next_functions:
                    if other is not None and (reason := self._below(other, zero, lines, only_masks=True)):
                        return reason
            if (pattern := self._left_out(node, zero)) is not None:
                return self._reason(self.graph.consumers[node][0][0], 0, pattern, lines)
        return None

    def _downwards(self, leaf: Node, zero: Tensor, lines: dict[str, Lines]) -> Reason | None:
        """Columns: what they are multiplied with is zero, from some node towards the inputs on."""
        for product in breadth_first(leaf, self._consumers, _MOST_NODES):
            if operation(product) in PRODUCT:
                for other, _ in product.next_functions:
                    if other is not None and (reason := self._below(other, zero, lines)):
                        return reason
                if any(_pattern(seen, zero) is not None for seen in self.inputs.get(product, ())):
                    return self._said("absent-rows", "inputs", product, zero)
                return None
        return None

    def _below(
        self, start: Node, zero: Tensor, lines: dict[str, Lines], only_masks: bool = False
    ) -> Reason | None:
        for node in breadth_first(start, inputs, _MOST_NODES):
            name = operation(node)
            if name in _FILLS | RELU | {"Mul"}:
                for made in self.made.get(node, ()):
                    if (pattern := _pattern(made.zero, zero)) is not None:
                        return self._reason(node, made.position, pattern, lines)
            if name in PRODUCT and not only_masks:
                for weight, rows in self._zero_weights(node):
                    if (pattern := _pattern(rows, zero)) is not None:
                        return self._weight(node, weight, pattern, lines)
        return None

    def _left_out(self, node: Node, zero: Tensor) -> Tensor | None:
        """Returns the lines that no slice took, if there are several slices."""
        consumers = self.graph.consumers.get(node, ())
        if len(consumers) < 2 or not all(operation(consumer) in PICK for consumer, _ in consumers):
            return None
        parts = [[m.zero for m in self.made.get(consumer, ())] for consumer, _ in consumers]
        size = {len(z) for part in parts for z in part}
        if len(size) != 1 or any(len(part) != 1 for part in parts):
            return None
        left = torch.stack([part[0] for part in parts]).all(0)
        return _pattern(left, zero) if bool(left.any()) else None

    def _reason(self, node: Node, position: int, zero: Tensor, lines: dict[str, Lines]) -> Reason:
        name = operation(node)
        if name == "Mul" or name in PRODUCT:
            other = [n for i, (n, _) in enumerate(node.next_functions) if i != position and n is not None]
            if name == "Mul" and not other:
                return self._said("masked", "", node, zero)
            if name in PRODUCT and (node_of := self._masked_factor(other, zero)) is not None:
                return self._said("masked", "", node_of, zero)
            for weight, pattern in self._zero_factors(node, other):
                if _pattern(pattern, zero) is not None or _pattern(zero, pattern) is not None:
                    return self._weight(node, weight, zero, lines)
            return self._said("zero-weight-downstream", "product", node, zero)
        if name in _FILLS:
            return self._said("masked", "", node, zero)
        if name in PICK:
            return self._said("absent-rows", "slices", node, zero)
        return self._said("dead-activation", "units", node, zero)

    def _masked_factor(self, others: list[Node], zero: Tensor) -> Node | None:
        for other in others:
            for node in breadth_first(other, inputs, 12):
                for made in self.made.get(node, ()):
                    if operation(node) in _FILLS | {"Mul"} and _pattern(made.zero, zero) is not None:
                        return node
        return None

    def _zero_factors(self, node: Node, others: list[Node]) -> Iterator[tuple[Tensor, Tensor]]:
        """Weights among or just below the other factors, with their zero lines."""
        yield from self._zero_weights(node)
        for other in others:
            for below in breadth_first(other, inputs, 12):
                yield from self._zero_weights(below)

    def _zero_weights(self, node: Node) -> Iterator[tuple[Tensor, Tensor]]:
        for weight in sorted(_leaves(node), key=_dims):
            if weight is not None and any(weight is t for t in self.subject.tensors.values()):
                for _, zero in _zero_lines(weight.detach()):
                    yield weight, zero

    def _weight(self, node: Node, weight: Tensor, zero: Tensor, lines: dict[str, Lines]) -> Reason:
        name = next(n for n, t in self.subject.tensors.items() if t is weight)
        its = [_pattern(zero, own) for own in lines.get(name, ()) if own is not None]
        variant = "stuck" if any(pattern is not None for pattern in its) else "named"
        return self._said("zero-weight-downstream", variant, node, zero, weight=name)

    def _said(self, cause: str, variant: str, node: Node, zero: Tensor, **values: Any) -> Reason:
        where = self._place(node)
        values |= {"zero": int(zero.sum()), "all": len(zero), "op": where.op if where else operation(node)}
        group = (where.file, where.line, where.module) if where else node
        return Reason("partly-zero", cause, EXPLAINED, variant, where, values, group)

    def _consumers(self, node: Node) -> list[Node]:
        return [consumer for consumer, _ in self.graph.consumers.get(node, ())]

    def _place(self, node: Node) -> Where | None:
        for above in breadth_first(node, self._consumers, _MOST_NODES):
            if (where := self.trace.places.get(above)) is not None:
                return where
        return None


def _may_make(node: Node) -> bool:
    return operation(node) in _FILLS | PICK | PRODUCT | RELU | SMOOTH | {"Mul"}


def _made_by(node: Node, into: Sequence[Tensor | None], out: Sequence[Tensor | None]) -> Iterator[_Made]:
    name = operation(node)
    came = next((g for g in out if g is not None), None)
    if came is None or not _readable(came):
        return
    for position, gradient in enumerate(into):
        if gradient is None or not _readable(gradient) or not gradient.dim():
            continue
        same = gradient.shape == came.shape
        if not same and name not in PRODUCT | PICK:
            continue
        already = dict(_zero_lines(came)) if same or name in PRODUCT else {}
        for dim, zero in _zero_lines(gradient):
            if name in PRODUCT:
                if dim not in _own_dims(name, position):
                    continue
                before = already.get(dim) if dim == 0 else None
            elif name in PICK:
                before = None if dim in _picked_dims(node, gradient, out) else zero
            else:
                before = already.get(dim)
            made = zero if before is None else zero & ~before
            if bool(made.any()):
                yield _Made(position, made)


def _zero_inputs(node: Node) -> Iterator[Tensor]:
    for name in ("self", "mat1", "input"):
        kept = saved(node, name)
        if isinstance(kept, Tensor):
            yield from (zero for dim, zero in _zero_lines(kept) if dim == 1)


def _own_dims(name: str, position: int) -> set[int]:
    """Of a product only what it sums over, and the batch of a batched one, is its own doing."""
    if name in ("Bmm", "Baddbmm"):
        first = 0 if name == "Bmm" else 1
        return {0, 2} if position == first else {0, 1}
    return {1} if position == (1 if name in ("Addmm", "Addmv") else 0) else set()


def _picked_dims(node: Node, gradient: Tensor, out: Sequence[Tensor | None]) -> set[int]:
    """Along which dimensions a slice took some lines and left the others."""
    parts = [g for g in out if g is not None]
    if len(parts) == len(out) > 1:
        return set()  # split into parts that all go on: nothing is left out
    picked = parts[0]
    if gradient.dim() == picked.dim():
        return {d for d in range(gradient.dim()) if gradient.shape[d] != picked.shape[d]}
    dim = saved(node, "dim")
    return set() if dim is None else {dim - 2**64 + gradient.dim() if dim >= 2**63 else dim}


def _readable(gradient: Tensor) -> bool:
    return gradient.layout is torch.strided and gradient.is_floating_point() and gradient.numel() > 0


def _zero_lines(tensor: Tensor) -> list[tuple[int, Tensor]]:
    """For each dimension of more than one entry which of its lines are zero, where some and not all are."""
    if not _readable(tensor):
        return []
    found = []
    for dim in range(tensor.dim()):
        if 1 < tensor.shape[dim] <= _MOST_LINES:
            others = [d for d in range(tensor.dim()) if d != dim]
            zero = (tensor.amax(others) == 0) & (tensor.amin(others) == 0) if others else tensor == 0
            if bool(zero.any()) and not bool(zero.all()):
                found.append((dim, zero.cpu()))
    return found


def _pattern(made: Tensor, zero: Tensor) -> Tensor | None:
    """The shortest repeating part of `made` that gives `zero` when stretched and repeated; or None."""
    made, zero = made.cpu(), zero.cpu()
    share = int(made.sum()) * len(zero)
    if not bool(zero.any()) or bool(zero.all()) or share != int(zero.sum()) * len(made):
        return None  # stretching and repeating leave the share of zeros as it is
    for period in _divisors(len(made)):
        part = made[:period]
        if len(zero) % period or not torch.equal(part.repeat(len(made) // period), made):
            continue
        times = len(zero) // period
        for repeats in _divisors(times):
            if torch.equal(part.repeat_interleave(times // repeats).repeat(repeats), zero):
                return part
    return None


def _dims(weight: Tensor) -> int:
    return -weight.dim()  # a matrix says more than its bias


@cache
def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def _leaves(node: Node) -> list[Tensor]:
    found = (leaf_through(below) for below, _ in node.next_functions)
    return [tensor for tensor in found if tensor is not None]
