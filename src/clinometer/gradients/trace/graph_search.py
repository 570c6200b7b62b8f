"""Searches in the graph of a backward: the line of a node, the nodes below it, the factors of a product."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from clinometer.gradients.report.places import Where
from clinometer.gradients.trace.backward_trace import Flow
from clinometer.gradients.trace.forward_trace import Trace
from clinometer.gradients.trace.graph import Graph, Node, operation
from clinometer.gradients.trace.node_kinds import PRODUCT

_MOST_BELOW = 24
_SUMMAND_FIRST = ("Addmm", "Baddbmm", "Addmv")
"""Products whose first input is not a factor: it is added."""


def place_of(node: Node, flow: Flow) -> Where | None:
    """Returns the line of a node; if it has none, the line of the call it belongs to."""
    return nearest_place(node, flow.graph, flow.trace)


def place_above(node: Node, flow: Flow) -> Where | None:
    """Returns the line of the nearest node towards the loss that has one: a call may make several nodes."""
    return nearest_place(node, flow.graph, flow.trace, itself=False)


def nearest_place(node: Node, graph: Graph, trace: Trace, *, itself: bool = True) -> Where | None:
    """Returns the line of a node, or of the nearest towards the loss that has one."""
    seen, queue = {node}, [node]
    while queue:
        current = queue.pop(0)
        if (itself or current is not node) and (where := trace.places.get(current)) is not None:
            return where
        above = dict.fromkeys(c for c, _ in graph.consumers.get(current, ()) if c not in seen)
        seen.update(above)
        queue += above
    return None


def nodes_below(node: Node | None, most: int = _MOST_BELOW) -> list[Node]:
    """Returns a node and those below it, the nearest first; an empty list if there is no node."""
    found: list[Node] = []
    queue = [] if node is None else [node]
    while queue and len(found) < most:
        current = queue.pop(0)
        found.append(current)
        queue += inputs(current)
    return found


def inputs(node: Node) -> list[Node]:
    """Returns the nodes that a node hands gradients to."""
    return [below for below, _ in node.next_functions if below is not None]


def breadth_first(start: Node, near: Callable[[Node], Iterable[Node]], most: int) -> Iterator[Node]:
    """Yields each node from `start` on once, the nearest first, until `most` nodes were met."""
    seen, queue = {start}, [start]
    while queue and len(seen) < most:
        current = queue.pop(0)
        yield current
        for node in near(current):
            if node not in seen:
                seen.add(node)
                queue.append(node)


def other_factor(node: Node, position: int) -> Node | None:
    """Returns the node that made the other factor of a product; None if it is data or a constant."""
    name = operation(node)
    factors = list(range(len(node.next_functions)))
    if name in _SUMMAND_FIRST:
        factors = factors[1:]
    elif name == "Convolution":
        factors = factors[:2]
    rest = [i for i in factors if i != position]
    return node.next_functions[rest[0]][0] if rest else None


def silent_relu_below(factor: Node | None, flow: Flow) -> Node | None:
    """Returns the ReLU that made a factor zero: no product lies between, and all its channels are 0."""
    for below in nodes_below(factor):
        if below in flow.dead and all(bool(dead.all()) for dead in flow.dead[below]):
            return below
        if operation(below) in PRODUCT:
            break
    return None


def receives(node: Node, flow: Flow, counts: Callable[[float | None], bool]) -> bool:
    """Whether one of the nodes above hands `node` a gradient whose largest value `counts`."""
    for consumer, position in flow.above(node):
        event = flow.events.get(consumer)
        if event is None or (position < len(event.into) and counts(event.into[position])):
            return True
    return False
