"""One run of the closure, observed: forward, backward, and the gradient that every tensor then has."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from clinometer.distributed.ranks import Ranks, whole
from clinometer.gradients.sandbox.closure import Closure, evaluate
from clinometer.gradients.sandbox.interrupts import theirs
from clinometer.gradients.sandbox.sandbox import Before
from clinometer.gradients.sandbox.subject import Subject
from clinometer.gradients.sandbox.tensors import largest, zero_lines
from clinometer.gradients.trace.backward_trace import Flow, ReadClue
from clinometer.gradients.trace.cancellation import ROUNDINGS
from clinometer.gradients.trace.checkpoint_errors import note_checkpoint
from clinometer.gradients.trace.forward_trace import Trace
from clinometer.gradients.trace.graph import Graph
from clinometer.gradients.trace.holders import Holder, find_holders
from clinometer.gradients.trace.inplace_errors import find_needed, find_overwritten, is_overwritten
from clinometer.gradients.trace.older_graph import OlderGraph, find_older_graph, is_used_up
from clinometer.gradients.trace.torch_errors import kind_of_error, note_backward
from clinometer.messages import InputError, say
from clinometer.torch_internals.checkpoints import is_checkpoint_error
from clinometer.torch_internals.nodes import next_order, order_of
from clinometer.torch_internals.tensors import has_hooks


@dataclass
class ObservedRun:
    """One forward and backward."""

    subject: Subject
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
    holders: dict[int, Holder] = field(default_factory=dict)
    """Where tensors were kept before the run."""
    older: OlderGraph | None = None
    """The graph from before the run that the loss leads into."""

    @property
    def getting(self) -> set[str]:
        """The tensors that a backward brought a gradient, be it the closure's own."""
        return {name for name, size in self.sizes.items() if size is not None} | self.own.keys()

    @property
    def reached(self) -> set[int]:
        """The ids of all tensors that a backward brings a gradient, be they of the subject or not."""
        leaves = self.flow.graph.leaves if self.flow is not None else {}
        return {id(self.subject.tensors[name]) for name in self.getting} | leaves.keys()


def observe(
    subject: Subject,
    closure: Closure,
    before: Before,
    ranks: Ranks,
    clue: ReadClue | None = None,
    *,
    roundings: float = ROUNDINGS,
) -> ObservedRun:
    """Runs the closure and its backward once; the gradients are afterwards in `.grad`, averaged over ranks.

    `clue` reads what it needs at each node where a gradient died or stopped being finite, while it is there;
    `roundings` is what counts as nothing where terms cancel.

    Raises InputError for a loss whose graph was used up before, and what the closure raises.
    """
    stand_ins = ranks.stand_ins()
    trace = Trace(subject, stand_ins)
    trace.closure = closure
    holders, begun = find_holders(subject.module, closure), next_order()
    try:
        with trace.watching():
            loss = evaluate(closure)
    except RuntimeError as error:
        if is_used_up(error) and (older := find_older_graph(trace.own_losses, trace, holders, begun)):
            error.add_note(older.note())
        else:
            _explain(error, closure, before, ranks, trace, roots=trace.own_losses)
        raise
    own = {name: t.grad for name, t in subject.tensors.items() if t.is_leaf and t.grad is not None}
    before.set_grads_aside()  # what a closure's own backwards left
    result = ObservedRun(subject, trace, _what_trains(loss, trace), None, holders=holders)
    result.returned = float(loss.detach())
    sizes = ranks.largest({name: largest(own.get(name)) for name in subject.tensors})
    result.own = {name: size for name, size in sizes.items() if size is not None}
    if result.loss.grad_fn is not None:
        graph = Graph(result.loss)
        result.flow = Flow(graph, trace, clue or _no_clue, roundings)
        result.older = find_older_graph([result.loss], trace, holders, begun)
        # What was computed before the closure was called belongs to the user, graph and all.
        keep = result.loss.grad_fn not in trace.places or result.older is not None
        try:
            result.flow.run(result.loss, keep)
        except RuntimeError as error:
            if is_used_up(error) and result.older is not None:
                if result.older.whole:
                    raise InputError("diagnosis.graph_used_up") from error
                error.add_note(result.older.note())
                raise
            if not is_overwritten(error) or trace.ran.isdisjoint(map(order_of, graph.nodes)):
                _explain(error, closure, before, ranks, trace, roots=[result.loss])
                raise
            # The closure steps between its own backwards, each of which was in time: what they left counts.
            result.flow = None
            for name, tensor in subject.tensors.items():
                if tensor.is_leaf:
                    tensor.grad = own.get(name)
        graph.rename(stand_ins)
    elif result.loss.requires_grad and has_hooks(result.loss):
        # A leaf with hooks: they may run the backward that trains, as a gradient cache does.
        kept, result.loss.grad = result.loss.grad, None
        theirs(torch.autograd.backward, result.loss, retain_graph=True)
        result.loss.grad = kept
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


def can_be_explained(error: BaseException) -> bool:
    """Whether `observe` adds a note to such an error of torch."""
    return is_overwritten(error) or is_checkpoint_error(error) or bool(kind_of_error(error))


def _explain(
    error: RuntimeError,
    closure: Closure,
    before: Before,
    ranks: Ranks,
    trace: Trace,
    *,
    roots: Sequence[Tensor],
) -> None:
    """Add a note to an error of torch, if there is one to add: the line, and what to do.

    Whatever goes wrong in here, torch's error is the one that counts.
    """
    with suppress(Exception):
        if is_overwritten(error):
            _say_who_wrote(error, closure, before, ranks, trace, roots=roots)
        elif is_checkpoint_error(error) and ranks.alone:
            note_checkpoint(error, trace.module_paths, closure, before)
        else:
            note_backward(error, roots, trace.places)


def _say_who_wrote(
    error: RuntimeError,
    closure: Closure,
    before: Before,
    ranks: Ranks,
    trace: Trace,
    *,
    roots: Sequence[Tensor],
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
        remedy = say(f"diagnosis.overwritten_remedy.{found.writer}", **values)
        error.add_note(say("diagnosis.overwritten_by", remedy=remedy, **values))


@contextmanager
def gradients_kept(subject: Subject) -> Iterator[None]:
    """Afterwards every `.grad` is what it was, whatever ran inside: what comes later reads this run's."""
    kept = [(tensor, tensor.grad) for tensor in subject.tensors.values() if tensor.is_leaf]
    try:
        yield
    finally:
        for tensor, gradient in kept:
            tensor.grad = gradient


def _no_clue(*_: Any) -> None:
    """Returns no clue: for a caller that needs no reasons."""
