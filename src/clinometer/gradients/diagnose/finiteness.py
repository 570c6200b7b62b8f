"""Evidence of the forward: through which calls values went that are NaN or infinite, and where they began.

The backward's evidence is in `evidence.py`; `why_nonfinite` draws the verdict from both.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from clinometer.gradients.report.formatting import words
from clinometer.gradients.report.places import Where
from clinometer.gradients.sandbox.subject import Subject
from clinometer.gradients.sandbox.tensors import largest, plain

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
    """"made" by the call; in "given" data or a "parameter" already; "mask": infinity that is meant."""
    dtype: torch.dtype
    parameter: str = ""
    across: bool = False
    """Of a softmax: the rows of −∞ lie along another dimension than the last."""


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
            across = nan and name in SOFTMAXES and bool(ins) and _is_fine_along_the_last(ins[0])
            origin = Origin(name, where, nan, "mask" if mask else "made", out.dtype, across=across)
        self._known[id(out)] = (weakref.ref(out), origin)

    def before(self, where: Where | None) -> Origin | None:
        """Returns where a value began that the call at `where` was given and that was not finite, if any."""
        return None if where is None else self._met.get((where.file, where.line, where.op))

    def _meet(self, ins: list[Tensor], where: Where | None) -> None:
        origins = [o for o in map(self.of, ins) if o is not None and o.kind in ("made", "given")]
        if where is not None and origins and origins[0].where != where:
            self._met.setdefault((where.file, where.line, where.op), origins[0])

    def _from_outside(self, tensor: Tensor, name: str, where: Where | None) -> Origin | None:
        """The origin of a value that no call of this forward made: a parameter's, or the batch's."""
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
