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


def where_paths_part(node: Node, graph: Graph) -> Node:
    """Returns the nearest node above `node` through which every path from the loss to it passes.

    Where the gradients of several paths meet in `node`, their paths part there.
    """
    above: set[Node] = set()
    stack = [node]
    while stack:
        for consumer, _ in graph.consumers.get(stack.pop(), ()):
            if consumer not in above:
                above.add(consumer)
                stack.append(consumer)
    edges = {each: sum(below in above or below is node for below in inputs(each)) for each in above}
    waiting, ready, open_edges, parted = dict(edges), [node], 0, False
    while ready:
        current = ready.pop()
        consumers = graph.consumers.get(current, ())
        if parted and not ready and open_edges == 0:
            return current
        open_edges += len(consumers)
        parted = parted or len(consumers) > 1
        for consumer, _ in consumers:
            waiting[consumer] -= 1
            if not waiting[consumer]:
                ready.append(consumer)
                open_edges -= edges[consumer]
    return node


def is_alone(node: Node | None) -> bool:
    """Whether a node computes from a single leaf, and from nothing else but constants of its own."""
    below = nodes_below(node)
    leaves = {each for each in below if not each.next_functions}
    return (
        len(leaves) == 1
        and len(below) < _MOST_BELOW
        and not any(operation(each) in PRODUCT for each in below)
    )


def other_factor(node: Node, position: int) -> Node | None:
    """Returns the node that made the other factor of a product; None if it is data or a constant."""
    rest = [i for i in _factors(node) if i != position]
    return node.next_functions[rest[0]][0] if rest else None


def factors(node: Node) -> list[Node]:
    """Returns the nodes that made the factors of a product; what is added to it, a bias, is none."""
    return [below for i in _factors(node) if (below := node.next_functions[i][0]) is not None]


def _factors(node: Node) -> list[int]:
    positions = list(range(len(node.next_functions)))
    name = operation(node)
    return positions[1:] if name in _SUMMAND_FIRST else positions[:2] if name == "Convolution" else positions


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
