"""Listening to a run: every call of a module and of a custom autograd Function, with what it was given."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from clinometer.gradients.report.places import Where, user_frame
from clinometer.gradients.sandbox.random_state import RandomState
from clinometer.gradients.sandbox.tensors import tensors_in
from clinometer.gradients.trace.checkpointing import opened_checkpoints
from clinometer.gradients.trace.graph import Node, live_below
from clinometer.gradients.trace.torch_patches import patched
from clinometer.torch_internals.custom_functions import (
    Operator,
    OperatorPacket,
    function_of,
    has_setup_context,
    operator_name,
    registered_backward,
    transforms_active,
)

MOST_CALLS = 8
"""Of one module; of a Function four times as many, for its branch may depend on the call."""


@dataclass
class CapturedCall:
    """One call, as it was made: its arguments, copied, and the random numbers that came next."""

    path: str
    target: Any
    arguments: Any
    inputs: list[Tensor]
    """The tensors among the arguments that required a gradient."""
    random: RandomState = field(default_factory=RandomState)
    training: dict[nn.Module, bool] = field(default_factory=dict)
    upstream: int = 0
    """The tensors (bits of `Capture`) that what it was given was computed from."""
    own: int = 0
    """Those that it was given themselves."""
    where: Where | None = None
    """Of a custom operator: the line that calls it."""
    backward: Any = None
    """Of a custom operator: the function registered as its backward."""
    operation: str = ""
    """Of a single call of torch: its name."""


class _Copying(TorchFunctionMode):
    """Inside, `deepcopy` detaches tensors that have a history, and notes those that require a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "__deepcopy__":
            tensor, memo = args
            return self.take(tensor, memo)
        return func(*args, **(kwargs or {}))

    def take(self, tensor: Tensor, memo: dict[int, Any]) -> Tensor:
        if id(tensor) not in memo:
            memo[id(tensor)] = tensor.detach().clone()
            if tensor.requires_grad:
                self.inputs.append(memo[id(tensor)])
        return memo[id(tensor)]


def copied_arguments(arguments: Any) -> tuple[Any, list[Tensor]] | None:
    """A copy, and the tensors in it that require a gradient; None if it cannot be copied."""
    try:
        memo: dict[int, Any] = {}
        with _Copying() as copying:
            for tensor in tensors_in(arguments):  # a Parameter copies itself without asking the mode
                copying.take(tensor, memo)
            return copy.deepcopy(arguments, memo), copying.inputs
    except Exception:
        return None


@contextmanager
def running_modules(paths: Mapping[nn.Module, str], running: list[str]) -> Iterator[None]:
    """Inside, `running` ends with the path of the module that runs now."""

    def enter(module: nn.Module, args: Any) -> None:
        running.append(paths.get(module, running[-1] if running else ""))

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        if running:
            running.pop()

    before = register_module_forward_pre_hook(enter)
    after = register_module_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()


class Capture:
    """Notes the calls of modules and Functions while the closure runs."""

    def __init__(
        self,
        modules: Mapping[nn.Module, str],
        functions: Iterable[type],
        operators: Mapping[str, Any],
        bits: Mapping[int, int],
    ) -> None:
        self._modules = modules
        self._operators = operators
        self._bits = bits
        self._below: dict[Node, int] = {}
        self._functions = list(functions)
        self._running: list[str] = []
        self._counts: dict[Any, int] = {}
        self.calls: list[CapturedCall] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Enter after everything was rewound, for rewinding takes hooks away."""
        with ExitStack() as stack:
            stack.callback(self._below.clear)
            for module in self._modules:
                if isinstance(module, torch.jit.ScriptModule):
                    continue
                before = module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True)
                stack.callback(before.remove)
                stack.callback(module.register_forward_hook(self._leave, always_call=True).remove)
            for kind in self._functions:
                stack.enter_context(patched(kind, "forward", self._around_forward(kind)))
            stack.enter_context(opened_checkpoints())
            if self._operators:
                stack.enter_context(_Operators(self))
            yield

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        path = self._modules[module]
        self._running.append(path)
        if torch.is_grad_enabled():
            self._note(path, module, (args, kwargs), MOST_CALLS)

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        self._running.pop()

    def _around_forward(self, kind: Any) -> Callable[..., Any]:
        takes_context = not has_setup_context(kind)
        takes_class = isinstance(inspect.getattr_static(kind, "forward"), classmethod)
        first = int(takes_context) + int(takes_class)

        def around_forward(forward: Any, *args: Any, **kwargs: Any) -> Any:
            path = self._running[-1] if self._running else ""
            self._note(path, kind, (args[first:], kwargs), 4 * MOST_CALLS)
            return forward(*args, **kwargs)

        return around_forward

    def note_operator(self, operator: Any, args: Any, kwargs: Any) -> None:
        """A call of an operator, if it has a custom backward and a gradient to hand on."""
        backward = self._operators.get(operator_name(operator))
        if backward is None or not torch.is_grad_enabled():
            return
        if any(tensor.requires_grad for tensor in tensors_in(args, kwargs)):
            path = self._running[-1] if self._running else ""
            call = self._note(path, operator, (args, kwargs), 4 * MOST_CALLS)
            if call is not None:
                call.where = user_frame(sys._getframe(1), op=operator_name(operator), module=path)
                call.backward = backward

    def _note(self, path: str, target: Any, arguments: Any, most: int) -> CapturedCall | None:
        if self._counts.get(target, 0) >= most or transforms_active():  # what vmap wraps lives in it only
            return None
        self._counts[target] = self._counts.get(target, 0) + 1
        if (copied := copied_arguments(arguments)) is None:
            return None
        call = CapturedCall(path, target, *copied)
        for tensor in tensors_in(arguments):
            if tensor.grad_fn is not None:
                call.upstream |= live_below(tensor.grad_fn, self._bits, self._below)
            else:
                call.own |= self._bits.get(id(tensor), 0)
        if isinstance(target, nn.Module):
            call.training = {module: module.training for module in target.modules()}
        self.calls.append(call)
        return call


class _Operators(TorchFunctionMode):
    """Tells the capture of calls through torch.ops, which have no hook of their own."""

    def __init__(self, capture: Capture) -> None:
        super().__init__()
        self._capture = capture

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, Operator | OperatorPacket):
            self._capture.note_operator(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def custom_functions(loss: Tensor) -> list[type]:
    """The custom autograd Functions in the graph of a loss, torch's own left out."""
    found: dict[type, None] = {}
    for node in _nodes(loss):
        kind = function_of(node)
        if kind is not None and not kind.__module__.startswith("torch."):
            found[kind] = None
    return list(found)


def custom_operators(loss: Tensor) -> dict[str, Any]:
    """The backward of each operator of torch.library in the graph of a loss, by the operator's name."""
    found: dict[str, Any] = {}
    for node in _nodes(loss):
        registered = registered_backward(node)
        if registered is not None and not registered[1].__module__.startswith("torch."):
            found[operator_name(registered[0])] = registered[1]
    return found


def _nodes(loss: Tensor) -> Iterator[Node]:
    seen = set()
    queue = [loss.grad_fn]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        queue.extend(next_node for next_node, _ in node.next_functions)
