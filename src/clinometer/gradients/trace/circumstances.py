"""Under which circumstances a closure runs: what was found set, and what is set otherwise for a run of ours.

The modes under which the person's code runs are part of the run. Where the run here differs from the
person's own, every result says so first, and nothing that was not run as the person runs it passes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from clinometer.gradients.report.finding import EXPLAINED, FAULT, Finding, Severity
from clinometer.gradients.sandbox.closure import Closure, eagerly, evaluate
from clinometer.gradients.sandbox.sandbox import Before
from clinometer.gradients.trace.torch_patches import in_this_thread, patched
from clinometer.torch_internals.frames import compiled_call_hook

_SAID_FIRST = ("gradients-off", "not-compiled")
"""Causes that say how the run differed from the person's own."""


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """How the run differed from the person's own, then faults, then what is explained."""
    return sorted(findings, key=lambda f: (f.cause not in _SAID_FIRST, f.severity != FAULT))


@dataclass
class Circumstances:
    """How the run differs from the person's own."""

    gradients_off: str
    """ "no_grad" (or set_grad_enabled(False)), "inference_mode", or "" where gradients are on."""
    compiled: bool
    """Whether something that torch.compile made ran, without compilation."""

    def findings(self, closure: Closure, before: Before) -> list[Finding]:
        """Says what differs; runs the closure once more where gradients were found off. Call it last."""
        found = []
        if self.gradients_off:  # on all ranks: they stand at the same line
            fails = _fails_as_called(closure, before)
            variant = self.gradients_off if fails else "allowed"
            found.append(_finding("gradients-off", FAULT if fails else EXPLAINED, variant))
        if self.compiled:
            found.append(_finding("not-compiled", EXPLAINED))
        return found


@contextmanager
def run_eagerly(compiled: bool = False) -> Iterator[Circumstances]:
    """`eagerly()`, and how the run inside differs from the person's own.

    `compiled`: it is known already that a part of the model is.
    """
    off = "" if torch.is_grad_enabled() else "no_grad"
    found = Circumstances("inference_mode" if torch.is_inference_mode_enabled() else off, compiled)

    def around_callback(call: Any, callback: Any) -> Any:
        found.compiled |= callback is not None and callback is not False
        return call(callback)

    hook = compiled_call_hook()
    with eagerly():
        if hook is None:
            yield found
            return
        with patched(*hook, in_this_thread(around_callback)):
            yield found


def _fails_as_called(closure: Closure, before: Before) -> bool:
    """Whether no backward could start from the loss under the modes that were found."""
    before.rewind()
    try:
        return not evaluate(closure, as_called=True).requires_grad
    except Exception:  # it runs with gradients on, so this is what their absence does to it
        return True


def _finding(cause: str, severity: Severity, variant: str = "") -> Finding:
    return Finding(cause, "loop", severity, f"diagnosis.loop.{cause}", variant=variant)
