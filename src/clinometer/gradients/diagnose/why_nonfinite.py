"""Why is it NaN or infinite: the first call of the forward, or node of the backward, that made it so."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from clinometer.gradients.diagnose.evidence import Clue
from clinometer.gradients.diagnose.why_zero import place_above
from clinometer.gradients.report.finding import FAULT, Reason
from clinometer.gradients.report.formatting import words
from clinometer.gradients.report.places import Where, definition_of
from clinometer.gradients.sandbox.subject import Subject
from clinometer.gradients.sandbox.tensors import largest, plain
from clinometer.gradients.trace.backward_trace import Event, Flow
from clinometer.gradients.trace.graph import is_custom, operation
from clinometer.torch_internals.custom_functions import function_of

_INFINITE = words(
    """
    log log_ log2 log10 log1p div true_divide __truediv__ __rtruediv__ __rdiv__ reciprocal rsqrt atanh
    logit div_ xlogy __itruediv__ divide binary_cross_entropy nll_loss log_softmax cross_entropy
    """
)
_NAMES = {
    "__truediv__": "division", "div": "division", "__rtruediv__": "division", "__rdiv__": "division",
    "div_": "division", "true_divide": "division", "reciprocal": "division", "rsqrt": "sqrt",
    "log1p": "log", "log2": "log", "log10": "log", "logit": "log", "xlogy": "log", "log_": "log",
    "__itruediv__": "division", "divide": "division", "log": "log", "sqrt": "sqrt", "sqrt_": "sqrt",
    "pow": "pow", "__pow__": "pow", "__rpow__": "pow", "softmax": "softmax", "_safe_softmax": "softmax",
    "acos": "acos", "arccos": "acos", "asin": "acos", "arcsin": "acos", "std": "std", "var": "std",
    "mean": "mean", "cross_entropy": "loss", "nll_loss": "loss", "mse_loss": "loss", "l1_loss": "loss",
    "binary_cross_entropy": "log",
}  # fmt: skip
_MASKS = words(
    """
    masked_fill masked_fill_ full full_like tensor where fill_ __setitem__ new_full triu triu_ tril
    tril_ as_tensor finfo masked_scatter generate_square_subsequent_mask zeros
    """
)


def why_nonfinite(
    name: str, subject: Subject, flow: Flow, source: Origin | None, alone: bool = True
) -> Reason:
    """Why a gradient is not finite: `source` is what the forward's check found, if the loss is not."""
    if source is not None:
        return source.reason()
    node = flow.graph.leaves.get(id(subject.tensors[name]))
    found = [] if node is None else flow.origins(node, lambda s: s is not None and not math.isfinite(s))
    for event, position in found:
        if (clue := event.clues.get(position)) is not None:
            return backward_reason(event, clue, flow)
    if not alone:
        return Reason("non-finite", "unknown", FAULT, "elsewhere", group=1)
    return Reason("non-finite", "overflow", FAULT, "sum", values={"dtype": str(subject.tensors[name].dtype)})


def backward_reason(event: Event, clue: Clue, flow: Flow) -> Reason:
    """The finding for the node where a finite gradient stopped being finite."""
    where = flow.trace.places.get(event.node) or place_above(event.node, flow)
    if is_custom(event.node):
        where = definition_of(function_of(event.node).backward) or where
    values = {"op": where.op if where else operation(event.node).lower(), **dict(clue.values)}
    return Reason("non-finite", clue.cause, FAULT, clue.variant, where, values, group=event.node)


@dataclass
class Origin:
    """The first call whose result was not finite."""

    name: str
    where: Where | None
    nan: bool
    kind: str
    """"made" by the call; in "given" data or a "parameter" already; "mask": infinity that is meant."""
    dtype: torch.dtype
    parameter: str = ""
    across: bool = False
    """Of a softmax: the rows of −∞ lie along another dimension than the last."""

    def reason(self) -> Reason:
        values = {"op": self.name.strip("_"), "dtype": str(self.dtype).removeprefix("torch.")}
        group = self.where and (self.where.file, self.where.line)
        if self.kind == "parameter":
            return Reason(
                "non-finite",
                "forward",
                FAULT,
                "parameter",
                self.where,
                {**values, "weight": self.parameter},
                group,
            )
        if self.kind == "given":
            return Reason("non-finite", "forward", FAULT, "input", self.where, values, group)
        if not self.nan and self.name not in _INFINITE and self.kind == "made":
            return Reason("non-finite", "overflow", FAULT, "forward", self.where, values, group)
        variant = "softmax-across" if self.across else _NAMES.get(self.name, "other")
        return Reason("non-finite", "forward", FAULT, variant, self.where, values, group)


