"""Why a gradient is wrong, found by trying: one circumstance of the forward and backward changed at a time.

Each is a context for one run. `places` are the lines that it concerns: none, and it did not apply. If the
gradient of a run inside it is the derivative of the loss, that circumstance is the reason.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from clinometer.gradients.report.places import Where, definition_of, user_frame
from clinometer.gradients.sandbox.tensors import tensors_in
from clinometer.gradients.trace.function_calls import function_calls
from clinometer.gradients.trace.torch_patches import in_this_thread, patched
from clinometer.torch_internals.backward_hooks import (
    CHECKPOINTS,
    MODULE_HOOKS,
    WITHOUT_REENTRANT,
    is_chosen,
    tensor_hooks,
)
from clinometer.torch_internals.custom_functions import CheckpointFunction

_GRAD_FN = Tensor.grad_fn


class Circumstance(Protocol):
    """One thing that may be otherwise while a loss and its gradient are computed."""

    key: str

    @property
    def places(self) -> dict[str, Where | None]:
        """The lines it concerns, by label."""
        ...

    def changed(self) -> Any:
        """Inside, it is otherwise."""
        ...


class HooksOff(TorchFunctionMode):
    """Hooks that change gradients: on tensors, wherever they were registered, and on modules."""

    key = "hooked"

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._tensors = list(tensors.values())
        self.places: dict[str, Where | None] = {}
        self.called: dict[str, Where | None] = {}
        """All hooks that ran, also those that change nothing."""
        self._off = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, the hooks run as they are, and `places` lists those that change what they are given."""
        self._off = False
        with self._around_all():
            yield

    @contextmanager
    def changed(self) -> Iterator[None]:
        self._off = True
        with self._around_all():
            yield

    @contextmanager
    def _around_all(self) -> Iterator[None]:
        with ExitStack() as stack:
            for tensor in self._tensors:
                hooks = tensor_hooks(tensor)
                kept = dict(hooks)
                stack.callback(hooks.update, kept)
                for key, hook in kept.items():
                    hooks[key] = self._around(hook, _place(hook))
            for name in MODULE_HOOKS:
                stack.enter_context(patched(nn.Module, name, in_this_thread(self._around_module_hooks)))
            stack.enter_context(self)
            yield

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.register_hook:
            where = user_frame(sys._getframe(1), op="register_hook")
            tensor, hook = args[0], args[1] if len(args) > 1 else (kwargs or {})["hook"]
            return func(tensor, self._around(hook, where))
        out = func(*args, **(kwargs or {}))
        if getattr(func, "__self__", None) is _GRAD_FN and out is not None:
            return _Node(out, self._around)
        return out

    def _around_module_hooks(self, get: Any, module: nn.Module) -> Any:
        found = get(module)
        if isinstance(found, tuple):
            return tuple([self._around(hook, _place(hook), 1) for hook in hooks] for hooks in found)
        return [self._around(hook, _place(hook), 1) for hook in found]

    def _around(self, hook: Any, where: Where | None, position: int = 0) -> Callable[..., Any]:
        """The hook, listened to; `position` is that of the gradients it may change."""
        label = getattr(where, "label", "")

        def called(*given: Any) -> Any:
            if self._off:
                return None
            self.called.setdefault(label, where)
            arriving = given[position]
            before = [g.detach().clone() for g in tensors_in(arriving)]
            came = hook(*given)
            after = list(tensors_in(arriving if came is None else came))
            if len(after) != len(before) or not all(map(_same, before, after)):
                self.places.setdefault(label, where)
            return came

        return called


class _Node:
    """A node of the graph, as `tensor.grad_fn` gives it, that tells of the hooks registered on it."""

    def __init__(self, node: Any, around: Callable[..., Any]) -> None:
        self._node = node
        self._around = around

    def __getattr__(self, name: str) -> Any:
        return getattr(self._node, name)

    def register_hook(self, hook: Any) -> Any:
        return self._node.register_hook(self._listened(hook, "register_hook"))

    def register_prehook(self, hook: Any) -> Any:
        return self._node.register_prehook(self._listened(hook, "register_prehook"))

    def _listened(self, hook: Any, name: str) -> Any:
        if str(getattr(hook, "__module__", "")).startswith("torch."):  # a module's own, around the person's
            return hook
        where = user_frame(sys._getframe(2), op=name)
        return self._around(hook, where)


