"""One backward, observed: the edges of the graph through which no gradient, zeros or NaN came.

Every gradient is reduced to its largest absolute value while it passes; none is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from clinometer.gradients.sandbox.public_calls import theirs
from clinometer.gradients.sandbox.tensors import largest, plain
from clinometer.gradients.trace.cancellation import (
    ROUNDINGS,
    Remainder,
    is_remainder,
    is_suspect,
    rounding_of,
)
from clinometer.gradients.trace.forward_trace import Trace
from clinometer.gradients.trace.graph import Graph, Node, operation, same_values
from clinometer.torch_internals.nodes import saved


@dataclass(frozen=True)
class SavedValues:
    """What a node saved, by name; None when it saved nothing, or it may not be read."""

    node: Node
    readable: bool
    """Whether it may be looked at."""
    runnable: bool
    """Whether the node's backward may be run a second time: not on parts of a sharded or nested tensor."""

    def __call__(self, name: str) -> Any:
        return plain(saved(self.node, name)) if self.readable else None


ReadClue = Callable[[Node, int, Sequence[Tensor | None], Sequence[Tensor | None], SavedValues], Any]
"""(node, which input, gradients of its inputs, of its outputs, what it saved) → what it looks like."""


@dataclass
class Event:
    """The gradients of one node, where some are missing, zero or not finite."""

    node: Node
    out: list[float | None]
    """Largest absolute value of the gradient of each output; None where there is none."""
    into: list[float | None]
    """The same for each input."""
    clues: dict[int, Any]
    """Input → what the clue function returned, for the inputs whose gradient this node made zero or NaN, or
    nothing but rounding."""
    scalar: bool = False
    """Whether all that came in is one number: the loss, or a term of it."""

    @property
    def arrived(self) -> float:
        """The largest value that came in; 0 when only zeros did."""
        return max((v if v == v else math.inf for v in self.out if v is not None), default=0.0)

    @property
    def sound(self) -> bool:
        """Whether all that came in was finite."""
        return all(v is None or math.isfinite(v) for v in self.out)


