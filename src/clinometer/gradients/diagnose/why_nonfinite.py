"""Why is it NaN or infinite: the first call of the forward, or node of the backward, that made it so.

A loss that is not finite is explained by `FORWARD_RULES`, from the origin that `Finiteness` found; a gradient
of a finite loss by `BACKWARD_RULES`. In both, the first rule that returns a reason decides.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from clinometer.gradients.diagnose.finiteness import Finiteness, Origin
from clinometer.gradients.diagnose.operation_view import Clue, canonical
from clinometer.gradients.diagnose.singular_points import of_range
from clinometer.gradients.report.finding import FAULT, Reason
from clinometer.gradients.report.places import Where, definition_of
from clinometer.gradients.sandbox.subject import Subject
from clinometer.gradients.sandbox.tensors import plain
from clinometer.gradients.trace.backward_trace import Event, Flow
from clinometer.gradients.trace.graph import Node, operation
from clinometer.gradients.trace.graph_search import place_of
from clinometer.torch_internals.custom_functions import function_of

_MULTIPLIED = ("operand", "other", "other-at")
"""What a node may look like whose backward computed with a value that was not finite."""
_DIVIDES = ("edge", "near", "sqrt", "where", "where-division", "division", "division-small")
"""What happens inside a call whose eps is too small."""


def why_nonfinite(
    name: str, subject: Subject, flow: Flow, source: Origin | None, alone: bool = True
) -> Reason:
    """Returns why a gradient is not finite.

    `source`: where the loss stopped being finite, if it is not. `alone`: no other rank trains along.
    """
    if source is not None:
        return from_forward(source)
    event, clue = _first_node(name, subject, flow)
    tensor = subject.tensors[name]
    nan = tensor.grad is None or bool(torch.isnan(plain(tensor.grad)).any())
    changed = None if event is not None else _changed_on_the_way(flow.graph.leaves.get(id(tensor)), flow)
    case = _NonfiniteCase(tensor.dtype, flow, event, clue, alone, nan, changed)
    return next(reason for rule in BACKWARD_RULES if (reason := rule(case)) is not None)


def from_forward(origin: Origin) -> Reason:
    """Returns why the loss is not finite."""
    return next(reason for rule in FORWARD_RULES if (reason := rule(origin)) is not None)


def trace_back(reason: Reason, values: Finiteness) -> Reason:
    """Returns the origin of the value that a backward multiplied with, if that value was not finite.

    The loss may be finite all the same: a softmax makes NaN of a row of padding, the loss leaves that row
    out, and the gradient that comes back for it, zero, is multiplied by the NaN. Otherwise the same reason.
    """
    if reason.cause != "backward" or reason.variant not in _MULTIPLIED:
        return reason
    given = None if reason.variant == "other-at" else values.before(reason.where)  # what went in was finite
    origin = given or values.made_at(reason.where)
    if origin is None or origin.where is None:
        return reason
    clue = origin.clue
    variant = "unseen"
    if origin.kind == "parameter":
        variant = "parameter"
    elif origin.kind == "given":
        variant = "unseen-input"
    elif clue is not None and clue.variant == "softmax":
        variant = "unseen-softmax"
    elif clue is not None and clue.cause == "overflow":
        variant = "unseen-large"
    elif clue is not None and clue.variant == "constant":
        variant = "unseen-constant"
    place = origin.where.file, origin.where.line
    told = {
        "op": _op(origin),
        "weight": origin.parameter,
        "safe": "1.0",
        **({} if clue is None else dict(clue.values)),
    }
    return Reason("non-finite", "backward", FAULT, variant, origin.where, told, place)


# ---- the loss is not finite ----


def weight_holds_it(origin: Origin) -> Reason | None:
    """A weight that holds NaN before the forward was spoilt by an earlier step."""
    if origin.kind != "parameter":
        return None
    return _made("forward", "parameter", origin, weight=origin.parameter)


def batch_holds_it(origin: Origin) -> Reason | None:
    """NaN in a tensor that no call made came in with the data."""
    return _made("forward", "input", origin) if origin.kind == "given" else None


def softmax_across_rows(origin: Origin) -> Reason | None:
    """A softmax whose last dimension would have had something to choose from runs over another one."""
    return _made("forward", "softmax-across", origin) if origin.across else None


def made_by_the_call(origin: Origin) -> Reason | None:
    """The first call that makes NaN or infinity, and what was special about what it got."""
    if origin.kind == "mask":
        return _made("forward", "constant", origin)
    clue = origin.clue or Clue("forward", "unread")
    return _made(clue.cause, _within(origin.where, clue), origin, **dict(clue.values))


FORWARD_RULES: tuple[Callable[[Origin], Reason | None], ...] = (
    weight_holds_it,
    batch_holds_it,
    softmax_across_rows,
    made_by_the_call,
)


# ---- the loss is finite, its gradient is not ----


@dataclass(frozen=True)
class _NonfiniteCase:
    """A gradient that is not finite, and the node where it stopped being finite, if one was seen."""

    dtype: torch.dtype
    flow: Flow
    event: Event | None
    clue: Clue | None
    alone: bool
    nan: bool
    changed: Node | None
    """The node that got a gradient that is not finite, although every node above handed on a finite one."""


def spoilt_in_custom_backward(case: _NonfiniteCase) -> Reason | None:
    """A custom Function's backward is the user's code: the place is its definition."""
    function = None if case.event is None else function_of(case.event.node)
    if case.event is None or case.clue is None or function is None or case.clue.variant == "hook":
        return None
    return _at_node(case.event, case.clue, case.flow, definition_of(function.backward))


def spoilt_at_a_node(case: _NonfiniteCase) -> Reason | None:
    """The first node that made NaN or infinity of a finite gradient."""
    if case.event is None or case.clue is None:
        return None
    return _at_node(case.event, case.clue, case.flow)


def on_another_rank(case: _NonfiniteCase) -> Reason | None:
    """No node of this rank made it, and gradients are averaged over ranks: another rank brought it in."""
    return None if case.alone else Reason("non-finite", "unknown", FAULT, "elsewhere", group=1)


def changed_by_a_hook(case: _NonfiniteCase) -> Reason | None:
    """Finite when one node hands it on and not when the next gets it: a hook made it. No sum makes NaN."""
    if case.changed is None or not (case.nan or len(list(case.flow.above(case.changed))) == 1):
        return None
    if not case.changed.next_functions:  # the parameter itself
        return Reason("non-finite", "backward", FAULT, "hook-parameter", group=case.changed)
    where = place_of(case.changed, case.flow)
    return Reason("non-finite", "backward", FAULT, "hook", where, group=case.changed)


def sum_too_large(case: _NonfiniteCase) -> Reason | None:
    """Every part was finite: their sum left the range of the type."""
    values = {"dtype": str(case.dtype).removeprefix("torch.")}
    return Reason("non-finite", "overflow", FAULT, of_range("sum", case.dtype), values=values)


BACKWARD_RULES: tuple[Callable[[_NonfiniteCase], Reason | None], ...] = (
    spoilt_in_custom_backward,
    spoilt_at_a_node,
    on_another_rank,
    changed_by_a_hook,
    sum_too_large,
)


# ---- what the rules share ----


def _first_node(name: str, subject: Subject, flow: Flow) -> tuple[Event | None, Clue | None]:
    leaf = flow.graph.leaves.get(id(subject.tensors[name]))
    found = [] if leaf is None else flow.origins(leaf, lambda s: s is not None and not math.isfinite(s))
    clues = ((event, event.clues.get(position)) for event, position in found)
    return next(((event, clue) for event, clue in clues if clue is not None), (None, None))


def _changed_on_the_way(leaf: Node | None, flow: Flow) -> Node | None:
    stack, seen = [] if leaf is None else [leaf], set()
    while stack:
        node = stack.pop()
        above = list(flow.above(node))
        spoilt = [consumer for consumer, position in above if _handed_on(flow, consumer, position)]
        if above and not spoilt:
            return node
        stack += [consumer for consumer in spoilt if consumer not in seen]
        seen.update(spoilt)
    return None


def _handed_on(flow: Flow, node: Node, position: int) -> bool:
    """Whether a node handed on a gradient that is not finite."""
    event = flow.events.get(node)
    if event is None or position >= len(event.into):
        return False
    size = event.into[position]
    return size is not None and not math.isfinite(size)


def _within(where: Where | None, clue: Clue) -> str:
    """The variant to say: of an operation inside a call that has an eps, what is to be changed is eps."""
    inside = where is not None and canonical(where.op) not in ("", dict(clue.values).get("call"))
    return (
        "eps-inside"
        if inside and where is not None and clue.variant in _DIVIDES and _has_eps(where.op)
        else clue.variant
    )


def _has_eps(op: str) -> bool:
    function = getattr(torch.nn.functional, op, None)
    if op in ("cosine_similarity", "pairwise_distance"):  # written in C++, so they have no signature
        return True
    try:
        return function is not None and "eps" in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def _at_node(event: Event, clue: Clue, flow: Flow, definition: Any = None) -> Reason:
    where = definition or place_of(event.node, flow)
    values = {"op": where.op.strip("_") if where else operation(event.node).lower(), **dict(clue.values)}
    variant = _within(where, clue)
    return Reason("non-finite", clue.cause, FAULT, variant, where, values, group=event.node)


def _made(cause: str, variant: str, origin: Origin, **more: Any) -> Reason:
    values = {"op": _op(origin), "dtype": str(origin.dtype).removeprefix("torch."), **more}
    group = origin.where and (origin.where.file, origin.where.line)
    return Reason("non-finite", cause, FAULT, variant, origin.where, values, group)


def _op(origin: Origin) -> str:
    return origin.name.strip("_")
