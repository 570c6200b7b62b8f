"""The closure, run once and watched: forward, backward, and what every tensor then has as its gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from clinometer.distributed.ranks import Ranks, whole
from clinometer.gradients.diagnose import why_nonfinite, why_zero
from clinometer.gradients.diagnose.why_partly_zero import zero_lines
from clinometer.gradients.sandbox.closure import Closure, evaluate
from clinometer.gradients.sandbox.sandbox import Before
from clinometer.gradients.sandbox.subject import Subject
from clinometer.gradients.trace.backward_trace import Flow, Read, largest
from clinometer.gradients.trace.cuts import Escape
from clinometer.gradients.trace.forward_trace import Trace
from clinometer.gradients.trace.graph import Graph, Node
from clinometer.gradients.trace.inplace_errors import find_needed, find_overwritten, is_overwritten
from clinometer.messages import InputError, say


@dataclass
class Run:
    """One forward and backward."""

    trace: Trace
    loss: Tensor
    flow: Flow | None
    """None when the loss has no graph, or one that can be run no more."""
    sizes: dict[str, float | None] = field(default_factory=dict)
    """The largest absolute value of each gradient; None where there is none."""
    returned: float = math.nan
    """What the closure returned; `loss` may be the sum of losses it ran backward on instead."""
    own: dict[str, float] = field(default_factory=dict)
    """The largest absolute values of the gradients that backwards of the closure's own left."""
    lines: dict[str, tuple[Tensor | None, Tensor | None]] = field(default_factory=dict)
    """Rows and columns that are zero, of gradients that are not zero as a whole."""


def run(subject: Subject, closure: Closure, before: Before, ranks: Ranks) -> Run:
    """Run the closure and its backward once; the gradients are afterwards in `.grad`, averaged over ranks.

    Raises InputError for a loss whose graph was used up before, and what the closure raises.
    """
    stand_ins = ranks.stand_ins()
    trace = Trace(subject, stand_ins)
    try:
        with trace.watching():
            loss = evaluate(closure)
    except RuntimeError as error:
        if is_overwritten(error):
            _say_who_wrote(error, closure, before, ranks, trace, trace.own_losses)
        raise
    own = {name: t.grad for name, t in subject.tensors.items() if t.is_leaf and t.grad is not None}
    before.set_grads_aside()  # what a closure's own backwards left
    result = Run(trace, _what_trains(loss, trace), None)
    result.returned = float(loss.detach())
    sizes = ranks.largest({name: largest(own.get(name)) for name in subject.tensors})
    result.own = {name: size for name, size in sizes.items() if size is not None}
    if result.loss.grad_fn is not None:
        graph = Graph(result.loss)
        result.flow = Flow(graph, trace, _clue)
        # A loss that was computed before the closure was called belongs to the user, graph and all.
        keep = result.loss.grad_fn not in trace.places
        try:
            result.flow.run(result.loss, keep)
        except RuntimeError as error:
            if "backward through the graph a second time" in str(error):
                raise InputError("diagnosis.graph_used_up") from error
            if not is_overwritten(error):
                raise
            ran = {loss.grad_fn for loss in trace.own_losses}
            if ran.isdisjoint(graph.nodes):
                _say_who_wrote(error, closure, before, ranks, trace, [result.loss])
                raise
            # The closure steps between its own backwards, each of which was in time: what they left counts.
            result.flow = None
            for name, tensor in subject.tensors.items():
                if tensor.is_leaf:
                    tensor.grad = own.get(name)
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


def _what_trains(loss: Tensor, trace: Trace) -> Tensor:
    """The loss that was returned; or the sum of those the closure ran backward on, if they reach more."""
    if not trace.own_losses:
        return loss
    with trace.watching(), torch.enable_grad():
        total = sum(own.sum().to(loss.device) for own in trace.own_losses)
    assert isinstance(total, Tensor)
    return total if trace.live(total) & ~trace.live(loss) else loss


def _say_who_wrote(
    error: RuntimeError, closure: Closure, before: Before, ranks: Ranks, trace: Trace, roots: Sequence[Tensor]
) -> None:
    """Add both lines to the error: the one that needs the value and the one that wrote over it.

    Only the first where others train along: the error may be this rank's alone, and so would be the forward.
    """
    try:
        found = find_overwritten(closure, before) if ranks.alone else None
    except Exception:  # a closure that cannot be run twice: its first error is the one to tell
        found = None
    found = found or find_needed(roots, trace)
    if found is None:
        return
    needed, written = found.needed, found.written
    values = {"place": needed.label, "source": needed.source}
    if written is None:
        error.add_note(say("diagnosis.overwritten", **values))
    else:
        values |= {"writer": written.label, "written": written.source, "op": written.op}
        error.add_note(say("diagnosis.overwritten_by", **values))


@contextmanager
def gradients_kept(subject: Subject) -> Iterator[None]:
    """Afterwards every `.grad` is what it was, whatever ran inside: what comes later reads this run's."""
    kept = [(tensor, tensor.grad) for tensor in subject.tensors.values() if tensor.is_leaf]
    try:
        yield
    finally:
        for tensor, gradient in kept:
            tensor.grad = gradient


def look_at_values(
    subject: Subject, closure: Closure, before: Before, ranks: Ranks
) -> tuple[why_nonfinite.Finiteness, Tensor]:
    """Run the forward once more, every result looked at: where values stopped being finite; and the loss."""
    before.rewind()
    stand_ins = ranks.stand_ins()
    trace = Trace(subject, stand_ins)
    finiteness = why_nonfinite.Finiteness(subject, stand_ins)
    trace.after_call = finiteness.after_call
    with trace.watching():
        loss = evaluate(closure)
    return finiteness, loss


def only_looked_at(
    escape: Escape | None, subject: Subject, closure: Closure, before: Before, loss: float
) -> bool:
    """Whether the loss stays what it was when the numbers that left torch here are others: a log, a print.

    Without an escape the forward runs all the same, along with that of another rank.
    """
    before.rewind()
    trace = Trace(subject)
    trace.nudged = escape and escape.place
    try:
        with trace.watching():
            again = float(evaluate(closure).detach())
    except Exception:  # a closure that cannot be run twice, or minds the number
        return False
    return escape is not None and again == loss and any(e.place == escape.place for e in trace.escapes)


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
