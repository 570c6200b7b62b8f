"""Does a position see the future? `check_causality` changes one input at a time and looks before it.

    ∂ output[s] / ∂ input[t] = 0        for all t > s

Token ids have no derivative, so another token is put in their place: in a causal model no earlier output
moves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clinometer.distributed.ranks import Ranks
from clinometer.gradients.check.numerics.float64 import in_double
from clinometer.gradients.report.document import Document, Line, dim, ok, sentence
from clinometer.gradients.report.finding import FAULT, Finding
from clinometer.gradients.report.formatting import format_count, format_number
from clinometer.gradients.report.result import Result
from clinometer.gradients.sandbox.closure import eagerly
from clinometer.gradients.sandbox.interrupts import uninterrupted
from clinometer.gradients.sandbox.sandbox import modules_named_by, untouched
from clinometer.gradients.sandbox.subject import Subject
from clinometer.messages import InputError

MOST_POSITIONS = 64
_UNMOVED = 1e-9
"""Of the largest output: what convolutions by Fourier transform leave behind in float64 is below."""


@dataclass(frozen=True)
class Leak:
    """An output that moved when an input after it was changed."""

    output: int
    input: int
    change: float
    """Of the largest output."""


class CausalityCheck(Result):
    """Whether no output depends on a later input, and which does."""

    def __init__(self, leaks: Sequence[Leak], *, changed: Sequence[int], length: int, seconds: float) -> None:
        self.leaks = tuple(leaks)
        self.changed = tuple(changed)
        """The positions whose input was changed, one at a time."""
        self.length = length
        self.seconds = seconds
        self.findings = (self._finding(),) if leaks else ()

    @property
    def passed(self) -> bool:
        return not self.leaks

    healthy = passed

    def entries(self) -> Mapping[str, Any]:
        return {}

    def facts(self) -> Mapping[str, Any]:
        return {
            "kind": "causality-check",
            "passed": self.passed,
            "leaks": self.leaks,
            "changed": self.changed,
            "length": self.length,
            "seconds": self.seconds,
            "findings": [finding.to_dict() for finding in self.findings],
        }

    def document(self, language: str | None = None) -> Document:
        lines: Document = []
        for finding in self.findings:
            lines += [*finding.document(language), Line()]
        if self.passed:
            lines.append(Line((ok("✓ "), *sentence("causality.passed", language)), hang=2))
        looked = sentence(
            "causality.looked_at",
            language,
            changed=format_count(len(self.changed)),
            length=format_count(self.length),
            seconds=f"{self.seconds:.1f}",
        )
        lines.append(Line(tuple(dim(span.text) for span in looked)))
        return lines

    def _finding(self) -> Finding:
        pairs = {(leak.output, leak.input) for leak in self.leaks}
        every = {(s, t) for t in self.changed for s in range(t)}
        variant = ""
        if pairs == every and len(every) > 1:
            variant = "everything"
        elif pairs == {(t - 1, t) for t in self.changed}:
            variant = "next"
        most = max(self.leaks, key=lambda leak: leak.change)
        values = {
            "output": most.output,
            "input": most.input,
            "change": format_number(100 * most.change, place=""),
            "pairs": format_count(len(pairs)),
            "looked": format_count(len(every)),
        }
        return Finding("future-leak", "wrong", FAULT, "causality.leak", values=values, variant=variant)


@uninterrupted
def check_causality(params: Any, function: Callable[[Tensor], Any], inputs: Tensor) -> CausalityCheck:
    """Whether the outputs of `function(inputs)` depend on no later input, in float64.

        output[s] stays the same when input[t], t > s, is another

    `inputs`: token ids (..., S), or vectors (..., S, D). The outputs, a tensor, an object with `logits`, or a
    tuple that begins with one, have the positions in the same dimension. Dropout stays on and draws the
    same numbers. At most 64 positions are changed, spread evenly. Leaves no trace.

    Raises InputError for inputs without two positions or two different tokens, for outputs of another
    length, and where two runs on the same inputs differ.
    """
    begun = time.perf_counter()
    subject = Subject.of(params)
    ids = not inputs.is_floating_point()
    axis = inputs.ndim - (1 if ids else 2)
    if axis < 0 or inputs.shape[axis] < 2:
        raise InputError("causality.too_short", shape=list(inputs.shape))
    length = inputs.shape[axis]
    modules = [m for m in (subject.module, *modules_named_by(function)) if m is not None]
    tensors = [*subject.tensors.values(), *(p for module in modules for p in module.parameters())]
    leaks: list[Leak] = []
    ranks = Ranks(subject.tensors, modules)
    ranks.refuse_sharded("check.sharded")
    with (
        ranks.apart(),
        untouched(subject, closure=function) as before,
        eagerly(),
        in_double(tensors) as (mode, _),
    ):

        def run(given: Tensor) -> Tensor:
            before.rewind()
            with torch.inference_mode(False), torch.no_grad(), mode:
                return _tensor_of(function(given), axis, length)

        here = run(inputs)
        size = float(here[here.isfinite()].abs().max()) if bool(here.isfinite().any()) else 0.0
        if bool((_moved(run(inputs.clone()), here, axis) > _UNMOVED * size).any()):
            raise InputError("causality.not_repeatable")
        changed = _spread(length)
        for t in changed:
            moved = _moved(run(_with_another(inputs, axis, t, ids)), here, axis)[:t]
            found = (moved > _UNMOVED * size).nonzero().flatten().tolist()
            leaks += [Leak(s, t, float(moved[s]) / size if size else 1.0) for s in found]
    return CausalityCheck(leaks, changed=changed, length=length, seconds=time.perf_counter() - begun)


def _spread(length: int) -> list[int]:
    """Positions with something before them, the first and the last among them."""
    count = min(length - 1, MOST_POSITIONS)
    return sorted({1 + round(i * (length - 2) / max(1, count - 1)) for i in range(count)})


def _with_another(inputs: Tensor, axis: int, t: int, ids: bool) -> Tensor:
    """The inputs, at position t a token that occurs elsewhere in them, or a vector moved at random."""
    changed = inputs.clone()
    at = changed.select(axis, t)
    if ids:
        known = inputs.unique()
        if len(known) < 2:
            raise InputError("causality.one_token", token=known.tolist())
        at.copy_(known[(torch.searchsorted(known, at.contiguous()) + 1) % len(known)])
    else:
        noise = torch.empty(at.shape, dtype=torch.float64).normal_(generator=torch.Generator().manual_seed(t))
        at.add_(noise.to(at) * max(float(inputs.std()), 1e-2))
    return changed


def _moved(now: Tensor, here: Tensor, axis: int) -> Tensor:
    """For each position the largest change of its outputs; equal infinities and NaN have not changed."""
    same = (now == here) | (now.isnan() & here.isnan())
    change = torch.where(same, torch.zeros_like(now), (now - here).abs()).nan_to_num(nan=float("inf"))
    return change.movedim(axis, 0).flatten(1).amax(1) if change.ndim > 1 else change


def _tensor_of(came: Any, axis: int, length: int) -> Tensor:
    found = getattr(came, "logits", None)
    if found is None:
        found = came[0] if isinstance(came, tuple) and came else came
    if not isinstance(found, Tensor) or found.ndim <= axis or found.shape[axis] != length:
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InputError("causality.outputs", given=shape, axis=axis, length=length)
    return found.detach().to(torch.float64)