class CheckpointRandomness:
    """Checkpoints that draw other random numbers when they compute their block again."""

    key = "checkpoint_random"

    def __init__(self) -> None:
        self.places: dict[str, Where | None] = {}

    @contextmanager
    def changed(self) -> Iterator[None]:
        with ExitStack() as stack:
            if CheckpointFunction is not None:
                stack.enter_context(patched(CheckpointFunction, "forward", self._reentrant))
            stack.enter_context(patched(CHECKPOINTS, WITHOUT_REENTRANT, self._without_reentrant))
            yield

    def _reentrant(self, forward: Any, ctx: Any, function: Any, preserve: bool, *args: Any) -> Any:
        self._note(preserve)
        return forward(ctx, function, True, *args)

    def _without_reentrant(self, call: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        if "preserve_rng_state" in kwargs:
            self._note(kwargs["preserve_rng_state"])
            return call(function, *args, **{**kwargs, "preserve_rng_state": True})
        self._note(args[0])
        return call(function, True, *args[1:], **kwargs)

    def _note(self, preserve: bool) -> None:
        if not preserve:
            where = user_frame(sys._getframe(2), op="checkpoint")
            self.places.setdefault(getattr(where, "label", ""), where)


class CheckpointsOff:
    """Checkpoints whose block computes something else when it is run again."""

    key = "checkpoint_changed"

    def __init__(self) -> None:
        self.places: dict[str, Where | None] = {}

    @contextmanager
    def changed(self) -> Iterator[None]:
        with (
            function_calls(self._function),
            patched(CHECKPOINTS, WITHOUT_REENTRANT, self._without_reentrant),
        ):
            yield

    def _function(self, kind: Any, call: Any, args: Any, kwargs: Any) -> Any:
        if kind is not CheckpointFunction:
            return call(*args, **kwargs)
        self._note()
        with torch.enable_grad():
            return args[0](*args[2:])

    def _without_reentrant(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        self._note()
        yield

    def _note(self) -> None:
        where = user_frame(sys._getframe(2), op="checkpoint")
        self.places.setdefault(getattr(where, "label", ""), where)


class SavedTensorsHooksOff:
    """Hooks on what the forward saves, which give back something else."""

    key = "saved_tensors"

    def __init__(self) -> None:
        self.places: dict[str, Where | None] = {}

    @contextmanager
    def changed(self) -> Iterator[None]:
        with (
            patched(saved_tensors_hooks, "__enter__", in_this_thread(self._enter)),
            patched(saved_tensors_hooks, "__exit__", in_this_thread(self._leave)),
        ):
            yield

    def _enter(self, call: Any, hooks: Any) -> Any:
        if not is_chosen(hooks):
            return call(hooks)
        where = user_frame(sys._getframe(2), op="saved_tensors_hooks")
        self.places.setdefault(getattr(where, "label", ""), where)
        return None

    def _leave(self, call: Any, hooks: Any, *error: Any) -> Any:
        return None if is_chosen(hooks) else call(hooks, *error)


class ContiguousGradients:
    """A custom backward that is right only for a gradient that lies in memory in order."""

    key = "not_contiguous"

    def __init__(self, function: type) -> None:
        self._kind: Any = function
        self.places: dict[str, Where | None] = {}
        self.name = function.__name__

    @contextmanager
    def changed(self) -> Iterator[None]:
        with patched(self._kind, "backward", self._around):
            yield

    def _around(self, backward: Any, *given: Any) -> Any:
        if any(isinstance(g, Tensor) and _is_scattered(g) for g in given):
            where = definition_of(self._kind.backward)
            self.places.setdefault(getattr(where, "label", ""), where)
        return backward(*(g.contiguous() if isinstance(g, Tensor) else g for g in given))


class WritesHeld:
    """Writes under no_grad into a tensor of the graph: their change is held constant."""

    key = "unseen_write"

    def __init__(self, held: Any) -> None:
        self._held = held

    @property
    def places(self) -> dict[str, Where | None]:
        return self._held.unseen_writes

    @contextmanager
    def changed(self) -> Iterator[None]:
        self._held.hold_writes = True
        try:
            yield
        finally:
            self._held.hold_writes = False


def reasons_to_try(tensors: Mapping[str, Tensor], functions: Sequence[type], held: Any) -> list[Circumstance]:
    """The circumstances, in the order in which they are tried."""
    return [
        HooksOff(tensors),
        CheckpointRandomness(),
        CheckpointsOff(),
        SavedTensorsHooksOff(),
        *map(ContiguousGradients, functions),
        WritesHeld(held),
    ]


def _same(before: Tensor, after: Tensor) -> bool:
    return before.shape == after.shape and torch.equal(before, after.detach().to(before.dtype))


def _is_scattered(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_contiguous()


def _place(hook: Any) -> Where | None:
    """Where a hook is written."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    if not hasattr(hook, "__code__") and not hasattr(hook, "__func__"):
        hook = type(hook).__call__
    return definition_of(hook)
