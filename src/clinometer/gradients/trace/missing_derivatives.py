"""Operations for which autograd has no derivative: the backward raises, and the error gets the line."""

from __future__ import annotations

import re

from clinometer.gradients.trace.forward_trace import Trace
from clinometer.gradients.trace.graph import Graph, operation
from clinometer.messages import say

_MESSAGE = re.compile(r"derivative for '?(?:\w+::)?(\w+)'? is not implemented")


def note_missing_derivative(error: RuntimeError, graph: Graph, trace: Trace) -> None:
    """Adds to torch's error where the operation was called, and what to use instead."""
    found = _MESSAGE.search(str(error))
    if found is None:
        return
    name = found[1].replace("_", "").lower()
    for node in graph.nodes:
        where = trace.places.get(node)
        if where is not None and operation(node).lower() in ("notimplemented", name):
            values = {"place": where.label, "source": where.source, "op": where.op}
            error.add_note(say("diagnosis.missing_derivative", **values))
            return