class Finiteness:
    """Follows values that are not finite through a forward, call by call, to where they began.

    −inf in an attention mask is meant, so a call that writes it begins nothing until a NaN is made of it.
    """

    def __init__(self, subject: Subject, stand_ins: Mapping[int, Tensor] | None = None) -> None:
        self._parameters = {id(tensor): name for name, tensor in subject.tensors.items()}
        self._parameters |= {k: self._parameters[id(t)] for k, t in (stand_ins or {}).items()}
        self._known: dict[int, tuple[weakref.ref[Tensor], Origin]] = {}
        self._seen: dict[int, weakref.ref[Tensor]] = {}
        self._met: dict[tuple[str, int, str], Origin] = {}
        """What went into a call and was not finite, by the call's place."""

    def of(self, tensor: Tensor) -> Origin | None:
        """Where what is wrong in `tensor` began."""
        ref, origin = self._known.get(id(tensor), (None, None))
        return origin if ref is not None and ref() is tensor else None

    def after_call(self, name: str, ins: list[Tensor], outs: list[Tensor], where: Where | None) -> None:
        """One call of the forward."""
        with torch.no_grad():
            for out in outs:
                if out.is_floating_point() or out.is_complex():
                    self._look(name, ins, out, where)
                    self._meet(ins, where)
                self._seen[id(out)] = weakref.ref(out)

    def _look(self, name: str, ins: list[Tensor], out: Tensor, where: Where | None) -> None:
        size = largest(out)
        if size is None or math.isfinite(size):
            self._known.pop(id(out), None)
            return
        nan = math.isnan(size) or bool(torch.isnan(plain(out)).any())
        sources = [t for t in ins if t is not out and not math.isfinite(largest(t) or 0.0)]
        origin = None
        for tensor in sources:
            came = self.of(tensor) or self._from_outside(tensor, name, where)
            if came is not None and (came.kind != "mask" or origin is None):
                origin = came if origin is None or origin.kind == "mask" else origin
        if origin is None or (origin.kind == "mask" and nan and not origin.nan):
            mask = not nan and name in _MASKS
            across = nan and _NAMES.get(name) == "softmax" and bool(ins) and _is_fine_along_the_last(ins[0])
            origin = Origin(name, where, nan, "mask" if mask else "made", out.dtype, across=across)
        self._known[id(out)] = (weakref.ref(out), origin)

    def behind(self, reason: Reason) -> Reason:
        """The same; or, where a backward multiplied by a value that was not finite, that value's origin.

        The loss may be finite all the same: a softmax gives NaN in a row of padding, the loss leaves that row
        out, and the gradient that comes back for it, zero, is multiplied by the NaN.
        """
        at = reason.where
        origin = None if at is None else self._met.get((at.file, at.line, at.op))
        if origin is None or origin.where is None or reason.cause != "backward":
            return reason
        variant = "unseen"
        if origin.kind == "given":
            variant = "unseen-input"
        elif _NAMES.get(origin.name) == "softmax":
            variant = "unseen-softmax"
        values = {"op": origin.name.strip("_")}
        place = origin.where.file, origin.where.line
        return Reason("non-finite", "backward", FAULT, variant, origin.where, values, place)

    def _meet(self, ins: list[Tensor], where: Where | None) -> None:
        origins = [o for o in map(self.of, ins) if o is not None and o.kind in ("made", "given")]
        if where is not None and origins and origins[0].where != where:
            self._met.setdefault((where.file, where.line, where.op), origins[0])

    def _from_outside(self, tensor: Tensor, name: str, where: Where | None) -> Origin | None:
        """A value nobody in this forward made: a parameter's own, or the batch's."""
        nan = bool(torch.isnan(plain(tensor)).any())
        if id(tensor) in self._parameters:
            return Origin(name, where, nan, "parameter", tensor.dtype, self._parameters[id(tensor)])
        return Origin(name, where, nan, "given" if nan else "mask", tensor.dtype)


def _is_fine_along_the_last(scores: Tensor) -> bool:
    """Whether a softmax over the last dimension would have something to choose from in every row."""
    scores = plain(scores)
    if scores.dim() < 2 or bool((torch.isnan(scores) | torch.isposinf(scores)).any()):
        return False
    return not bool(torch.isneginf(scores).all(-1).any())
