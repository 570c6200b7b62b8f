"""Which tensors are older than this call of the closure and still carry a graph, and where they are kept.

Autograd numbers the nodes it makes. Where a node of this call takes the result of a node with a smaller
number than any of this call, the loss leads into an earlier graph: through a hidden state, an evolved weight
or features that were computed once. A backward goes through it the first time and frees it; the next one
raises an error that does not say which tensor it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from clinometer.gradients.report.finding import EXPLAINED, Finding
from clinometer.gradients.report.formatting import shorten
from clinometer.gradients.report.places import Where
from clinometer.gradients.sandbox.tensors import tensors_in
from clinometer.gradients.trace.forward_trace import Trace
from clinometer.gradients.trace.graph import Graph, Node
from clinometer.gradients.trace.graph_search import nearest_place
from clinometer.gradients.trace.holders import Holder
from clinometer.messages import say
from clinometer.torch_internals.nodes import names_saved, order_of


@dataclass(frozen=True)
class OlderGraph:
    """An earlier graph that the loss leads into."""

    names: tuple[str, ...]
    """Where its tensors are kept; empty if no name leads to them."""
    where: Where | None
    """The line of this call that uses the first of them."""
    live: int
    """The parameters it leads to, as bits of `Trace`."""
    saved: bool
    """Whether a backward would free something of it, so that a second one fails."""
    whole: bool
    """Whether the loss itself was computed earlier, which it may be."""

    def finding(self) -> Finding:
        """Says that the loss leads into it, where a backward still could."""
        values = {"names": shorten(self.names)} if self.names else {}
        variant = "" if self.names else "unnamed"
        return Finding(
            "older-graph", "loop", EXPLAINED, "diagnosis.loop.older-graph", (), self.where, values, variant
        )

    def note(self) -> str:
        """What to add to torch's error."""
        key = "diagnosis.older_graph_note" if self.names else "diagnosis.older_graph_note_unnamed"
        where = self.where
        values = (
            {"place": "?", "source": ""} if where is None else {"place": where.label, "source": where.source}
        )
        return say(key, names=shorten(self.names), **values)


def is_used_up(error: BaseException) -> bool:
    """Whether a backward met a graph that an earlier one has freed."""
    return isinstance(error, RuntimeError) and "backward through the graph a second time" in str(error)


def is_older(node: Node | None, begun: int | None) -> bool:
    """Whether a node was made before the number `begun` was next."""
    number = None if node is None else order_of(node)
    return number is not None and begun is not None and number < begun


def find_older_graph(
    roots: Iterable[Tensor], trace: Trace, holders: Mapping[int, Holder], begun: int | None
) -> OlderGraph | None:
    """Returns the earlier graph that `roots`, computed since `begun`, lead into; None if there is none."""
    kept: dict[Node, list[str]] = {}
    for holder in holders.values():
        if holder.tensor.grad_fn is not None:
            kept.setdefault(holder.tensor.grad_fn, []).append(holder.name)
    names: dict[str, None] = {}
    older: dict[Node, None] = {}
    where = None
    live = 0
    whole = False
    for root in roots:
        graph = Graph(root)
        if is_older(root.grad_fn, begun):
            whole = True
            live |= trace.live(root)
            names |= dict.fromkeys(kept.get(root.grad_fn, ()))
        for node in graph.nodes:
            if not is_older(node, begun):
                continue
            older[node] = None
            makers = [c for c, _ in graph.consumers.get(node, ()) if not is_older(c, begun)]
            if makers:
                live |= trace.live_node(node)
                names |= dict.fromkeys(kept.get(node, ()))
                where = where or nearest_place(makers[0], graph, trace)
    if not older:
        return None
    return OlderGraph(tuple(sorted(names)), where, live, any(map(_saves_tensors, older)), whole)


def _saves_tensors(node: Node) -> bool:
    for name in names_saved(node):
        try:
            if any(True for _ in tensors_in(getattr(node, name))):
                return True
        except RuntimeError:  # freed already
            return True
    return False
