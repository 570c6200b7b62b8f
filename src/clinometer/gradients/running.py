"""The closure, run once and watched: forward, backward, and what every tensor then has as its gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from clinometer.gradients import why_nonfinite, why_zero
from clinometer.gradients.closure import Closure, evaluate
from clinometer.gradients.flow import Flow, Read, largest
from clinometer.gradients.graph import Graph, Node
from clinometer.gradients.ranks import Ranks, whole
from clinometer.gradients.subject import Subject
from clinometer.gradients.tracing import Trace
from clinometer.gradients.untouched import Before
from clinometer.gradients.where import Where
from clinometer.gradients.why_partly import zero_lines
from clinometer.gradients.why_zero import place_above
from clinometer.messages import InputError, say


@dataclass
class Run:
    """One forward and backward."""

    trace: Trace
    loss: Tensor
    flow: Flow | None
    """None when the loss has no graph."""
    sizes: dict[str, float | None] = field(default_factory=dict)
    """The largest absolute value of each gradient; None where there is none."""
    lines: dict[str, tuple[Tensor | None, Tensor | None]] = field(default_factory=dict)
    """Rows and columns that are zero, of gradients that are not zero as a whole."""


def run(subject: Subject, closure: Closure, before: Before, ranks: Ranks) -> Run:
    """Run the closure and its backward once; the gradients are afterwards in `.grad`, averaged over ranks.

    Raises InputError for a loss whose graph was used up before, and what the closure raises.
    """
    stand_ins = ranks.stand_ins()
    trace = Trace(subject, stand_ins)
    with trace.watching():
        loss = evaluate(closure)
    before.set_grads_aside()  # a closure that ran a backward of its own left something
    result = Run(trace, loss, None)
    if loss.grad_fn is not None:
        graph = Graph(loss)
        result.flow = Flow(graph, trace, _clue)
        # A loss that was computed before the closure was called belongs to the user, graph and all.
        keep = loss.grad_fn not in trace.places
        try:
            result.flow.run(loss, keep)
        except RuntimeError as error:
            if "backward through the graph a second time" in str(error):
                raise InputError("diagnosis.graph_used_up") from error
            if "modified by an inplace operation" in str(error) and (where := _overwritten(result)):
                error.add_note(say("diagnosis.overwritten", place=where.label, source=where.source))
            raise
        graph.rename(stand_ins)
    with torch.no_grad():
        ranks.average_gradients()
        gradients = {n: t.grad if t.is_leaf or t.retains_grad else None for n, t in subject.tensors.items()}
        result.sizes = ranks.largest({name: largest(gradient) for name, gradient in gradients.items()})
        for name, gradient in gradients.items():
            size = result.sizes[name]
            if gradient is not None and size and math.isfinite(size):
                lines = zero_lines(whole(gradient))
                if lines != (None, None):
                    result.lines[name] = lines
    return result


def _overwritten(run: Run) -> Where | None:
    """Whose saved tensor was written over: to read it is refused with the error that stopped the backward."""
    assert run.flow is not None
    for node in run.flow.graph.nodes:
        for name in dir(node):
            if name.startswith("_saved_") and run.trace.may_read(node):
                try:
                    getattr(node, name)
                except RuntimeError as error:
                    if "modified by an inplace operation" in str(error):
                        return run.trace.places.get(node) or place_above(node, run.flow)
    return None


def find_origin(
    subject: Subject, closure: Closure, before: Before, ranks: Ranks
) -> why_nonfinite.Origin | None:
    """Run the forward once more, every result looked at: where the loss stopped being finite."""
    before.rewind()
    stand_ins = ranks.stand_ins()
    trace = Trace(subject, stand_ins)
    finiteness = why_nonfinite.Finiteness(subject, stand_ins)
    trace.after_call = finiteness.after_call
    with trace.watching():
        loss = evaluate(closure)
    return finiteness.of(loss)


def used_by_chance(
    subject: Subject, closure: Closure, unused: set[str], ranks: Ranks, draws: int = 3
) -> set[str]:
    """Those that some forward with other random numbers uses."""
    found: set[str] = set()
    for _ in range(draws):  # the generators go on from where the last run left them
        trace = Trace(subject, ranks.stand_ins())
        with trace.watching():
            evaluate(closure)
        found |= {name for name in unused if trace.bits[id(subject.tensors[name])] in trace.first_use}
        if not ranks.any(found != unused):
            break
    return found


def _clue(
    node: Node,
    position: int,
    into: Sequence[Tensor | None],
    out: Sequence[Tensor | None],
    saved: Read,
) -> Any:
    size = largest(into[position])
    if size is not None and not math.isfinite(size):
        return why_nonfinite.read_clue(node, position, into, out)
    return why_zero.read_clue(node, position, into, out, saved)
