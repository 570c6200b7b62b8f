"""The graph autograd recorded: its nodes, who consumes whom, and the parameters below."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from clinometer.gradients.report.formatting import words
from clinometer.torch_internals.custom_functions import function_of

Node = Any
"""torch.autograd.graph.Node: torch's nodes only look like it, they are not instances."""

_SAME_VALUES = words(
    """
    View UnsafeView ReshapeAlias T Transpose Permute Unsqueeze Squeeze Alias Clone Reshape Movedim
    Swapaxes Unflatten Flatten Identity LiftFresh
    """
)


class Graph:
    """What a backward from one loss would run through."""

    def __init__(self, loss: Tensor) -> None:
        self.nodes: list[Node] = []
        """Every node, the loss's first, each before those it leads to."""
        self.consumers: dict[Node, list[tuple[Node, int]]] = {}
        """For a node, the nodes that hand it gradients, and through which of their inputs."""
        self.leaves: dict[int, Node] = {}
        """id of a leaf tensor → the node that accumulates into it."""
        if loss.grad_fn is not None:
            self._walk(loss.grad_fn)

    def _walk(self, root: Node) -> None:
        seen = {root}
        stack = [root]
        while stack:
            node = stack.pop()
            self.nodes.append(node)
            variable = getattr(node, "variable", None)
            if variable is not None and not node.next_functions:
                self.leaves[id(variable)] = node
            for position, (below, _) in enumerate(node.next_functions):
                if below is None:
                    continue
                self.consumers.setdefault(below, []).append((node, position))
                if below not in seen:
                    seen.add(below)
                    stack.append(below)

    def rename(self, stand_ins: Mapping[int, Tensor]) -> None:
        """Leaves found under what stood in for a tensor are that tensor's."""
        for key, tensor in stand_ins.items():
            if key in self.leaves:
                self.leaves[id(tensor)] = self.leaves[key]


def live_below(root: Node, bits: Mapping[int, int], known: dict[Node, int]) -> int:
    """The parameters (one bit each) that a backward from `root` reaches; `known` remembers nodes."""
    stack = [root]
    while stack:
        node = stack[-1]
        if node in known:
            stack.pop()
            continue
        variable = getattr(node, "variable", None)
        if variable is not None and not node.next_functions:
            known[node] = bits.get(id(variable), 0)
            stack.pop()
            continue
        waiting = [below for below, _ in node.next_functions if below is not None and below not in known]
        if waiting:
            stack.extend(waiting)
            continue
        found = 0
        for below, _ in node.next_functions:
            if below is not None:
                found |= known[below]
        known[node] = found
        stack.pop()
    return known[root]


def operation(node: Node) -> str:
    """The operation a node is the backward of: "Relu" for ReluBackward0."""
    name = node.name().rpartition("::")[2]
    return name.rstrip("0123456789").removesuffix("Backward")


def same_values(node: Node) -> bool:
    """Whether a node only rearranges the gradient: nothing dies or turns NaN in it."""
    return operation(node) in _SAME_VALUES and len(node.next_functions) == 1


def leaf_through(node: Node | None) -> Tensor | None:
    """The leaf a node hands its gradient to unchanged, perhaps rearranged, cast or summed over copies."""
    while node is not None:
        variable = getattr(node, "variable", None)
        if variable is not None and not node.next_functions:
            return variable
        if not (same_values(node) or operation(node) in ("ToCopy", "Expand")):
            return None
        node = node.next_functions[0][0]
    return None


def is_custom(node: Node) -> bool:
    """Whether a node belongs to a Python autograd.Function."""
    return function_of(node) is not None
