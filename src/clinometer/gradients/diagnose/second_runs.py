"""Second runs: what one run cannot tell, asked by running the closure again with one thing changed."""

from __future__ import annotations

from torch import Tensor

from clinometer.distributed.ranks import Ranks
from clinometer.gradients.diagnose.finiteness import Finiteness
from clinometer.gradients.sandbox.closure import Closure, evaluate
from clinometer.gradients.sandbox.sandbox import Before
from clinometer.gradients.sandbox.subject import Subject
from clinometer.gradients.trace.cuts import Escape
from clinometer.gradients.trace.forward_trace import Trace


def look_at_values(
    subject: Subject, closure: Closure, before: Before, ranks: Ranks
) -> tuple[Finiteness, Tensor]:
    """Run the forward once more, every result looked at: where values stopped being finite; and the loss."""
    before.rewind()
    stand_ins = ranks.stand_ins()
    trace = Trace(subject, stand_ins)
    finiteness = Finiteness(subject, stand_ins)
    trace.after_call = finiteness.after_call
    with trace.watching(), finiteness.watching():
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
