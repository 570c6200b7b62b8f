"""What the gradients alone show, after a backward of the user's: less, and only what is certain."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clinometer.distributed.ranks import Ranks, whole
from clinometer.gradients.diagnose.why_none import before_any_run
from clinometer.gradients.report.finding import EXPLAINED, FAULT, Reason
from clinometer.gradients.sandbox.saved_state import has_grad
from clinometer.gradients.sandbox.subject import Subject
from clinometer.gradients.sandbox.tensors import largest, zero_lines
from clinometer.messages import InputError
from clinometer.torch_internals.tensors import has_accumulation_hooks


def without_closure(subject: Subject, ranks: Ranks) -> dict[str, Reason | str]:
    """Returns for each tensor a reason, or its status if the gradient alone does not show the cause."""
    for name, tensor in subject.tensors.items():
        if has_grad(tensor) and tensor.grad is not None and tensor.grad.is_meta:
            raise InputError("gradients.subject.meta", name=name)
    with torch.no_grad():
        here = {n: largest(t.grad) if has_grad(t) else None for n, t in subject.tensors.items()}
        sizes = ranks.largest(here)
        anything = any(size is not None for size in sizes.values())
        all_zero = anything and all(size in (None, 0.0) for size in sizes.values())
        return {
            name: _reason(tensor, sizes[name], anything, all_zero) for name, tensor in subject.tensors.items()
        }


def _reason(tensor: Tensor, size: float | None, anything: bool, all_zero: bool) -> Reason | str:
    if size is None:
        if (reason := before_any_run(tensor)) is not None:
            return reason
        if not anything:
            return Reason("none", "no-backward", FAULT, group=0)
        if has_accumulation_hooks(tensor):
            return Reason("none", "cleared", EXPLAINED, "likely", group=0)
        return Reason("none", "not-reaching-loss", FAULT, "seen_from_grad", group=0)
    if not math.isfinite(size):
        return Reason("non-finite", "unknown", FAULT, group=0)
    if size == 0:
        return Reason("zero", "zeroed", EXPLAINED, "likely", group=0) if all_zero else "zero"
    return (
        "partly-zero" if tensor.grad is not None and zero_lines(whole(tensor.grad)) != (None, None) else "ok"
    )
