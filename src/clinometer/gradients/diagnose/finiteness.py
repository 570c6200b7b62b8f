"""Evidence of the forward: through which calls values went that are NaN or infinite, and where they began.

The backward's evidence is in `evidence.py`; `why_nonfinite` draws the verdict from both.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clinometer.gradients.diagnose.operation_view import Clue, OperationView, canonical
from clinometer.gradients.diagnose.singular_points import singular_point
from clinometer.gradients.report.formatting import words
from clinometer.gradients.report.places import Where, user_frame
from clinometer.gradients.sandbox.subject import Subject
from clinometer.gradients.sandbox.tensors import largest, plain, tensors_in
from clinometer.gradients.trace.primitive_calls import primitive_calls

SOFTMAXES = {"softmax", "_safe_softmax"}
"""Calls that make NaN of a row of −∞."""
_MASKS = words(
    """
    masked_fill masked_fill_ full full_like tensor where fill_ __setitem__ new_full triu triu_ tril
    tril_ as_tensor finfo masked_scatter generate_square_subsequent_mask zeros
    """
)


@dataclass
class Origin:
    """The first call whose result was not finite."""

    name: str
    where: Where | None
    nan: bool
    kind: str
    """"made" by the call; a "constant" written there; in "given" data or a "parameter" already; "mask":
    infinity that is meant."""
    dtype: torch.dtype
    parameter: str = ""
    across: bool = False
    """Of a softmax: the rows of −∞ lie along another dimension than the last."""
    clue: Clue | None = None
    """What was special about the values that arrived at the operation inside of the call."""


@dataclass
class _Spoilt:
    """The result of an operation that is not finite, although what went in was, or went in infinite."""

    result: weakref.ref[Tensor]
    name: str
    nan: bool
    clue: Clue
    constant: bool
    """Whether a number that is not finite was written in the program."""
    where: Where | None


class Finiteness:
    """Follows values that are not finite through a forward, call by call, to where they began.

    −inf in an attention mask is meant, so a call that writes it begins nothing until a NaN is made of it.
    """

    def __init__(self, subject: Subject, stand_ins: Mapping[int, Tensor] | None = None) -> None:
        self._parameters = {id(tensor): name for name, tensor in subject.tensors.items()}
        self._parameters |= {k: self._parameters[id(t)] for k, t in (stand_ins or {}).items()}
        self._known: dict[int, tuple[weakref.ref[Tensor], Origin]] = {}
        self._met: dict[tuple[str, int, str], Origin] = {}
        """A call's place → where a value began that went into it and was not finite."""
        self._made_at: dict[tuple[str, int, str], Origin] = {}
        """A call's place → the value that is not finite that it made."""
        self._spoilt: list[_Spoilt] = []
        """What operations made since the last call was noted."""
        self._constants: dict[int, _Spoilt] = {}
        """id of a tensor → the line that wrote NaN or infinity into it."""
        self._active = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, the operations that calls are made of are seen too."""
        with primitive_calls(self._operation) as active:
            self._active = active
            yield

    def _operation(self, name: str, given: Mapping[str, Any], outs: list[Tensor]) -> None:
        for out in (plain(out) for out in outs):
            size = largest(out) if out.is_floating_point() or out.is_complex() else None
            if size is None or math.isfinite(size):
                continue
            sizes = [largest(plain(t)) or 0.0 for t in tensors_in(list(given.values()))]
            constant = any(isinstance(v, float) and not math.isfinite(v) for v in given.values())
            constant = constant or name == "lift_fresh"
            nan = bool(torch.isnan(out).any())
            carried = any(math.isnan(s) or (math.isinf(s) and not nan) for s in sizes)
            if carried and not constant:
                continue
            results = {"result": out, **{f"result{i}": plain(o) for i, o in enumerate(outs)}}
            view = OperationView(canonical(name), {**given, **results}.get, out)
            clue = Clue("forward", "constant") if constant else singular_point(view)
            where = user_frame(sys._getframe(1), op=name.strip("_"))
            one = _Spoilt(weakref.ref(out), view.name, nan, clue, constant, where)
            self._spoilt.append(one)
            if constant:
                self._constants[id(out)] = one
            return

    def of(self, tensor: Tensor) -> Origin | None:
        """Returns where the values of `tensor` that are not finite began; None if all are finite."""
        ref, origin = self._known.get(id(tensor), (None, None))
        return origin if ref is not None and ref() is tensor else None

    def after_call(self, name: str, ins: list[Tensor], outs: list[Tensor], where: Where | None) -> None:
        """Notes one call of the forward: `Trace.after_call`."""
        with torch.no_grad():
            for out in outs:
                if out.is_floating_point() or out.is_complex():
                    self._look(name, ins, out, where)
                    self._meet(ins, where)
        self._spoilt.clear()

    def _look(self, name: str, ins: list[Tensor], out: Tensor, where: Where | None) -> None:
        size = largest(out)
        if size is None or math.isfinite(size):
            self._known.pop(id(out), None)
            return
        nan = math.isnan(size) or bool(torch.isnan(plain(out)).any())
        sources = [t for t in ins if t is not out and not math.isfinite(largest(t) or 0.0)]
        origin = None
        began = self._began()
        if not sources and began is None and any(t is out for t in ins):  # handed through as it was
            origin = self.of(out) or self._from_outside(out, name, where)
        for tensor in sources:
            came = self.of(tensor) or self._from_outside(tensor, name, where)
            if came is not None and (came.kind != "mask" or origin is None):
                origin = came if origin is None or origin.kind == "mask" else origin
        if origin is None or (origin.kind in ("mask", "constant") and nan and not origin.nan):
            mask = not nan and name in _MASKS
            across = nan and name in SOFTMAXES and bool(ins) and _is_fine_along_the_last(ins[0])
            written = self._active and not sources
            if began is not None:  # torch writes NaN for itself too: logdet does, of a negative determinant
                written = began.constant and (name in _MASKS or canonical(name) == began.name)
            clue = Clue("forward", "constant") if written else began and began.clue
            if clue is not None and clue.variant == "constant" and not written:
                clue = Clue("forward", "other")
            kind = "mask" if mask else "constant" if written else "made"
            origin = Origin(name, where, nan, kind, out.dtype, across=across, clue=clue)
            if where is not None:
                self._made_at.setdefault(_key(where), origin)
        self._known[id(out)] = (weakref.ref(out), origin)

    def before(self, where: Where | None) -> Origin | None:
        """Returns where a value began that the call at `where` was given and that was not finite, if any."""
        return None if where is None else self._met.get(_key(where))

    def made_at(self, where: Where | None) -> Origin | None:
        """Returns the value that is not finite that the call at `where` made, if it made one."""
        return None if where is None else self._made_at.get(_key(where))

    def _began(self) -> _Spoilt | None:
        """The first operation of the call that made something that is not finite; else what was written."""
        return next((one for one in self._spoilt if not one.constant), next(iter(self._spoilt), None))

    def _meet(self, ins: list[Tensor], where: Where | None) -> None:
        origins = [
            o
            for o in map(self.of, ins)
            if o is not None and o.kind in ("made", "given", "constant", "parameter")
        ]
        if where is not None and origins and origins[0].where != where:
            self._met.setdefault(_key(where), origins[0])

    def _from_outside(self, tensor: Tensor, name: str, where: Where | None) -> Origin | None:
        """The origin of a value that no call of this forward made: a parameter's, or the batch's."""
        nan = bool(torch.isnan(plain(tensor)).any())
        if id(tensor) in self._parameters:
            return Origin(name, where, nan, "parameter", tensor.dtype, self._parameters[id(tensor)])
        one = self._constants.get(id(tensor))
        if nan and one is not None and one.result() is tensor and one.where is not None:
            return Origin(one.where.op, one.where, nan, "constant", tensor.dtype, clue=one.clue)
        return Origin(name, where, nan, "given" if nan else "mask", tensor.dtype)


def _key(where: Where) -> tuple[str, int, str]:
    return where.file, where.line, where.op


def _is_fine_along_the_last(scores: Tensor) -> bool:
    """Whether a softmax over the last dimension would have something to choose from in every row."""
    scores = plain(scores)
    if scores.dim() < 2 or bool((torch.isnan(scores) | torch.isposinf(scores)).any()):
        return False
    return not bool(torch.isneginf(scores).all(-1).any())