class Flow:
    """The backward of one loss."""

    def __init__(self, graph: Graph, trace: Trace, clue: ReadClue, roundings: float = ROUNDINGS) -> None:
        """`roundings`: up to how many roundings of its terms a sum counts as nothing."""
        self.graph = graph
        self.trace = trace
        self.events: dict[Node, Event] = {}
        self.dead: dict[Node, list[Tensor]] = {}
        """For a ReLU, which channels (last dimension, second dimension) gave 0 everywhere."""
        self.cancelled: dict[Node, float] = {}
        """Accumulation nodes of vectors whose gradient is nothing but rounding → its largest value."""
        self.meetings: dict[Node, Remainder] = {}
        """Nodes at which the gradients of several paths add up to zero or to nothing but rounding."""
        self._handed: dict[Node, list[float | None]] = {}
        """The largest values that each node handed on, in the order in which they ran."""
        self._clue = clue
        self._roundings = roundings
        self._hooks: list[Any] = []
        self._hooked: set[Node] = set()

    def run(self, loss: Tensor, keep_graph: bool) -> None:
        """Runs the backward; removes all hooks afterwards."""
        with ExitStack() as inside:
            try:
                for node in self.graph.nodes:
                    self.hook(node)
                    if operation(node) == "CheckpointFunction":
                        self._watch_inside(node, inside)
                ones = torch.ones_like(loss) if loss.dim() else None
                theirs(torch.autograd.backward, loss, ones, keep_graph)
            except BaseException:
                # The engine has put the modes back that stood before it: leaving ours a second time raises
                # an error of its own, which would hide the one that counts.
                with suppress(RuntimeError, IndexError, AssertionError):
                    inside.close()
                raise
            finally:
                self.trace.on_node = None
                for hook in self._hooks:
                    hook.remove()
                self._hooks.clear()

    def _watch_inside(self, node: Node, inside: ExitStack) -> None:
        """A reentrant checkpoint builds a graph during the backward and runs it: watch it being made.

        From hooks, as a mode around the whole backward would be set aside while the backward runs.
        """

        def begin(gradients: Any) -> None:
            self.trace.on_node = self._hook_below
            inside.enter_context(self.trace.watching())

        def end(into: Any, out: Any) -> None:
            inside.close()
            self.trace.on_node = None

        self._hooks += [node.register_prehook(begin), node.register_hook(end)]

    def hook(self, node: Node) -> None:
        """Observes one node, unless it only rearranges gradients."""
        if node in self._hooked or not node.next_functions or same_values(node):
            return
        self._hooked.add(node)
        edges = [i for i, (below, _) in enumerate(node.next_functions) if below is not None]
        vectors = [i for i in edges if _is_vector(node.next_functions[i][0])]
        relu = operation(node) in ("Relu", "Threshold")

        def passed(into: Sequence[Tensor | None], out: Sequence[Tensor | None]) -> None:
            with torch.no_grad():
                self._passed(node, edges, vectors, relu, into, out)

        self._hooks.append(node.register_hook(passed))

    def _hook_below(self, root: Node) -> None:
        stack = [root]
        while stack:
            node = stack.pop()
            for position, (below, _) in enumerate(node.next_functions):
                if below is not None and (node, position) not in self.graph.consumers.get(below, ()):
                    self.graph.consumers.setdefault(below, []).append((node, position))
                    if below not in self._hooked:
                        stack.append(below)
            variable = getattr(node, "variable", None)
            if variable is not None and not node.next_functions:
                self.graph.leaves.setdefault(id(variable), node)
            self.hook(node)

    def _passed(
        self,
        node: Node,
        edges: list[int],
        vectors: list[int],
        relu: bool,
        into: Sequence[Tensor | None],
        out: Sequence[Tensor | None],
    ) -> None:
        sizes: list[float | None] = [None] * len(into)
        for i in edges:
            if i < len(into):
                sizes[i] = largest(into[i])
        whole = all(plain(g) is g for g in (*into, *out))
        into, out = [plain(g) for g in into], [plain(g) for g in out]
        readable = self.trace.may_read(node)
        kept = SavedValues(node, readable, readable and whole)
        if relu and (result := kept("result")) is not None:
            self.dead[node] = list(_silent_channels(result))
        self._handed[node] = sizes
        watched = [sizes[i] for i in edges if i < len(into)]
        ordinary = all(v is not None and 0.0 < v < math.inf for v in watched)
        parts = self._parts(node)
        eps, most = max(map(rounding_of, into), default=0.0), max(parts, default=1.0)
        small = eps > 0 and any(is_suspect(size, most, eps, self._roundings) for size in watched)
        if ordinary and not vectors and not small:
            return
        came = [largest(g) for g in out]
        for i in vectors:
            self._cancels(node.next_functions[i][0], sizes[i], into[i], came, out)
        event = Event(node, came, sizes, {}, all(g is None or g.numel() == 1 for g in out))
        self._meet(node, event.arrived, parts, eps)
        if ordinary and not small:
            return
        for i in edges:
            if i < len(into) and self._happened(event, sizes[i], eps):
                event.clues[i] = self._clue(node, i, into, out, kept)
        if not ordinary or any(event.clues.values()):
            self.events[node] = event

    def _happened(self, event: Event, size: float | None, eps: float) -> bool:
        """Whether a node turned a gradient to nothing, zeros, NaN or infinity, or (it may be) to rounding."""
        if size is None or size == 0:
            return event.arrived > 0
        suspect = is_suspect(size, event.arrived, eps, self._roundings)
        return event.sound and (suspect or not math.isfinite(size))

    def _parts(self, node: Node) -> list[float]:
        """The largest values of the gradients that add up to the one that arrives at a node."""
        found = []
        for consumer, position in self.above(node):
            handed = self._handed.get(consumer, ())
            size = handed[position] if position < len(handed) else None
            if size is not None and math.isfinite(size):
                found.append(size)
        return found

    def _meet(self, node: Node, arrived: float, parts: list[float], eps: float) -> None:
        """Notes a node where several gradients add up to nothing, unless a hook may have changed the sum."""
        several = sum(part > 0 for part in parts) > 1
        if (
            several
            and eps > 0
            and is_remainder(arrived, max(parts), eps, self._roundings)
            and not self._is_hooked(node)
        ):
            self.meetings[node] = Remainder(arrived, max(parts))

    def _is_hooked(self, node: Node) -> bool:
        above = [consumer for consumer, _ in self.graph.consumers.get(node, ()) if same_values(consumer)]
        return node in self.trace.hooked or any(map(self._is_hooked, above))

    def is_rounding(self, leaf: Node, gradient: Tensor) -> bool:
        """Whether a leaf's gradient is zero, or nothing but what is left of terms that cancel."""
        size = largest(gradient) or 0.0
        self._meet(leaf, size, self._parts(leaf), rounding_of(plain(gradient)))
        return leaf in self.meetings or size == 0 or self._is_left(leaf, self._rounding)

    def _is_left(self, node: Node, rounding: set[Node]) -> bool:
        """Whether all that adds up to the gradient at a node is a remainder, or zero."""
        edges = [(c, i) for c, i in self.above(node) if c in self._handed and self._handed[c][i]]
        return bool(edges) and all(self._is_lost(consumer, i, rounding) for consumer, i in edges)

    def _is_lost(self, consumer: Node, position: int, rounding: set[Node]) -> bool:
        handed = self._handed.get(consumer, ())
        size = handed[position] if position < len(handed) else None
        if not size or not math.isfinite(size):
            return size == 0
        event = self.events.get(consumer)
        return consumer in rounding or (event is not None and event.clues.get(position) is not None)

    @cached_property
    def _rounding(self) -> set[Node]:
        """The nodes at which nothing but remainders arrive."""
        found: set[Node] = set()
        if self.meetings or any(event.clues for event in self.events.values()):
            for node in self._handed:  # in the order in which they ran: each comes after those above it
                if node in self.meetings or self._is_left(node, found):
                    found.add(node)
        return found

    def where_lost(self, leaf: Node) -> list[tuple[Node, int | None]]:
        """Where what arrives at a leaf became zero or nothing but rounding: nodes, and which of their inputs.

        None instead of an input for a node at which paths meet that cancel.
        """
        found: list[tuple[Node, int | None]] = []
        seen, stack = {leaf}, [leaf]
        while stack:
            node = stack.pop()
            if node in self.meetings and not self._is_left(node, self._rounding):
                found.append((node, None))
                continue
            for consumer, position in self.above(node):
                if not self._is_lost(consumer, position, self._rounding):
                    continue
                event = self.events.get(consumer)
                if event is not None and position in event.clues:
                    found.append((consumer, position))
                elif consumer not in seen:
                    seen.add(consumer)
                    stack.append(consumer)
        return found

    def _cancels(
        self,
        leaf: Node,
        size: float | None,
        into: Tensor | None,
        came: list[float | None],
        out: Sequence[Tensor | None],
    ) -> None:
        """A sum over n terms of size d that comes out near ε·d, not near √n·d, cancels by construction."""
        if into is None or size is None or not out or out[0] is None or not came[0] or size == 0:
            return
        terms = out[0].numel() / max(1, into.numel())
        limit = 4 * torch.finfo(into.dtype).eps * math.sqrt(terms) * came[0]
        if terms > 1 and size <= limit:
            self.cancelled[leaf] = size
        elif leaf in self.cancelled:
            del self.cancelled[leaf]

    def above(self, node: Node) -> Iterator[tuple[Node, int]]:
        """The nodes that hand `node` its gradient, seen through nodes that only rearrange."""
        for consumer, position in self.graph.consumers.get(node, ()):
            if same_values(consumer):
                yield from self.above(consumer)
            else:
                yield consumer, position

    def origins(self, node: Node, bad: Callable[[float | None], bool]) -> list[tuple[Event, int]]:
        """Where what arrives at `node` went bad: nodes that got something good and handed on `bad`."""
        found: list[tuple[Event, int]] = []
        seen = {node}
        stack = [node]
        while stack:
            for consumer, position in self.above(stack.pop()):
                event = self.events.get(consumer)
                if event is None or position >= len(event.into) or not bad(event.into[position]):
                    continue
                if position in event.clues:
                    found.append((event, position))
                elif consumer not in seen:
                    seen.add(consumer)
                    stack.append(consumer)
        return found


def _silent_channels(result: Tensor) -> Iterator[Tensor]:
    if result.numel() == 0:  # an expert that got no token
        return
    for dim in {result.dim() - 1, 1} if result.dim() > 1 else {0}:
        others = [d for d in range(result.dim()) if d != dim]
        yield (result.amax(others) if others else result) == 0


def _is_vector(node: Node) -> bool:
    variable = getattr(node, "variable", None)
    return variable is not None and variable.dim() == 1 and variable.is_floating_point()
