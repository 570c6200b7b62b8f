"""Why is it NaN or infinite: the first call of the forward, or node of the backward, that made it so.

A loss that is not finite is explained by `FORWARD_RULES`, from the origin that `Finiteness` found; a gradient
of a finite loss by `BACKWARD_RULES`. In both, the first rule that returns a reason decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from clinometer.gradients.diagnose.evidence import Clue
from clinometer.gradients.diagnose.finiteness import SOFTMAXES, Finiteness, Origin
from clinometer.gradients.report.finding import FAULT, Reason
from clinometer.gradients.report.formatting import words
from clinometer.gradients.report.places import definition_of
from clinometer.gradients.sandbox.subject import Subject
from clinometer.gradients.trace.backward_trace import Event, Flow
from clinometer.gradients.trace.graph import operation
from clinometer.gradients.trace.graph_search import place_of
from clinometer.torch_internals.custom_functions import function_of

_MAKE_INFINITY = words(
    """
    log log_ log2 log10 log1p div true_divide __truediv__ __rtruediv__ __rdiv__ reciprocal rsqrt atanh
    logit div_ xlogy __itruediv__ divide binary_cross_entropy nll_loss log_softmax cross_entropy
    """
)
"""Calls that have a pole: infinity out of them is no overflow."""
_VARIANTS = {
    "__truediv__": "division", "div": "division", "__rtruediv__": "division", "__rdiv__": "division",
    "div_": "division", "true_divide": "division", "reciprocal": "division", "rsqrt": "sqrt",
    "log1p": "log", "log2": "log", "log10": "log", "logit": "log", "xlogy": "log", "log_": "log",
    "__itruediv__": "division", "divide": "division", "log": "log", "sqrt": "sqrt", "sqrt_": "sqrt",
    "pow": "pow", "__pow__": "pow", "__rpow__": "pow", "softmax": "softmax", "_safe_softmax": "softmax",
    "acos": "acos", "arccos": "acos", "asin": "acos", "arcsin": "acos", "std": "std", "var": "std",
    "mean": "mean", "cross_entropy": "loss", "nll_loss": "loss", "mse_loss": "loss", "l1_loss": "loss",
    "binary_cross_entropy": "log",
}  # fmt: skip
"""Calls → the variant that explains what they make NaN or infinity of."""


def why_nonfinite(
    name: str, subject: Subject, flow: Flow, source: Origin | None, alone: bool = True
) -> Reason:
    """Returns why a gradient is not finite.

    `source`: where the loss stopped being finite, if it is not. `alone`: no other rank trains along.
    """
    if source is not None:
        return from_forward(source)
    event, clue = _first_node(name, subject, flow)
    case = _NonfiniteCase(str(subject.tensors[name].dtype), flow, event, clue, alone)
    return next(reason for rule in BACKWARD_RULES if (reason := rule(case)) is not None)


def from_forward(origin: Origin) -> Reason:
    """Returns why the loss is not finite."""
    return next(reason for rule in FORWARD_RULES if (reason := rule(origin)) is not None)


def trace_back(reason: Reason, values: Finiteness) -> Reason:
    """Returns the origin of the value that a backward multiplied with, if that value was not finite.

    The loss may be finite all the same: a softmax makes NaN of a row of padding, the loss leaves that row
    out, and the gradient that comes back for it, zero, is multiplied by the NaN. Otherwise the same reason.
    """
    origin = values.before(reason.where) if reason.cause == "backward" else None
    if origin is None or origin.where is None:
        return reason
    variant = "unseen"
    if origin.kind == "given":
        variant = "unseen-input"
    elif origin.name in SOFTMAXES:
        variant = "unseen-softmax"
    place = origin.where.file, origin.where.line
    return Reason("non-finite", "backward", FAULT, variant, origin.where, {"op": _op(origin)}, place)


# ---- the loss is not finite ----


def weight_holds_it(origin: Origin) -> Reason | None:
    """A weight that holds NaN before the forward was spoilt by an earlier step."""
    if origin.kind != "parameter":
        return None
    return _made("forward", "parameter", origin, weight=origin.parameter)


def batch_holds_it(origin: Origin) -> Reason | None:
    """NaN in a tensor that no call made came in with the data."""
    return _made("forward", "input", origin) if origin.kind == "given" else None


def too_large_for_the_type(origin: Origin) -> Reason | None:
    """Infinity from a call without a pole: the number left the range of its type."""
    if origin.kind == "made" and not origin.nan and origin.name not in _MAKE_INFINITY:
        return _made("overflow", "forward", origin)
    return None


def softmax_across_rows(origin: Origin) -> Reason | None:
    """A softmax whose last dimension would have had something to choose from runs over another one."""
    return _made("forward", "softmax-across", origin) if origin.across else None


def made_by_the_call(origin: Origin) -> Reason | None:
    """The first call that makes NaN or infinity of finite numbers."""
    return _made("forward", _VARIANTS.get(origin.name, "other"), origin)


FORWARD_RULES: tuple[Callable[[Origin], Reason | None], ...] = (
    weight_holds_it,
    batch_holds_it,
    too_large_for_the_type,
    softmax_across_rows,
    made_by_the_call,
)


# ---- the loss is finite, its gradient is not ----


@dataclass(frozen=True)
class _NonfiniteCase:
    """A gradient that is not finite, and the node where it stopped being finite, if one was seen."""

    dtype: str
    flow: Flow
    event: Event | None
    clue: Clue | None
    alone: bool


def spoilt_in_custom_backward(case: _NonfiniteCase) -> Reason | None:
    """A custom Function's backward is the user's code: the place is its definition."""
    function = None if case.event is None else function_of(case.event.node)
    if case.event is None or case.clue is None or function is None:
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


def sum_too_large(case: _NonfiniteCase) -> Reason | None:
    """Every part was finite: their sum left the range of the type."""
    return Reason("non-finite", "overflow", FAULT, "sum", values={"dtype": case.dtype})


BACKWARD_RULES: tuple[Callable[[_NonfiniteCase], Reason | None], ...] = (
    spoilt_in_custom_backward,
    spoilt_at_a_node,
    on_another_rank,
    sum_too_large,
)


# ---- what the rules share ----


def _first_node(name: str, subject: Subject, flow: Flow) -> tuple[Event | None, Clue | None]:
    leaf = flow.graph.leaves.get(id(subject.tensors[name]))
    found = [] if leaf is None else flow.origins(leaf, lambda s: s is not None and not math.isfinite(s))
    clues = ((event, event.clues.get(position)) for event, position in found)
    return next(((event, clue) for event, clue in clues if clue is not None), (None, None))


def _at_node(event: Event, clue: Clue, flow: Flow, definition: Any = None) -> Reason:
    where = definition or place_of(event.node, flow)
    values = {"op": where.op if where else operation(event.node).lower(), **dict(clue.values)}
    return Reason("non-finite", clue.cause, FAULT, clue.variant, where, values, group=event.node)


def _made(cause: str, variant: str, origin: Origin, **more: Any) -> Reason:
    values = {"op": _op(origin), "dtype": str(origin.dtype).removeprefix("torch."), **more}
    group = origin.where and (origin.where.file, origin.where.line)
    return Reason("non-finite", cause, FAULT, variant, origin.where, values, group)


def _op(origin: Origin) -> str:
    return origin.name.strip("_")
