"""Each call of torch alone, while the closure runs: the line whose derivative is not that of its values.

Asked only when a gradient is wrong and no layer says why. What draws random numbers and has a gradient all
the same is a sampled gradient (the implicit one of Gamma and Dirichlet); what goes in steps and has one is a
straight-through estimator (fake quantisation): both are surrogates by definition. What changes with its
input and has the gradient zero has no derivative (torch.normal in its mean). The rest is wrong, or right up
to a small error that is torch's own.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from clinometer.gradients.check.call_capture import CapturedCall, copied_arguments, running_modules
from clinometer.gradients.check.layer_checks import Flaw, LayerCheck, check_call
from clinometer.gradients.check.numerics.float64 import Float64Tensors, InDouble, writes
from clinometer.gradients.report.places import user_frame
from clinometer.gradients.sandbox.random_state import RandomState
from clinometer.gradients.sandbox.tensors import tensors_in
from clinometer.gradients.trace.checkpointing import opened_checkpoints
from clinometer.gradients.trace.function_calls import function_calls, in_custom
from clinometer.gradients.trace.graph import Node, live_below
from clinometer.torch_internals.custom_functions import (
    CheckpointFunction,
    Operator,
    OperatorPacket,
    transforms_active,
)

MOST_OF_A_LINE = 3
"""Calls of one function at one line that are checked."""
_INDEX_WRITES = {
    "__setitem__",
    "index_put",
    "index_put_",
    "index_copy",
    "index_copy_",
    "scatter",
    "scatter_",
    "masked_scatter",
    "masked_scatter_",
}
_LOOKS = {"__get__", "backward", "grad", "register_hook", "requires_grad_", "retain_grad", "detach_"}


class OperationChecks(TorchFunctionMode):
    """Checks the calls that pass, one by one; those whose derivative is another are in `found`."""

    def __init__(
        self, doubling: InDouble, modules: Mapping[nn.Module, str], bits: Mapping[int, int], seed: int
    ) -> None:
        super().__init__()
        self._modules = modules
        self._running: list[str] = []
        self.found: list[LayerCheck] = []
        self.upstream: list[int] = []
        """For each of `found`, the tensors (one bit each) that it was computed from."""
        self._doubling = doubling
        self._bits = bits
        self._seed = seed
        self._below: dict[Node, int] = {}
        self._counts: dict[Any, int] = {}
        self._checking = False

    @contextmanager
    def listening(self) -> Any:
        """Enter after everything was rewound."""
        with ExitStack() as stack:
            stack.callback(self._below.clear)
            stack.enter_context(running_modules(self._modules, self._running))
            stack.enter_context(function_calls(self._function))
            stack.enter_context(opened_checkpoints())
            stack.enter_context(self._doubling)
            stack.enter_context(self)
            yield

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _LOOKS or isinstance(func, Operator | OperatorPacket) or "out" in kwargs or in_custom():
            return func(*args, **kwargs)
        target = _written(func) if writes(name) else func
        return self._check(name, target, lambda: func(*args, **kwargs), (args, kwargs))

    def _function(self, kind: Any, call: Any, args: Any, kwargs: Any) -> Any:
        """A custom Function of torch's own; those of the person are checked as layers."""
        if kind is CheckpointFunction or not kind.__module__.startswith("torch."):
            return call(*args, **kwargs)
        return self._check(kind.__name__, kind.apply, lambda: call(*args, **kwargs), (args, kwargs))

    def _check(self, name: str, target: Any, call: Any, given: Any) -> Any:
        if self._checking or not torch.is_grad_enabled() or transforms_active():
            return call()
        if not any(t.requires_grad for t in tensors_in(given)):
            return call()
        where = user_frame(sys._getframe(2), op=name)
        key = (name, None if where is None else where.label)
        self._counts[key] = self._counts.get(key, 0) + 1
        captured = None if self._counts[key] > MOST_OF_A_LINE else copied_arguments(given)
        before, upstream = RandomState(), self._upstream(given)
        out = call()
        if captured is None or not any(
            t.requires_grad for t in tensors_in(out, given if writes(name) else ())
        ):
            return out
        after = RandomState()
        arguments, inputs = captured
        path = self._running[-1] if self._running else ""
        shown = name if name.startswith("__") else name.lstrip("_")
        one = CapturedCall(path, target, arguments, inputs, before, where=where, operation=shown)
        self._checking = True
        try:
            seed = self._seed + len(self._counts)
            check = check_call(one, self._doubling, Float64Tensors(()), _nothing, seed)
        finally:
            self._checking = False
            after.restore()
        if check is not None and (not check.passed or check.share):
            self.found.append(_named(check, name, drawn=not before.same_as(after), given=arguments))
            self.upstream.append(upstream)
        return out

    def _upstream(self, given: Any) -> int:
        found = 0
        for tensor in tensors_in(given):
            if tensor.grad_fn is not None:
                found |= live_below(tensor.grad_fn, self._bits, self._below)
            else:
                found |= self._bits.get(id(tensor), 0)
        return found


def _named(check: LayerCheck, name: str, *, drawn: bool, given: Any) -> LayerCheck:
    """The check, and what its error is: a surrogate, no derivative, a repeated index."""
    check = replace(check, operation=True)
    if check.share:
        return check
    surrogate, flaw = check.surrogate, ""
    if name in _INDEX_WRITES and _repeats(given):
        flaw = "repeated"
    elif check.judgement.scale == 0:
        flaw = "no_derivative"
    elif drawn:
        surrogate = "sampled"
    return replace(check, surrogate="" if flaw else surrogate, flaw=_flaw(flaw))


def _flaw(name: str) -> Flaw:
    return name  # pyright: ignore[reportReturnType]


def _repeats(given: Any) -> bool:
    """Whether an index among the arguments occurs twice."""
    indices = [t for t in tensors_in(given) if not t.is_floating_point() and not t.is_complex()]
    indices = [t for t in indices if t.dtype is not torch.bool and t.numel() > 1]
    return any(t.reshape(-1).unique().numel() < t.numel() for t in indices)


def _written(func: Any) -> Any:
    """A call in place as a function: what it wrote into is its result."""

    def write(*args: Any, **kwargs: Any) -> Any:
        func(*args, **kwargs)
        return args[0]

    return write


def _nothing() -> None:
    """There is nothing to put back between two runs of one call."""
